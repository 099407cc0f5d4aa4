"""Settings of what deals with policies: gold scores, sampling, optimising. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, SerializationInfo, WrapValidator, model_validator

from moemerge.options.base import Options, Run, Source, Sources, TextFormat


def _or_callable(value: Any, validate: Any) -> Any:
    return value if callable(value) else validate(value)


def _by_name(value: Any, info: SerializationInfo) -> Any:
    return f"{value.__module__}:{value.__qualname__}" if info.mode == "json" and callable(value) else value


# In Python a function too; manifests then hold its name.
Function = Annotated[str | None, WrapValidator(_or_callable), PlainSerializer(_by_name)]


class GoldSource(Options):
    """Who says what an answer is truly worth, if not scores in the file."""

    gold_model: Source | None = Field(None, description="reward model whose scores are gold")
    gold_function: Function = Field(
        None,
        description="FILE.py:NAME or MODULE:NAME, a function of prompt and answer that gives the gold score",
    )

    @model_validator(mode="after")
    def _one_gold(self) -> GoldSource:
        if self.gold_model and self.gold_function:
            raise ValueError("gold_model and gold_function say two things: give one of them")
        return self

    @property
    def has_gold(self) -> bool:
        """Whether gold scores are made, and not read."""
        return bool(self.gold_model or self.gold_function)


class SampleSettings(GoldSource):
    """Answers of a policy, as candidates for best-of-n."""

    model: Source = Field(description="policy: a causal language model, folder or hub name")
    prompts: Source = Field(description="rows with a prompt; equal prompts count once")
    per_prompt: int = Field(16, ge=2, description="answers to each prompt")
    max_prompts: int | None = Field(None, ge=1, description="use the first so many prompts")
    max_new_tokens: int = Field(256, ge=1, description="longest answer in tokens; longer ones are cut")
    temperature: float = Field(1.0, gt=0, description="divides the policy's logits")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="draw from the likeliest tokens with this share; below 1, KL is not log n - ...",
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens of prompts and answers in one batch")


class Sample(SampleSettings, TextFormat, Run):
    """Options of `moemerge sample`."""

    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class OptimiseSettings(GoldSource):
    """A small policy-gradient run against reward models."""

    policy: Source = Field(description="policy to start from: a causal language model, folder or hub name")
    prompts: Source = Field(description="rows with a prompt; equal prompts count once")
    steps: int = Field(200, ge=2, description="optimiser steps")
    batch_size: int = Field(32, ge=2, description="answers per pass")
    gradient_accumulation: int = Field(1, ge=1, description="passes per optimiser step")
    answers_per_prompt: int = Field(4, ge=2, description="answers to one prompt, each other's baseline")
    learning_rate: float = Field(1e-5, gt=0, description="learning rate, constant")
    kl_penalty: float = Field(0.0, ge=0, description="weight of KL to the first policy in the reward")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    max_new_tokens: int = Field(64, ge=1, description="longest answer in tokens; longer ones are cut")
    temperature: float = Field(1.0, gt=0, description="divides the policy's logits")
    measure_steps: int | None = Field(
        None, ge=1, description="steps between measurements (default: 20 of them)"
    )
    measure_prompts: int = Field(64, ge=2, description="prompts set aside to measure on, at most half")
    measure_answers: int = Field(4, ge=1, description="answers to each of these")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on a GPU, float32 on CPU"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples")

    @model_validator(mode="after")
    def _sizes_fit(self) -> OptimiseSettings:
        if not self.has_gold:
            raise ValueError("give gold_model or gold_function")
        if self.batch_size * self.gradient_accumulation % self.answers_per_prompt:
            raise ValueError("batch_size * gradient_accumulation must be a multiple of answers_per_prompt")
        return self

    @property
    def measured_every(self) -> int:
        """Steps between measurements."""
        return self.measure_steps or max(1, self.steps // 20)


class Optimise(OptimiseSettings, TextFormat, Run):
    """Options of `moemerge optimise`."""

    models: Sources = Field(description="name=folder or hub name of a reward model, each by itself")
    baseline: str | None = Field(None, description="model that the others are compared with")
    trust_remote_code: bool = Field(False, description="run code that comes with the models")

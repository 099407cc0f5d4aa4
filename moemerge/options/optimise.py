"""Options of optimise."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moemerge.options.base import Run, Source, Sources, TextFormat
from moemerge.options.gold import GoldSource
from moemerge.options.refresh import RefreshSettings


class OptimiseSettings(RefreshSettings, GoldSource):
    """A small policy-gradient run against reward models."""

    policy: Source = Field(description="policy to start from: a causal language model, folder or hub name")
    prompts: Source = Field(description="rows with a prompt; equal prompts count once")
    steps: int = Field(200, ge=2, description="optimiser steps")
    batch_size: int = Field(32, ge=2, description="answers per pass")
    gradient_accumulation: int = Field(1, ge=1, description="passes per optimiser step")
    answers_per_prompt: int = Field(
        4, ge=2, description="answers per prompt, which are each other's baseline (RLOO)"
    )
    credit: Literal["answer", "token"] = Field(
        "answer",
        description="token: each token's baseline also has what the reward model made of the answer so far "
        "(RED; decoders only)",
    )
    credit_weight: float = Field(1.0, ge=0, description="credit token: weight of that in the baseline")
    learning_rate: float = Field(1e-5, gt=0, description="learning rate, constant")
    kl_penalty: float = Field(
        0.0, ge=0, description="weight of the KL divergence from the initial policy in the reward"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    max_new_tokens: int = Field(64, ge=1, description="longest answer in tokens; longer ones are cut")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of the policy")
    measure_steps: int | None = Field(
        None, ge=1, description="steps between measurements (default: 20 of them)"
    )
    measure_prompts: int = Field(64, ge=2, description="prompts held out to measure on, at most half")
    measure_answers: int = Field(4, ge=1, description="answers to each of these")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on a GPU, float32 on CPU"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    report_to: list[str] = Field(
        default_factory=list,
        description="trackers that TRL reports to while it runs: tensorboard, wandb, ...",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples")

    @model_validator(mode="after")
    def _sizes_fit(self) -> OptimiseSettings:
        if not self.has_gold:
            raise ValueError("gold scores are needed: give gold_model or gold_function")
        if self.batch_size * self.gradient_accumulation % self.answers_per_prompt:
            raise ValueError("batch_size * gradient_accumulation must be a multiple of answers_per_prompt")
        if self.credit_weight != 1 and self.credit != "token":
            raise ValueError("credit_weight goes with credit token")
        self.check_refresh(self.credit == "token")
        return self

    @property
    def measured_every(self) -> int:
        """Steps between measurements."""
        return self.measure_steps or max(1, self.steps // 20)


class Optimise(OptimiseSettings, TextFormat, Run):
    """Options of `moemerge optimise`."""

    POSITIONAL = ("policy", "models", "prompts")

    models: Sources = Field(
        description="reward models: folders, hub names or scorer.json files; the policy is optimised "
        "against each separately"
    )
    baseline: str | None = Field(None, description="model that the others are compared with")
    trust_remote_code: bool = Field(False, description="run code that comes with the models")

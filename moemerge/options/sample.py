"""Options of sample."""

from __future__ import annotations

from pydantic import Field

from moemerge.options.base import Run, Source, TextFormat
from moemerge.options.gold import GoldSource

SAMPLED = "sampled"  # what a run calls the candidate set that sample draws


class SampleSettings(GoldSource):
    """Answers of a policy, as candidates for best-of-n."""

    model: Source = Field(description="policy: a causal language model, folder or hub name")
    prompts: Source = Field(description="rows with a prompt; equal prompts count once")
    per_prompt: int = Field(16, ge=2, description="answers to each prompt")
    max_prompts: int | None = Field(
        None, ge=1, description="number of prompts to use, the first ones (default: all)"
    )
    max_new_tokens: int = Field(256, ge=1, description="longest answer in tokens; longer ones are cut")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of the policy")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling: draw from the most likely tokens that together have this "
        "probability; below 1, the KL of best-of-n is not log n - (n - 1) / n",
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens of prompts and answers in one batch")


class Sample(SampleSettings, TextFormat, Run):
    """Options of `moemerge sample`."""

    POSITIONAL = ("model", "prompts")

    trust_remote_code: bool = Field(False, description="run code that comes with the model")

"""Options of synthetic."""

from __future__ import annotations

from pydantic import Field

from moemerge.options.base import Options, Run


class SyntheticSettings(Options):
    """A preference world with a known gold reward, and a tiny untrained Llama for it."""

    train_pairs: int = Field(5000, ge=10, description="training pairs")
    validation_pairs: int = Field(600, ge=10, description="held-out pairs for early stopping and fitting")
    test_pairs: int = Field(2000, ge=10, description="test pairs, in and out of distribution each")
    own_pairs: int = Field(
        500,
        ge=10,
        description="pairs with true labels of three of the four regimes, to combine models trained apart",
    )
    prompts: int = Field(100, ge=2, description="prompts with candidate answers")
    candidates: int = Field(256, ge=2, description="answers per prompt for best-of-n")
    label_noise: float = Field(
        0.2, ge=0, lt=0.5, description="share of flipped labels in training and validation pairs"
    )
    hidden_size: int = Field(64, ge=8, description="width of the tiny Llama")
    num_layers: int = Field(3, ge=1, description="layers of the tiny Llama")


class Synthetic(SyntheticSettings, Run):
    """Options of `moemerge synthetic`."""

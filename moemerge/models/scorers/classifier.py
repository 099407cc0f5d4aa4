"""A reward model as everybody knows it: a sequence classifier with one output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.data.tokenise import Encoded
from moemerge.errors import UnsupportedError
from moemerge.models.cost import cost
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.scorers.base import Scorer
from moemerge.models.scoring import score
from moemerge.options.placement import WHOLE, Placement


class Classifier:
    """A reward model's folder, opened."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder, self.source = folder, folder.source
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def reader(self) -> PreTrainedTokenizerBase:
        """Its own tokenizer. Raises as load_tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder)
        return self._tokenizer

    def load(self, device: torch.device, placement: Placement = WHOLE) -> LoadedClassifier:
        """Raises as load_reward_model."""
        return LoadedClassifier(load_reward_model(self.folder, device, placement=placement), self.reader())


def classifier_of(scorer: Scorer, needed_by: str) -> Classifier:
    """The scorer, if it is a classifier; else UnsupportedError."""
    if isinstance(scorer, Classifier):
        return scorer
    raise UnsupportedError(
        f"{needed_by} needs a classifier",
        given=f"{scorer.source}, a scorer of another kind",
        expected="a reward model's folder or hub name: its score can be read at every token",
        fix=f"take a classifier, or leave {needed_by} out",
    )


class LoadedClassifier:
    """A reward model in memory."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.facts: dict[str, Any] = {"class": type(model).__name__, **cost(model)}

    def score(
        self, encoded: Sequence[Encoded], batch_tokens: int, progress: str = "", alone: bool = False
    ) -> Tensor:
        """As models.scoring.score."""
        return score(self.model, self.tokenizer, encoded, batch_tokens, progress, alone=alone)

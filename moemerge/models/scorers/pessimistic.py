"""A reward model's score less a multiple of how unsure its own head is of it."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from moemerge.errors import UnsupportedError
from moemerge.models.folder import ModelFolder
from moemerge.models.heads.base import head_of
from moemerge.models.heads.mlp import MlpHead
from moemerge.models.scorers.classifier import Classifier, LoadedClassifier
from moemerge.options.placement import WHOLE, Placement
from moemerge.options.scorers import Pessimistic


class PessimisticScorer:
    """A model with a noisy head, opened; see options.scorers.Pessimistic."""

    def __init__(self, source: str, options: Pessimistic, trust_remote_code: bool = False) -> None:
        self.source, self.options = source, options
        self._classifier = Classifier(ModelFolder(options.model, trust_remote_code))

    def reader(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._classifier.reader()

    def load(self, device: torch.device, placement: Placement = WHOLE) -> LoadedClassifier:
        """Raises UnsupportedError if the head draws nothing in training, and as load_reward_model."""
        loaded = self._classifier.load(device, placement)
        head = head_of(loaded.model)
        if not isinstance(head, MlpHead) or not head.settings.noise:
            raise UnsupportedError(
                f"{self.source} asks how unsure a model is that does not say so",
                given=f"{self.options.model}, whose head has no noise",
                expected="a model with a head that draws factors and weights in training",
                fix="train one with --head nonnegative, or with --head mlp --head-noise",
            )
        head.pessimism = self.options.deviations
        loaded.facts["class"] = f"pessimistic ({loaded.facts['class']})"
        return loaded

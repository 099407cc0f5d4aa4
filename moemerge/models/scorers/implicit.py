"""DPO's implicit reward: how much more likely a policy makes an answer than the model it was trained from.

B texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moemerge.data.tokenise import Encoded
from moemerge.errors import CheckpointError
from moemerge.models.folder import ModelFolder
from moemerge.models.language_model import LanguageModel
from moemerge.models.loading import load_tokenizer
from moemerge.models.scorers.base import refuse_parts
from moemerge.models.scoring import in_batches, refuse_empty
from moemerge.models.token_limits import check_texts
from moemerge.options.placement import WHOLE, Placement
from moemerge.options.scorers import Implicit


class ImplicitScorer:
    """A policy and its reference, opened; see options.scorers.Implicit."""

    def __init__(self, source: str, options: Implicit, trust_remote_code: bool = False) -> None:
        self.source, self.options = source, options
        self._policy = ModelFolder(options.policy, trust_remote_code)
        self._reference = ModelFolder(options.reference, trust_remote_code) if options.reference else None

    def reader(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer. CheckpointError if the reference numbers words otherwise."""
        tokenizer = load_tokenizer(self._policy)
        if self._reference and load_tokenizer(self._reference).get_vocab() != tokenizer.get_vocab():
            raise CheckpointError(
                "policy and reference do not read the same tokens",
                given=f"{self._policy.source} and {self._reference.source}, whose vocabularies differ",
                expected="the model that the policy was trained from",
                fix=f"correct reference in {self.source}",
            )
        return tokenizer

    def load(self, device: torch.device, placement: Placement = WHOLE) -> LoadedImplicit:
        """Both models, in memory at once. Raises as load_language_model."""
        refuse_parts(self.source, placement)
        models = [LanguageModel(folder, device) for folder in (self._policy, self._reference) if folder]
        return LoadedImplicit(models, self.options)


class LoadedImplicit:
    """A policy, and its reference if it has one, in memory."""

    def __init__(self, models: Sequence[LanguageModel], options: Implicit) -> None:
        self._models, self._options = models, options
        costs = ("parameters", "active_parameters", "flops_per_token")
        summed = {name: sum(model.facts[name] for model in models) for name in costs}
        self.facts: dict[str, Any] = {"class": f"implicit ({models[0].facts['class']})", **summed}

    def score(
        self, encoded: Sequence[Encoded], batch_tokens: int, progress: str = "", alone: bool = False
    ) -> Tensor:
        """beta log pi(answer | prompt) / reference(answer | prompt) of each text, or its mean."""
        refuse_empty(encoded)
        for model in self._models:
            check_texts(model.trunk, encoded)
        return in_batches(encoded, batch_tokens, self._of_batch, progress, alone=alone)

    def _of_batch(self, texts: Sequence[Encoded]) -> Tensor:
        log_B, count_B = self._models[0].log_probabilities(texts)
        for reference in self._models[1:]:
            log_B = log_B - reference.log_probabilities(texts)[0]
        return self._options.beta * (log_B / count_B.clamp(min=1) if self._options.per_token else log_B)

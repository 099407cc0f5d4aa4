"""Scorers that put a question to a language model and read its verdict: what judges and their kin share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from moemerge.data.pairs import Pair
from moemerge.data.tokenise import Encoded
from moemerge.models.folder import ModelFolder
from moemerge.models.language_model import LanguageModel
from moemerge.models.loading import load_tokenizer
from moemerge.models.scorers.questions import Questions
from moemerge.models.scoring import in_batches, refuse_empty
from moemerge.models.token_limits import check_texts
from moemerge.options.scorers import Activation, Judge, Question

Q = TypeVar("Q", Judge, Activation)


class VerdictScorer(Generic[Q]):
    """A language model that is asked, opened."""

    def __init__(self, source: str, options: Q, trust_remote_code: bool = False) -> None:
        self.source = source
        self.options: Q = options
        self._folder = ModelFolder(options.model, trust_remote_code)
        self._reader: Questions | None = None

    def reader(self) -> Questions:
        """Puts the question. Raises as load_tokenizer and Questions."""
        if self._reader is None:
            self._reader = Questions(load_tokenizer(self._folder), self.options, self._shots())
        return self._reader

    def _shots(self) -> Sequence[Pair]:
        """Pairs with right verdicts that stand before each question."""
        return ()


class LoadedVerdicts:
    """A language model that is asked, in memory; `kind`: what its class is told as."""

    kind = "judge"

    def __init__(self, model: LanguageModel, verdicts: Sequence[int], options: Question) -> None:
        self._model, self._verdicts = model, verdicts
        # Ranked, an answer's score is half the log-odds with itself in front: the difference of two answers
        # is then the mean log-odds of both orders.
        self._weight = 0.5 if options.form == "ranked" else 1.0
        told = {"class": f"{self.kind} ({model.facts['class']})", "flops_per_token": model.trunk_flops}
        self.facts: dict[str, Any] = {**model.facts, **told}

    def score(
        self, encoded: Sequence[Encoded], batch_tokens: int, progress: str = "", alone: bool = False
    ) -> Tensor:
        """Log-odds of the good verdict over the bad one after each question, in nats."""
        refuse_empty(encoded)
        check_texts(self._model.trunk, encoded)
        return in_batches(encoded, batch_tokens, self._of_batch, progress, alone=alone)

    def _of_batch(self, texts: Sequence[Encoded]) -> Tensor:
        logits_B2 = self._model.next_logits(texts, self._verdicts)
        return self._weight * (logits_B2[:, 0] - logits_B2[:, 1])

"""A language model as judge: its log-odds of a good verdict on an answer, zero- or few-shot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from moemerge.data.pairs import Pair
from moemerge.data.reading import read_pairs
from moemerge.models.language_model import LanguageModel
from moemerge.models.scorers.base import refuse_parts
from moemerge.models.scorers.verdicts import LoadedVerdicts, VerdictScorer
from moemerge.options.base import TextFormat
from moemerge.options.placement import WHOLE, Placement
from moemerge.options.scorers import Judge


class JudgeScorer(VerdictScorer[Judge]):
    """A judge, opened; see options.scorers.Judge. Its reader raises DataError for unusable shots, too."""

    def load(self, device: torch.device, placement: Placement = WHOLE) -> LoadedVerdicts:
        """Raises as load_language_model."""
        refuse_parts(self.source, placement)
        return LoadedVerdicts(LanguageModel(self._folder, device), self.reader().verdicts, self.options)

    def _shots(self) -> Sequence[Pair]:
        if self.options.shots is None:
            return ()
        return list(islice(read_pairs(self.options.shots, TextFormat())[0], self.options.examples))

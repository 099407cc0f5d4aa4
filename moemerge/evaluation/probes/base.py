"""What a probe is given, and what it gives: probes are functions of scores.

P pairs, Q prompts, N candidate answers to a prompt, C candidates of all prompts together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moemerge.data.pairs import Pair
from moemerge.data.rows import Text
from moemerge.options.evaluate import EvaluateSettings
from moemerge.reports.statistics import Floats, Integers
from moemerge.reports.table import Table

NO_SUBSET = "(none)"  # how pairs without a subset are named in reports


@dataclass(frozen=True)
class Case:
    """What an edit is made from, as text without white space around it.

    prompt: the last message of a chat. stranger: the chosen answer to another prompt, "" if there is none.
    random: seeded by pair and edit.
    """

    prompt: str
    answer: str
    stranger: str
    random: Random


Edit = Callable[[Case], str]


@dataclass(frozen=True)
class Edits:
    """The edits that a probe wants scored, by name, and the answer of each pair that they change."""

    side: Literal["chosen", "rejected"]
    functions: Mapping[str, Edit]


@dataclass(frozen=True)
class Edited:
    """An answer after an edit; `number` is its pair's among the pairs of its set, counted from 0."""

    pair: Pair
    number: int
    text: Text

    @property
    def row(self) -> int:
        """The pair's row in its source."""
        return self.pair.row


@dataclass(frozen=True)
class EditScores:
    """One edit of a set's answers, E of them, scored by every model: float64 [E] each.

    left_out: how many pairs were not scored, by reason; the same for all models.
    """

    items: list[Edited]
    scores: dict[str, Floats]
    left_out: dict[str, int]


@dataclass(frozen=True)
class PairScores:
    """One test set, scored by every model on the same pairs.

    scores: per model, float64 [P, 2], chosen and rejected. subsets: [P], "" for none. prompts: [P], equal
    numbers for pairs with equal prompts. lengths: [P, 2], characters of each answer. edits: by "PROBE/EDIT".
    """

    scores: dict[str, Floats]
    subsets: NDArray[np.str_]
    prompts: Integers
    lengths: Integers
    edits: dict[str, EditScores] = field(default_factory=dict)

    def part(self, rows: NDArray[np.bool_]) -> PairScores:
        """The pairs where `rows` is true, without edits."""
        scores = {model: scores_P2[rows] for model, scores_P2 in self.scores.items()}
        return PairScores(scores, self.subsets[rows], self.prompts[rows], self.lengths[rows])

    def with_edit(self, name: str, edit: EditScores) -> PairScores:
        """The same with one more edit."""
        return replace(self, edits={**self.edits, name: edit})


@dataclass(frozen=True)
class CandidateScores:
    """One candidate set, scored by every model on the same answers; prompts lie one after the other.

    scores: per model, float64 [C]. gold: [C]. lengths: [C], characters. sizes: [Q], candidates per prompt.
    """

    scores: dict[str, Floats]
    gold: Floats
    lengths: Integers
    sizes: Integers

    def by_prompt(self, values_C: NDArray[Any]) -> list[NDArray[Any]]:
        """`values_C` cut into one array per prompt."""
        return np.split(values_C, np.cumsum(self.sizes)[:-1])


@dataclass(frozen=True)
class ChoiceScores:
    """One file of RewardBench or RM-Bench, scored by every model on the same answers, row by row.

    scores: per model, float64 [C]. lengths: [C], characters. sizes: [Q], answers per row, of which the first
    num_correct: [Q] are right. subsets, ids: [Q], "" for none. prompts: [Q], equal numbers for equal prompts.
    """

    version: int
    scores: dict[str, Floats]
    lengths: Integers
    sizes: Integers
    num_correct: Integers
    subsets: NDArray[np.str_]
    ids: NDArray[np.str_]
    prompts: Integers

    def part(self, rows_Q: NDArray[np.bool_]) -> ChoiceScores:
        """The rows where `rows_Q` is true."""
        rows_C = np.repeat(rows_Q, self.sizes)
        scores = {model: scores_C[rows_C] for model, scores_C in self.scores.items()}
        return ChoiceScores(
            self.version,
            scores,
            self.lengths[rows_C],
            self.sizes[rows_Q],
            self.num_correct[rows_Q],
            self.subsets[rows_Q],
            self.ids[rows_Q],
            self.prompts[rows_Q],
        )


@dataclass(frozen=True)
class Probe:
    """Something to measure.

    needs: which scores `measure` gets, by name of the set. measure(scores, settings, seed) returns JSON
    values, in a type of evaluation/results.py. tables(result) and plot(result, folder), which returns the
    names of the files it wrote, show them. edits: with "pairs", edited answers that are scored too.
    """

    needs: Literal["pairs", "candidates", "rewardbench", "rmbench"]
    measure: Callable[[Mapping[str, Any], EvaluateSettings, int], Any]
    tables: Callable[[Any], list[Table]]
    plot: Callable[[Any, Path], list[str]]
    edits: Edits | None = None

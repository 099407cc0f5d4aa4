"""Pairs in parts for cross-fitting: what must stay together, and how it is dealt out. P pairs."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moemerge.data.pairs import Pair, numbered, prompt_key
from moemerge.errors import DataError

T = TypeVar("T")
Tie = Literal["text", "prompt", "subset"]


def deal(groups: Sequence[Sequence[T]], kinds: Sequence[str], parts: int, seed: int) -> list[list[T]]:
    """The groups, shuffled, dealt whole to `parts` parts of like size; so is every kind of group."""
    order = np.random.default_rng(seed).permutation(len(groups))
    dealt: list[list[T]] = [[] for _ in range(parts)]
    # Kind after kind, each group to the smallest part: so every kind is spread over all parts.
    for number in sorted(order, key=lambda number: kinds[number]):
        min(dealt, key=len).extend(groups[number])
    return dealt


def tied(pairs: Sequence[Pair], by: Tie) -> list[int]:
    """Equal numbers for pairs that one chain of ties joins, counted from 0 in order of first appearance.

    Two pairs are tied by an equal prompt (`prompt_key`); `text`: also by an equal answer; `subset`: also by
    an equal subset.
    """
    ties_P = [list(_ties(pair, by)) for pair in pairs]
    pair_E = [place for place, ties in enumerate(ties_P) for _ in ties]
    tie_E = numbered(tie for ties in ties_P for tie in ties)
    # A graph of pairs and of what ties them: its components are the groups.
    size = len(pairs) + max(tie_E, default=-1) + 1
    edges = (np.ones(len(tie_E)), (np.array(pair_E), len(pairs) + np.array(tie_E)))
    _, component = connected_components(coo_array(edges, shape=(size, size)), directed=False)
    return numbered(component[: len(pairs)].tolist())


def _ties(pair: Pair, by: Tie) -> Iterator[Hashable]:
    yield "prompt", prompt_key(pair)
    if by == "text":
        yield from (("answer", json.dumps(text, sort_keys=True)) for text in (pair.chosen, pair.rejected))
    if by == "subset":
        yield "subset", pair.subset


def folds_of(pairs: Sequence[Pair], others: Sequence[Pair], by: Tie, folds: int, seed: int) -> list[int]:
    """The fold of each of `pairs` and `others`; what is tied has one fold, folds have like shares of `pairs`.

    Raises DataError if `pairs` are fewer groups than folds.
    """
    numbers = tied([*pairs, *others], by)
    groups: dict[int, list[int]] = {}
    for place, number in enumerate(numbers[: len(pairs)]):
        groups.setdefault(number, []).append(place)
    if len(groups) < folds:
        raise _too_few(pairs, len(groups), by, folds)
    kinds = [pairs[places[0]].subset for places in groups.values()]
    parts = deal(list(groups.values()), kinds, folds, seed)
    fold_of = {numbers[place]: fold for fold, places in enumerate(parts) for place in places}
    return [fold_of.get(number, number % folds) for number in numbers]


def _too_few(pairs: Sequence[Pair], groups: int, by: Tie, folds: int) -> DataError:
    prompts = len({prompt_key(pair) for pair in pairs})
    enough = by != "prompt" and prompts >= folds
    looser = f", or fold_by prompt, of which there are {prompts}" if enough else ""
    fewer = f", or folds {groups}" if groups > 1 else ""
    shared = {"text": "prompts and answers", "prompt": "prompts", "subset": "subsets and prompts"}[by]
    return DataError(
        f"the pairs cannot be dealt to {folds} folds",
        given=f"{len(pairs)} pairs in {groups} group{'s' * (groups != 1)} that share {shared}",
        expected=f"{folds} groups at least, as no voter may have trained on what it scores",
        fix=f"give pairs of more prompts{fewer}{looser}",
    )

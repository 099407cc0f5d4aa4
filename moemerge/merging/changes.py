"""How far whole models' changes from their common base agree: sizes, cosines, signs that conflict.

Shapes: G groups of tensors, N models besides the base, X elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moemerge.artifacts.progress import hidden
from moemerge.merging.blocks import ATTENTION, HEAD, MLP, OUTSIDE
from moemerge.merging.experts.diversity import CHUNK, sizes_and_cosines
from moemerge.merging.experts.report import plain
from moemerge.merging.sources.base import MergedTensor
from moemerge.merging.sources.models import ModelList
from moemerge.reports.table import Table

ALL = "all"
GROUPS = (ALL, ATTENTION, MLP, HEAD, OUTSIDE)
NOTE = (
    "size: norm of the change, as a share of the base's. cosine: of two changes; above 0 they go together, "
    "near 0 they leave each other alone, below 0 they undo each other. conflict: share of the weights that "
    "both changed whose signs differ; one half is what chance gives. attention: whatever in a layer is not "
    "its MLP."
)
BARRIERS = (
    "barrier: how far the Bradley-Terry loss rises, in nats, on the straight line from one model to the "
    "other, over the mixture of the losses at its ends; 0 where averaging them loses nothing."
)


@dataclass(frozen=True)
class Changes:
    """Changes W_i - W_base by group of tensors, float64.

    size_GN: their norm, as a share of the base's. cosine_GNN: between two models' changes; NaN beside one
    that did not change. conflict_GNN: share of the elements that both changed whose signs differ (TIES, arXiv
    2306.01708); NaN where they share none. attention: whatever in a layer is not its MLP.
    """

    groups: list[str]
    size_GN: Tensor
    cosine_GNN: Tensor
    conflict_GNN: Tensor


def measure_changes(source: ModelList) -> Changes:
    """The changes of models on disk; holds one tensor of each at a time. Needs a base."""
    N, G = source.num_members, len(GROUPS)
    gram_GNN, both_GNN, against_GNN = (torch.zeros(G, N, N, dtype=torch.float64) for _ in range(3))
    start_G = torch.zeros(G, dtype=torch.float64)
    for tensor in tqdm(source.tensors, desc="changes", leave=False, disable=hidden()):
        rows = [0, GROUPS.index(source.kind(tensor.dense))]
        for start_X, changes_NX in _parts(source, tensor):
            gram_GNN[rows] += changes_NX @ changes_NX.T
            signs_NX = changes_NX.sign()
            both_NN, product_NN = signs_NX.abs() @ signs_NX.abs().T, signs_NX @ signs_NX.T
            both_GNN[rows] += both_NN
            against_GNN[rows] += (both_NN - product_NN) / 2
            start_G[rows] += start_X.square().sum()
    size_GN, cosine_GNN = sizes_and_cosines(gram_GNN)
    there = [number for number, size in enumerate(start_G.tolist()) if size or size_GN[number].any()]
    shares = (size_GN / start_G.sqrt()[:, None], cosine_GNN, against_GNN / both_GNN)
    return Changes([GROUPS[number] for number in there], *(share[there] for share in shares))


def _parts(source: ModelList, tensor: MergedTensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some elements of the base, and of every model's change, in float64."""
    copies = [matrix.flatten() for matrix in source.matrices(tensor)]
    for parts in zip(*(copy.split(CHUNK) for copy in copies), strict=True):
        start_X, *rest = (part.double() for part in parts)
        yield start_X, torch.stack(rest) - start_X


def numbers_of(measured: Changes, names: list[str]) -> dict[str, Any]:
    """What changes.json holds: by group, sizes by model, and cosine and conflict by pair of models.

    None where there is none: beside a model that did not change, and for the size where the base has zeros.
    """
    groups = {}
    for number, group in enumerate(measured.groups):
        groups[group] = {
            "size": dict(zip(names, measured.size_GN[number].tolist(), strict=True)),
            "cosine": by_pair(measured.cosine_GNN[number], names),
            "conflict": by_pair(measured.conflict_GNN[number], names),
        }
    return {"models": names, "groups": plain(groups)}


def by_pair(values_NN: Tensor, names: list[str]) -> dict[str, float]:
    """Each pair of models' value, by their names."""
    pairs = combinations(range(len(names)), 2)
    return {f"{names[i]} and {names[j]}": float(values_NN[i, j]) for i, j in pairs}


def tables_of(numbers: dict[str, Any]) -> list[Table]:
    """Sizes by model, and agreement by pair, a column or two per group."""
    groups = numbers["groups"]
    sizes = [[name, *(_cell(g["size"][name]) for g in groups.values())] for name in numbers["models"]]
    header = [f"{group}: {what}" for group in groups for what in ("cosine", "conflict")]
    rows = [[pair, *_agreement(groups, pair)] for pair in next(iter(groups.values()))["cosine"]]
    return [
        Table("Size of changes", ["model", *groups], sizes),
        Table("How far changes agree", ["models", *header], rows, NOTE),
        *_barriers(numbers.get("barriers")),
    ]


def _barriers(barriers: dict[str, float] | None) -> Iterator[Table]:
    if barriers is not None:
        rows = [[pair, _cell(value)] for pair, value in barriers.items()]
        yield Table("Loss barriers", ["models", "barrier"], rows, BARRIERS)


def _agreement(groups: dict[str, Any], pair: str) -> Iterator[str]:
    for group in groups.values():
        yield from (_cell(group[what][pair]) for what in ("cosine", "conflict"))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

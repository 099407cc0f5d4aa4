"""How the experts of a MoE differ, as route shows it: tables, heat maps, JSON.

Shapes: L layers with experts, N routed experts, M members (the N, after the shared expert if there is one).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moemerge.artifacts.json_file import write_json
from moemerge.merging.experts.diversity import Disagreement, Updates
from moemerge.merging.experts.speculation import Ratio, Speculation
from moemerge.reports import plotting
from moemerge.reports.table import Table

FILE = "diversity.json"
PAIR_NOTE = (
    "cosine: of their updates. distance: of their weights, as a share of the norm of what the updates start "
    "from, which is the shared expert, or the experts' mean. Both are means over layers."
)
JUDGEMENT_NOTE = (
    " verdicts: share of pairs ranked differently. barrier: largest excess of the Bradley-Terry loss on the "
    "straight line between the two over the mixture of its ends, in nats. The standard deviation of scores "
    "over experts, mean over texts, is {ratio:.4f} of that of the mean score over texts."
)
SUSPECT_NOTE = (
    "Experts whose gate mass per token on the quarter of rejected answers with the highest scores is above "
    "that on other rejected answers, and above that on chosen ones, each with a whole 95 % interval; out of "
    "{count}, of which about one in forty would pass one of the two by accident."
)


@dataclass(frozen=True)
class ScoreDiversity:
    """How the experts differ in what they score; barriers_MM as in diversity.barriers."""

    disagreement: Disagreement
    barriers_MM: Tensor
    speculation: Speculation


@dataclass(frozen=True)
class Diversity:
    """How the experts differ in weights and, if that was asked for, in scores."""

    updates: Updates
    scores: ScoreDiversity | None = None

    def write(self, folder: Path) -> list[str]:
        """Write all numbers as diversity.json (null where there is none) and heat maps; the maps' names."""
        write_json(folder / FILE, plain(self._numbers()))
        maps = {name: parts for name, parts in self._maps().items() if np.isfinite(parts[0]).any()}
        for name, (matrix, title, *axes) in maps.items():
            plotting.heat_map(matrix, folder / name, title, *axes)
        return list(maps)

    def results(self) -> dict[str, Any]:
        """For the manifest: means over pairs of experts by layer, the rest as one number each."""
        results = {"layers": self.updates.layers, "cosine": mean_off_diagonal(self.updates.cosine_LNN)}
        results |= {"distance": mean_off_diagonal(self.updates.distance_LNN)}
        if self.scores is not None:
            s = self.scores
            results |= {
                "disagreement": s.disagreement.ratio,
                "verdicts_that_differ": mean_off_diagonal(s.disagreement.flips_NN[None])[0],
                "largest_barrier": float(s.barriers_MM.max()),
                "speculative_experts": s.speculation.suspects,
            }
        return dict(plain(results))

    def tables(self) -> list[Table]:
        """For routing.md."""
        tables = [_layer_table(self.updates), self._pair_table()]
        return [*tables, *([_suspects(self.scores.speculation)] if self.scores else [])]

    def _numbers(self) -> dict[str, Any]:
        u, of_scores = self.updates, {}
        if self.scores is not None:
            s = self.scores
            ratios = {"over_rejected": s.speculation.over_rejected, "over_chosen": s.speculation.over_chosen}
            of_scores = {
                "disagreement": s.disagreement.ratio,
                "verdicts_that_differ": s.disagreement.flips_NN,
                "barriers": s.barriers_MM,
                "speculation": {name: vars(ratio) for name, ratio in ratios.items()},
                "speculative_experts": s.speculation.suspects,
            }
        weights = {"cosine": u.cosine_LNN, "distance": u.distance_LNN, "size": u.size_LN}
        return {"layers": u.layers, **weights, **of_scores}

    def _maps(self) -> dict[str, tuple[Any, ...]]:
        u, names = self.updates, self._member_names()
        pair = ("expert", "expert")
        maps: dict[str, tuple[Any, ...]] = {
            "update_cosine.png": (
                u.cosine_LNN.nanmean(0),
                "Cosine of updates, mean over layers",
                *pair,
            ),
            "update_distance.png": (u.distance_LNN.mean(0), "Distance of experts, mean over layers", *pair),
        }
        if self.scores is not None:
            s = self.scores
            ratio = s.speculation.over_rejected.value
            title = "Gate mass per token, rejected answers:\nhighest scores over others"
            maps |= {
                "barriers.png": (s.barriers_MM, "Loss barrier (nats)", *pair, names, names),
                "speculation.png": (ratio, title, "expert", "layer", None, u.layers),
            }
        return maps

    def _member_names(self) -> list[str]:
        count = self.updates.size_LN.shape[1]
        has_shared = self.scores is not None and len(self.scores.barriers_MM) > count
        return ["shared"] * has_shared + [str(i) for i in range(count)]

    def _pair_table(self) -> Table:
        header = ["experts", "cosine", "distance", *(["verdicts", "barrier"] if self.scores else [])]
        note = PAIR_NOTE
        if self.scores is not None:
            note += JUDGEMENT_NOTE.format(ratio=self.scores.disagreement.ratio)
        return Table("Pairs of experts", header, list(self._pair_rows()), note)

    def _pair_rows(self) -> Iterator[list[str]]:
        u, s, names = self.updates, self.scores, self._member_names()
        shared = len(names) - u.size_LN.shape[1]  # 1 if the shared expert stands first, else 0
        for first, second in combinations(range(len(names)), 2):
            # a < 0 is the shared expert. The others' updates start from it, so it has none of its own, and
            # the distance to it is an update's size.
            a, b = first - shared, second - shared
            cosine = u.cosine_LNN[:, a, b].nanmean() if a >= 0 else math.nan
            distance = u.distance_LNN[:, a, b].mean() if a >= 0 else u.size_LN[:, b].mean()
            row = [f"{names[first]} and {names[second]}", _number(cosine), _number(distance)]
            if s is not None:
                flips = s.disagreement.flips_NN[a, b] if a >= 0 else math.nan
                row += [_number(flips), _number(s.barriers_MM[first, second])]
            yield row


def mean_off_diagonal(values_LNN: Tensor) -> list[float]:
    """Mean over pairs of different experts, per layer; pairs without a value are left out."""
    apart_NN = ~torch.eye(values_LNN.shape[1], dtype=torch.bool)
    return [float(value) for value in values_LNN[:, apart_NN].nanmean(1)]


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: lists for tensors, null for what is not finite."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, Tensor | np.ndarray | list | tuple):
        return [plain(item) for item in (value.tolist() if hasattr(value, "tolist") else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> str:
    return f"{float(value):.4f}" if math.isfinite(value) else ""


def _layer_table(u: Updates) -> Table:
    columns = (mean_off_diagonal(u.cosine_LNN), mean_off_diagonal(u.distance_LNN), u.size_LN.mean(1))
    rows = zip(u.layers, *columns, strict=True)
    note = "Means over pairs of experts, update: over experts. Near 0, a merge is any of its experts."
    header = ["layer", "cosine", "distance", "update"]
    return Table("Expert updates", header, [[str(n), *map(_number, values)] for n, *values in rows], note)


def _suspects(speculation: Speculation) -> Table:
    rows = []
    for layer, expert in speculation.suspects:
        index = (speculation.layers.index(layer), expert)
        cells = [_interval(ratio, index) for ratio in (speculation.over_rejected, speculation.over_chosen)]
        rows.append([str(layer), str(expert), *cells])
    rows = rows or [["none", "", "", ""]]
    note = SUSPECT_NOTE.format(count=speculation.over_chosen.low.size)
    return Table("Speculative experts", ["layer", "expert", "over rejected", "over chosen"], rows, note)


def _interval(ratio: Ratio, index: tuple[int, int]) -> str:
    return f"{ratio.value[index]:.2f} ({ratio.low[index]:.2f}-{ratio.high[index]:.2f})"

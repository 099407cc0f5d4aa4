"""How a merge does on test pairs over the weight of its shared member: DogeRM's figure, by subset.

Source: DogeRM (arXiv 2407.01470), accuracy over lambda. Shapes: L blocks, N weighted members, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moemerge.data.tokenise import EncodedPair
from moemerge.fitting.problem import FitOutcome
from moemerge.fitting.significance import CONFIDENCE, calibrated_losses
from moemerge.fitting.splits import prompt_numbers
from moemerge.merging.merged_model import MergedModel, margins
from moemerge.reports import plotting
from moemerge.reports.figures import Line, Panel
from moemerge.reports.statistics import clustered_interval
from moemerge.reports.table import Table, with_interval

ALL = "all"
Rows = list[dict[str, Any]]


def curve(
    merged: MergedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[EncodedPair]],
    outcome: FitOutcome,
    weights: Sequence[float],
    micro_batch_size: int,
) -> Rows:
    """Accuracy with 95 % interval, and calibrated loss, for each set, subset and weight, in this order."""
    rows: Rows = []
    for weight in weights:
        merged.merge(outcome.alpha_LN, torch.full_like(outcome.shared_L, weight))
        merged.serve(sets, again=False)
        for name, pairs in sets.items():
            margins_P = margins(merged.model, tokenizer, pairs, micro_batch_size)
            for subset, numbers in _parts(pairs).items():
                place = {"set": name, "subset": subset, "shared_weight": weight}
                rows.append(place | _measured(margins_P[numbers], [pairs[number] for number in numbers]))
    order = [(name, subset) for name, pairs in sets.items() for subset in _parts(pairs)]
    return sorted(rows, key=lambda row: order.index((row["set"], row["subset"])))


def _parts(pairs: Sequence[EncodedPair]) -> dict[str, list[int]]:
    """The numbers of all pairs, and of those of each subset if there are several."""
    names = sorted({pair.pair.subset for pair in pairs})
    parts = {name: [n for n, pair in enumerate(pairs) if pair.pair.subset == name] for name in names}
    return {ALL: [*range(len(pairs))]} | (parts if len(parts) > 1 else {})


def _measured(margins_P: torch.Tensor, pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    right_P = (margins_P > 0).numpy()
    low, high = clustered_interval(right_P, np.array(prompt_numbers(pairs)), CONFIDENCE)
    loss = float(calibrated_losses(margins_P).mean())
    return {
        "pairs": len(pairs),
        "accuracy": float(right_P.mean()),
        "low": low,
        "high": high,
        "calibrated": loss,
    }


def table(rows: Rows) -> Table:
    """A row per set and subset: the highest weight, and the one that did best."""
    shown = []
    for place, part in _by_place(rows):
        best = max(part, key=lambda row: row["accuracy"])
        last = max(part, key=lambda row: row["shared_weight"])
        cells = (with_interval(row["accuracy"], (row["low"], row["high"]), ".3f") for row in (last, best))
        shown.append([", ".join(place), str(part[0]["pairs"]), *cells, f"{best['shared_weight']:g}"])
    highest = max(row["shared_weight"] for row in rows)
    note = "The best of many on these very pairs is too high: take the weight that was chosen on other pairs."
    header = ["set, subset", "pairs", f"accuracy at {highest:g}", "highest accuracy", "at"]
    return Table("Accuracy over the shared weight", header, shown, note)


def draw(rows: Rows, path: Path) -> None:
    """A plot per set, a line per subset."""
    panels: dict[str, dict[str, Line]] = {}
    for (name, subset), part in _by_place(rows):
        part = sorted(part, key=lambda row: row["shared_weight"])
        x, y, low, high = ([row[key] for row in part] for key in ("shared_weight", "accuracy", "low", "high"))
        panels.setdefault(name, {})[subset] = Line(x, y, low, high)
    plots = [Panel(name, lines, "shared weight", "accuracy") for name, lines in panels.items()]
    plotting.panels(plots, path, title="Accuracy over the shared weight")


def _by_place(rows: Rows) -> Iterator[tuple[tuple[str, str], Rows]]:
    places = dict.fromkeys((row["set"], row["subset"]) for row in rows)
    for place in places:
        yield place, [row for row in rows if (row["set"], row["subset"]) == place]

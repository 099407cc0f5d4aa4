"""What choose reports: the sentence, the table of candidates, accuracy by kind of pair, the rounds.

Shapes: M models (candidates first, then models that are only shown), P pairs, X measured values, S subsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moemerge.artifacts.json_file import read_object
from moemerge.fitting.choice import Choice, Judged, choose_in_parts
from moemerge.options.choose import Choose
from moemerge.reports import plotting
from moemerge.reports.statistics import (
    Floats,
    bootstrap_means,
    cluster_sums,
    no_difference,
    percentile_interval,
    sampling_units,
    wilson,
)
from moemerge.reports.table import Interval, Table, percent, with_interval

PICTURE = "accuracy.png"


def candidate_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Each model on all pairs: accuracy, and its lead over the simplest, with intervals; calibrated loss."""
    for name, numbers in read_object(folder / "choice.json")["models"].items():
        row = {"model": name, "rank": numbers["rank"], "loss": numbers["loss"]}
        for measure in ("accuracy", "lead"):
            ends = {f"{measure} {end}": numbers[measure][end] for end in ("low", "high")}
            row |= {measure: numbers[measure]["value"], **ends}
        yield row


@dataclass(frozen=True)
class Shown:
    """All models on all pairs, which of them was taken and how it does on pairs that did not choose it.

    judged: candidates first, as in `candidates`; after them models that could not be taken.
    """

    judged: Judged
    candidates: int
    choice: Choice
    subsets: Sequence[str]
    options: Choose

    @property
    def taken(self) -> str:
        """Name of the candidate taken."""
        return self.judged.names[self.choice.taken]

    @property
    def simplest(self) -> int:
        """The candidate that the choice began with."""
        first = self.choice.rounds[0].taken if self.choice.rounds else self.taken
        return list(self.judged.names).index(first)

    def numbers(self) -> dict[str, Any]:
        """What choice.json holds."""
        rounds = [{"taken": r.taken, "p": r.p} for r in self.choice.rounds]
        models = {name: self._model(number) for number, name in enumerate(self.judged.names)}
        return {
            "taken": self.taken,
            "simplest": self.judged.names[self.simplest],
            "pairs": len(self.judged.prompts_P),
            "prompts": len(np.unique(self.judged.prompts_P)),
            "rounds": rounds,
            "models": models,
            "in_parts": self._in_parts(),
        }

    def _model(self, number: int) -> dict[str, Any]:
        judged, name = self.judged, self.judged.names[number]
        right_P, lead_P = judged.right_CP[number], judged.right_CP[number] - judged.right_CP[self.simplest]
        of = np.array(self.subsets)
        return {
            "rank": self.options.ranks.get(name),
            "note": self.options.notes.get(name, ""),
            "accuracy": self._mean(right_P),
            "loss": float(judged.losses_CP[number].mean()),
            "lead": self._lead(lead_P),
            "by_subset": {subset: self._mean(right_P, of == subset) for subset in sorted({*self.subsets})},
        }

    def _mean(self, values_P: Floats, chosen_P: Any = None) -> dict[str, float]:
        """Mean of some pairs' values with its interval: bootstrap over prompts."""
        chosen_P = np.ones(len(values_P), dtype=bool) if chosen_P is None else chosen_P
        units = sampling_units(self.judged.prompts_P[chosen_P])
        sums = cluster_sums(values_P[chosen_P][:, None], units)
        draws_RX = bootstrap_means(sums, self.options.resamples, self.options.seed)
        low_X, high_X = percentile_interval(draws_RX, self.options.confidence)
        value, same = float(values_P[chosen_P].mean()), not np.ptp(values_P[chosen_P])
        if same and value in (0.0, 1.0):  # resamples cannot differ: prompts count once
            return _ends(value, wilson(value * len(sums), len(sums), self.options.confidence))
        return _ends(value, (float(low_X[0]), float(high_X[0])))

    def _lead(self, lead_P: Floats) -> dict[str, float]:
        """Mean difference with its interval."""
        if lead_P.any():
            return self._mean(lead_P)
        units = len(np.unique(sampling_units(self.judged.prompts_P)))
        return _ends(0.0, no_difference(units, self.options.confidence))

    def _in_parts(self) -> dict[str, Any] | None:
        """The rule on each part by the others alone; None if there is one part only."""
        parts_P = self.judged.parts_P
        if len(np.unique(parts_P)) < 2:
            return None
        candidates = self.judged.first(self.candidates)
        taken_P = choose_in_parts(candidates, self.options.level, self.options.seed)
        right_P = self.judged.right_CP[taken_P, np.arange(len(taken_P))]
        lead_P = right_P - self.judged.right_CP[self.simplest]
        names = {int(part): self.judged.names[taken_P[parts_P == part][0]] for part in np.unique(parts_P)}
        return {"taken": list(names.values()), "accuracy": self._mean(right_P), "lead": self._lead(lead_P)}


def _ends(value: float, interval: Interval) -> dict[str, float]:
    return {"value": value, "low": interval[0], "high": interval[1]}


def sentence(numbers: Mapping[str, Any]) -> str:
    """What to take, and why, in words."""
    taken, simplest = numbers["taken"], numbers["simplest"]
    accuracy = numbers["models"][taken]["accuracy"]["value"]
    if taken != simplest:
        lead, before = numbers["models"][taken]["lead"], numbers["models"][simplest]["accuracy"]["value"]
        return (
            f"Take {taken}: it is right on {accuracy:.1%} of {numbers['pairs']} held-out pairs, and "
            f"{simplest}, the best of the simplest, on {before:.1%}: {points(lead)}."
        )
    if not numbers["rounds"]:
        return f"Take {taken}: it is right on {accuracy:.1%} of {numbers['pairs']} pairs; none is costlier."
    p = numbers["rounds"][0]["p"]
    nearest = min(p, key=p.__getitem__)
    return (
        f"Take {taken}, as it is: it is right on {accuracy:.1%} of {numbers['pairs']} held-out pairs, and no "
        f"costlier candidate is better beyond chance (nearest: {nearest}, p {p[nearest]:.2g})."
    )


def points(lead: Mapping[str, float]) -> str:
    """A difference of accuracies in points, with its interval."""
    value, low, high = (100 * lead[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def in_parts_sentence(numbers: Mapping[str, Any]) -> str:
    """How the rule does where it has not looked; empty for one part."""
    parts = numbers["in_parts"]
    if parts is None:
        return ""
    taken = parts["taken"]
    often = ", ".join(f"{name} on {taken.count(name)}" for name in dict.fromkeys(taken))
    return (
        f"The rule alone, on each part by the other parts: {parts['accuracy']['value']:.1%}, "
        f"{points(parts['lead'])} against {numbers['simplest']}. Of {len(taken)} parts it took {often}. This "
        "number has not been chosen for being high; that of the candidate taken has, where there are several."
    )


def tables(numbers: Mapping[str, Any], confidence: float) -> list[Table]:
    """Candidates; accuracy by kind where there are several; the rounds."""
    models = numbers["models"]
    rows = [_row(name, model, numbers) for name, model in models.items()]
    header = ["model", "made", "accuracy", f"minus {numbers['simplest']}", "loss"]
    note = (
        f"On pairs that a model was not made from; {percent(confidence)} intervals, bootstrap over prompts. "
        "loss: Bradley-Terry, in nats, after the best factor on a model's scores. (shown): cannot be taken."
    )
    return [Table("Candidates", header, rows, note), *_by_subset(models), *_rounds(numbers["rounds"])]


def _row(name: str, model: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[str]:
    mark = " (taken)" if name == numbers["taken"] else " (shown)" if model["rank"] is None else ""
    accuracy = _cell(model["accuracy"], ".3f")
    lead = "" if name == numbers["simplest"] else _cell(model["lead"], "+.3f")
    return [name + mark, model["note"], accuracy, lead, f"{model['loss']:.4f}"]


def _cell(value: Mapping[str, float], form: str) -> str:
    return with_interval(value["value"], (value["low"], value["high"]), form)


def _by_subset(models: Mapping[str, Any]) -> list[Table]:
    subsets = list(next(iter(models.values()))["by_subset"])
    if len(subsets) < 2:
        return []
    rows = [[name, *(_cell(m["by_subset"][s], ".3f") for s in subsets)] for name, m in models.items()]
    return [Table("Accuracy by kind of pair", ["model", *(s or "none" for s in subsets)], rows)]


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> list[Table]:
    rows = [
        [str(number), r["taken"], name, f"{p:.2g}"]
        for number, r in enumerate(rounds, 1)
        for name, p in r["p"].items()
    ]
    note = "p: chance that the best of so many has such a lead (sign flips of prompts, max-T)."
    return [Table("Comparisons", ["round", "taken so far", "against", "p"], rows, note)] if rows else []


def draw(numbers: Mapping[str, Any], folder: Path) -> None:
    """Accuracy of every model with its interval; the simplest is the reference."""
    ends = {
        name: (model["accuracy"]["value"], model["accuracy"]["low"], model["accuracy"]["high"])
        for name, model in numbers["models"].items()
    }
    plotting.dots({"held-out pairs": ends}, folder / PICTURE, "accuracy", numbers["simplest"])

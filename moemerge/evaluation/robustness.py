"""Attacks on several models, compared on the same pairs: whose right verdicts hold.

A model that ranks few pairs correctly leaves little to attack, so that the share of attacks that succeed does
not compare models. Robust accuracy does: the share of all pairs that are ranked correctly, and still are
after the attack (robust accuracy of Madry et al., arXiv 1706.06083, for this search).

Shapes: M models, P pairs, X measured values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moemerge.reports.statistics import (
    Floats,
    Integers,
    bootstrap_means,
    cluster_sums,
    lead_interval,
    sampling_units,
    share_interval,
)
from moemerge.reports.table import Table, percent, with_interval

Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class Attacked:
    """What an attack did to each model's verdicts on the same pairs.

    right_MP: whether a model puts the chosen answer first; held_MP: and still does after the attack.
    prompts_P: numbers that pairs of one prompt share.
    """

    names: Sequence[str]
    right_MP: Booleans
    held_MP: Booleans
    prompts_P: Integers

    def numbers(self, baseline: str, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
        """Per model: accuracy, robust accuracy, share overturned, with intervals, and minus each other model.

        A share overturned is of the pairs that were ranked correctly; its difference is of those that both
        models ranked correctly. The words compare with `baseline`.
        """
        measure = _Measure(self.prompts_P, resamples, confidence, seed)
        models = {name: self._model(number, measure) for number, name in enumerate(self.names)}
        shape = {"pairs": len(self.prompts_P), "prompts": len(np.unique(self.prompts_P))}
        return {"baseline": baseline, **shape, "confidence": confidence, "models": models}

    def _model(self, number: int, measure: _Measure) -> dict[str, Any]:
        right_P, held_P = self.right_MP[number], self.held_MP[number]
        return {
            "accuracy": measure.share(right_P),
            "robust_accuracy": measure.share(held_P),
            "overturned": measure.share(~held_P, right_P),
            "minus": {
                name: self._minus(number, other, measure)
                for other, name in enumerate(self.names)
                if other != number
            },
        }

    def _minus(self, number: int, other: int, measure: _Measure) -> dict[str, Any]:
        (right_P, others_right_P), (held_P, others_held_P) = (
            (values_MP[number], values_MP[other]) for values_MP in (self.right_MP, self.held_MP)
        )
        return {
            "accuracy": measure.difference(right_P, others_right_P),
            "robust_accuracy": measure.difference(held_P, others_held_P),
            "overturned": measure.difference(~held_P, ~others_held_P, right_P & others_right_P),
        }


@dataclass(frozen=True)
class _Measure:
    prompts_P: Integers
    resamples: int
    confidence: float
    seed: int

    def share(self, values_P: Booleans, of_P: Booleans | None = None) -> dict[str, Any] | None:
        """The share of pairs, or of those `of_P`, with its interval; None of no pairs."""
        kept_P = np.ones_like(values_P) if of_P is None else of_P
        if not kept_P.any():
            return None
        right_P, units_P = values_P[kept_P].astype(np.float64), sampling_units(self.prompts_P[kept_P])
        draws_R = self._draws(right_P, units_P)[:, 0]
        low, high = share_interval(right_P, draws_R, len(np.unique(units_P)), self.confidence)
        return {"value": float(right_P.mean()), "low": low, "high": high, "pairs": len(right_P)}

    def difference(
        self, values_P: Booleans, others_P: Booleans, of_P: Booleans | None = None
    ) -> dict[str, Any] | None:
        """Mean paired difference, with a bootstrap interval over prompts; None of no pairs.

        Where no prompt differs resamples cannot: the interval is `no_difference`.
        """
        kept_P = np.ones_like(values_P) if of_P is None else of_P
        if not kept_P.any():
            return None
        lead_P = values_P[kept_P].astype(np.float64) - others_P[kept_P]
        units_P = sampling_units(self.prompts_P[kept_P])
        draws_R, units = self._draws(lead_P, units_P)[:, 0], len(np.unique(units_P))
        low, high = lead_interval(draws_R, units, self.confidence)
        return {"value": float(lead_P.mean()), "low": low, "high": high, "pairs": len(lead_P)}

    def _draws(self, values_P: Floats, units_P: Integers) -> Floats:
        return bootstrap_means(cluster_sums(values_P[:, None], units_P), self.resamples, self.seed)


def rows_of(numbers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per model: each share and difference with its interval."""
    for name, model in numbers["models"].items():
        row: dict[str, Any] = {"model": name}
        for measure in ("accuracy", "robust_accuracy", "overturned"):
            lead = _lead(model, measure, numbers["baseline"])
            for prefix, found in (("", model[measure]), ("minus baseline, ", lead)):
                if found is not None:
                    row[f"{prefix}{measure}"] = found["value"]
                    row |= {f"{prefix}{measure} {end}": found[end] for end in ("low", "high")}
        yield row


def tables(numbers: Mapping[str, Any]) -> list[Table]:
    """A line per model; of three models and more each against each."""
    names = list(numbers["models"])
    if len(names) < 3:
        return [_shares(numbers)]
    rows = [
        [name, *(_cell(_lead(model, "robust_accuracy", other), "+.3f") for other in names)]
        for name, model in numbers["models"].items()
    ]
    note = "The model of the row minus that of the column, over the same pairs."
    return [
        _shares(numbers),
        Table("Robust accuracy, pairwise: row minus column", ["", *names], rows, note),
    ]


def _shares(numbers: Mapping[str, Any]) -> Table:
    measures = {"accuracy": "accuracy", "robust_accuracy": "robust accuracy", "overturned": "overturned"}
    base = numbers["baseline"]
    header = ["model", *measures.values(), f"robust accuracy minus {base}", f"overturned minus {base}"]
    rows = [
        [
            name,
            *(_cell(model[measure], ".3f") for measure in measures),
            *(_cell(_lead(model, measure, base), "+.3f") for measure in ("robust_accuracy", "overturned")),
        ]
        for name, model in numbers["models"].items()
    ]
    note = (
        f"{numbers['pairs']} pairs of {numbers['prompts']} prompts; {percent(numbers['confidence'])} "
        "intervals, over prompts. Robust accuracy: pairs ranked correctly, also after the attack. "
        "Overturned: of those ranked correctly; its difference is over the pairs that both models rank "
        "correctly."
    )
    return Table("Attacks on the same pairs", header, rows, note)


def sentence(numbers: Mapping[str, Any]) -> str:
    """Which models hold better or worse than the baseline, in words."""
    said = []
    for name, model in numbers["models"].items():
        lead = _lead(model, "robust_accuracy", numbers["baseline"])
        if lead is None:
            continue
        worse = "holds worse" if lead["high"] < 0 else "shows no difference"
        how = "holds better" if lead["low"] > 0 else worse
        ends = f"{100 * lead['value']:+.1f} points ({100 * lead['low']:+.1f} to {100 * lead['high']:+.1f})"
        said.append(f"{name} {how}: {ends} of robust accuracy")
    return f"Against {numbers['baseline']}: " + "; ".join(said) + "."


def _lead(model: Mapping[str, Any], measure: str, other: str) -> dict[str, Any] | None:
    """The model's difference to `other`; None of itself, and where there are no pairs to compare."""
    found: dict[str, Any] | None = model["minus"].get(other, {}).get(measure)
    return found


def _cell(found: Mapping[str, Any] | None, form: str) -> str:
    return "" if found is None else with_interval(found["value"], (found["low"], found["high"]), form)

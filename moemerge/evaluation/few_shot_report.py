"""What a few-shot scorer came to on held-out pairs, beside its rivals: numbers and a page.

P pairs, A arms (ways to score), R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moemerge.data.pairs import Pair, numbered, prompt_key
from moemerge.evaluation.probes.comparisons import difference
from moemerge.options.few_shot import FewShot
from moemerge.reports import plotting
from moemerge.reports.figures import Figure, Line
from moemerge.reports.html import Section
from moemerge.reports.statistics import (
    Floats,
    bootstrap_means,
    cluster_sums,
    clustered_interval,
)
from moemerge.reports.table import Table, percent, with_interval

ACTIVATION, PROBE, JUDGE = "activation", "probe", "judge"
ARMS = {
    ACTIVATION: "heads replaced by their means over the examples; which ones, learned on the examples",
    PROBE: "ridge regression on the same examples: all heads' activations, nothing replaced",
    JUDGE: "the language model asked without examples",
}
SMOOTHED = 25  # steps over which the losses of the choice are averaged in the figure


def measured(differences: Mapping[str, Floats], pairs: Sequence[Pair], options: FewShot) -> dict[str, Any]:
    """Accuracy of each arm, and how much better the activation scorer is than the others, with intervals.

    differences: score of chosen minus score of rejected, [P]; a tie is an error. Resampled are prompts.
    """
    prompts_P = np.array(numbered(map(prompt_key, pairs)))
    right = {arm: values_P > 0 for arm, values_P in differences.items()}
    arms = {}
    for arm, right_P in right.items():
        low, high = clustered_interval(right_P, prompts_P, options.confidence)
        arms[arm] = {"accuracy": float(right_P.mean()), "low": low, "high": high}
    against = {
        arm: _difference(right[ACTIVATION], right_P, prompts_P, options)
        for arm, right_P in right.items()
        if arm != ACTIVATION
    }
    return {"arms": arms, "activation_minus": against}


def _difference(first_P: Any, second_P: Any, prompts_P: Any, options: FewShot) -> dict[str, float]:
    right_P2 = np.stack([first_P, second_P], axis=1)
    sums_K2 = cluster_sums(right_P2.astype(np.float64), prompts_P)
    draws_R2 = bootstrap_means(sums_K2, options.resamples, options.seed)
    found = difference(right_P2, draws_R2, prompts_P, options.confidence)
    low, high = found["interval"]
    return {"difference": found["difference"], "low": low, "high": high}


def sentence(numbers: Mapping[str, Any]) -> str:
    """The accuracies in one line."""
    told = [
        f"{arm} {with_interval(value['accuracy'], (value['low'], value['high']), '.1%')}"
        for arm, value in numbers["arms"].items()
    ]
    return f"{'; '.join(told)} of {numbers['held_out']} held-out pairs, {numbers['examples']} examples"


def sections(numbers: Mapping[str, Any], options: FewShot, folder: Path) -> list[Section]:
    """The page; draws its figure into `folder`."""
    header = [
        "scorer",
        f"accuracy ({percent(options.confidence)} interval)",
        "activation minus it",
        "what it is",
    ]
    rows = []
    for arm, value in numbers["arms"].items():
        against = numbers["activation_minus"].get(arm)
        less = "" if against is None else _cell(against["difference"], against)
        rows.append([arm, _cell(value["accuracy"], value), less, ARMS[arm]])
    note = f"Ties count as errors. {numbers['held_out']} held-out pairs, {numbers['examples']} examples."
    table = Table("Held-out pairs", header, rows, note)
    heads = Table("Heads replaced", ["layer", "heads"], _by_layer(numbers["heads"]), detail=True)
    figures = [_losses(numbers["losses"], folder)] if len(numbers["losses"]) > 1 else []
    asked = Section("What is asked", [numbers["question"]])
    return [Section("Few-shot scorer", tables=[table], figures=figures, folded=[heads]), asked]


def _cell(value: float, ends: Mapping[str, float]) -> str:
    return with_interval(value, (ends["low"], ends["high"]), ".3f")


def _by_layer(heads: Sequence[Sequence[int]]) -> list[list[str]]:
    layers = sorted({layer for layer, _ in heads})
    return [[str(layer), ", ".join(str(head) for at, head in heads if at == layer)] for layer in layers]


def _losses(losses_S: Sequence[float], folder: Path) -> Figure:
    width = min(SMOOTHED, len(losses_S))
    smooth = np.convolve(losses_S, np.ones(width) / width, mode="valid").tolist()
    line = Line(list(range(width, len(losses_S) + 1)), smooth)
    title = f"Loss while heads were chosen, mean of {width} steps"
    plotting.lines({"loss": line}, folder / "choice.png", title, "step", "loss of the right verdict (nats)")
    return Figure.load(folder / "choice.png")

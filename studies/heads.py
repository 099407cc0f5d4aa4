"""Heads: are factors that cannot be negative worth anything, or is it the layers, or the noise?

python studies/heads.py MODELS DATA --seeds 1 2 3 --output runs/heads [--settings ukp-30]

MODELS, DATA and settings are those of noisy_labels.py: a model whose last two layers train, pairs a share of
whose labels is flipped, in training and held-out pairs alike; test pairs keep theirs. Every arm draws a new
head from one seed and has the same search: three rates of the head, of which held-out accuracy chooses, as it
does the step. What is on record in rows/heads.jsonl is not made again. One thread.

    linear             the stock head
    mlp, mlp-dropout   two layers and signed weights; with dropout 0.3 of the state in place of 0.1
    noise              the same with Weibull noise on factors and weights
    positive           weights that cannot be negative, without noise
    nonnegative        both, under the prior: BNRM
    paper              the same with half the weights dead from the start, as in BNRM's code

Then each arm but the first is written as a stock model (export --form linear); what that loses is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from common import Measures, accuracy, interval, once, options_of, print_tables, recorded
from noisy_labels import SETTINGS as DEALT
from noisy_labels import Seed, Setting, noisy_pairs, opened_seed, read_lines
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from moemerge.artifacts.manifest import read_manifest
from moemerge.stages.evaluate import evaluate
from moemerge.stages.export import export

Options = dict[str, Any]

ROWS = Path(__file__).parent / "rows" / "heads.jsonl"
RATES = [3e-4, 1e-3, 3e-3]
EPOCHS = 4
ARMS: dict[str, Options] = {
    "linear": {"head": "linear"},
    "mlp": {"head": "mlp"},
    "mlp-dropout": {"head": "mlp", "head_dropout": 0.3},
    "noise": {"head": "mlp", "head_noise": True},
    "positive": {"head": "nonnegative", "head_noise": False},
    "nonnegative": {"head": "nonnegative"},
    "paper": {"head": "nonnegative", "head_start": "uniform"},
}
RIVALS = ("linear", "mlp", "noise")
SETTINGS: dict[str, Setting] = {
    name: replace(DEALT[name], epochs=EPOCHS) for name in ("ukp-0", "ukp-30", "hh-30")
}


def measured(seed: Seed) -> dict[str, Measures]:
    """What each arm is worth on test pairs, whose labels are as people gave them."""
    search = {"head_learning_rate": RATES}
    models = {
        name: seed.trained(name, seed.files["train"], search=search, **arm) for name, arm in ARMS.items()
    }
    once(
        seed.home / "evaluation", evaluate, models=models, pairs={"test": seed.files["test"]},
        baseline="linear", seed=seed.seed, resamples=100, probes=["accuracy"], **seed.text,
    )  # fmt: skip
    tensors = load_file(seed.home / "evaluation" / "scores.safetensors")
    rows, lines = tensors["pairs/test/rows"], read_lines(seed.files["test"])
    sides = np.resize(["chosen", "rejected"], len(rows))
    lengths = [len(lines[row - 1][side]) for row, side in zip(rows, sides, strict=True)]
    found = {name: of_scores(tensors[f"pairs/test/model/{name}"], lengths) for name in models}
    for name in list(models)[1:]:
        found[name] |= as_linear(seed, name, models[name])
    return found


def of_scores(scores: Any, lengths: list[int]) -> Measures:
    """Accuracy; Bradley-Terry loss; Spearman's correlation of scores with lengths of answers."""
    difference_P = scores[0::2].astype(np.float64) - scores[1::2]
    return {
        "accuracy": accuracy(scores),
        "loss": float(np.logaddexp(0, -difference_P).mean()),
        "length": float(spearmanr(scores, lengths).statistic),
    }


def as_linear(seed: Seed, name: str, model: str) -> Measures:
    """What a stock head fitted to the model's own loses, on a fifth of the training texts' prompts.

    Of UKP's few prompts that is other debates.
    """
    given = {"form": "linear", "pairs": seed.files["train"], "least_agreement": 0.0, "seed": seed.seed}
    folder = once(seed.home / f"{name}-stock", export, model=model, **given, **seed.text)
    numbers = read_manifest(Path(folder))["results"]
    lost = numbers["accuracy"]["after"] - numbers["accuracy"]["before"]
    return {"agreement": numbers["agreement"], "accuracy as linear": lost}


def of_seed(name: str, number: int, arguments: argparse.Namespace) -> dict[str, Measures]:
    """The measures of a setting and seed: those on record, or new ones."""

    def measure() -> dict[str, Measures]:
        setting, home = SETTINGS[name], arguments.output / name / f"seed-{number}"
        pairs = noisy_pairs(setting, arguments.data, number)
        with opened_seed(arguments, home, setting, pairs, number) as seed:
            return measured(seed)

    return recorded(ROWS, name, number, measure)


def table(name: str, seeds: Mapping[int, Mapping[str, Measures]], confidence: float) -> str:
    """Means over seeds, paired differences of accuracy to the rivals, and what a linear head loses."""
    first = next(iter(seeds.values()))
    lines = [f"### {name}: seeds {', '.join(map(str, seeds))}", ""]
    shown = ("accuracy", "loss", "length", "agreement")
    lines += [f"| head | {' | '.join(shown)} | " + " | ".join(f"minus {rival}" for rival in RIVALS) + " |"]
    lines.append("| --- |" + " ---: |" * (len(shown) + len(RIVALS)))
    for arm in first:
        means = (fmean(of[arm].get(measure, np.nan) for of in seeds.values()) for measure in shown)
        gains = ([of[arm]["accuracy"] - of[rival]["accuracy"] for of in seeds.values()] for rival in RIVALS)
        cells = [*(f"{mean:.3f}" for mean in means), *(interval(gain, confidence) for gain in gains)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run every setting of every seed, and print a table per setting."""
    options = options_of(__doc__.splitlines()[0], Path("runs/heads"), SETTINGS, "models", "data")
    print_tables(options, of_seed, table)


if __name__ == "__main__":
    main()

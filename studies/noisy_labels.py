"""Labels that lie: what a vote on them, and what a loss, is worth, against plain training tuned alike.

python studies/noisy_labels.py MODELS DATA --seeds 1 2 3 --output runs/noisy_labels [--settings ukp-30]

MODELS: folder written by fetch_models.py; DATA: folder with ukp_convarg and hh_rlhf. A setting is a model,
whose last two layers train (the others are computed once per text, frozen_layers.py), and pairs a share of
whose labels is flipped, in training and held-out pairs alike; test pairs keep theirs. All models begin with
one fresh head and keep the weights of the epoch with the highest held-out accuracy. What is on record in
rows/noisy_labels.jsonl is not made again. One thread.

    plain              Bradley-Terry
    searched           three learning rates, of which held-out accuracy chooses
    decay              weight decay, three strengths, likewise
    smoothing          label_smoothing 0.1
    margin             margin: column, the strength of the label by the vote
    flip, drop         the weakest fifth by the vote
    auto, soft         `treat` of strength, told the share of flips (told 5 % where there are none)
    warm, ensemble     plain in as many orders as a vote and a training cost together: averaged, combined
    policy, language   HAF-RM's and GRM's term beside Bradley-Terry

The vote: five folds, a voter each, none of which has seen a debate (HH: a prompt) that it scores.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from common import (
    Measures,
    Row,
    accuracy,
    flipped,
    interval,
    once,
    options_of,
    print_tables,
    read,
    recorded,
    write_sets,
)
from frozen_layers import LowerLayers, install, upper_layers
from kinds import remove_models
from real_data import halves, longest, shuffled
from safetensors.numpy import load_file
from scipy.stats import rankdata
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moemerge.stages.evaluate import evaluate
from moemerge.stages.merge import merge_models
from moemerge.stages.strength import strength, vote_rows
from moemerge.stages.train import train

Options = dict[str, Any]
Pairs = dict[str, list[Row]]

ROWS = Path(__file__).parent / "rows" / "noisy_labels.jsonl"
UPPER, FOLDS, SHARE = 2, 5, 0.2
TRAINING: Options = {
    "batch_size": 16, "eval_steps": 30, "learning_rate": 3e-4, "choose_by": "accuracy",
    "patience": None, "group_by_length": True, "bad_rows": "skip",
}  # fmt: skip
# What a training has that plain one has not; those of VOTED are trained on the vote's output.
LOSSES: dict[str, Options] = {
    "plain": {},
    "searched": {"search": {"learning_rate": [1e-4, 3e-4, 1e-3]}},
    "decay": {"search": {"weight_decay": [1.0, 10.0, 100.0]}},
    "smoothing": {"label_smoothing": 0.1},
    "policy": {"objectives": {"bradley_terry": 1.0, "policy": 0.2}},
    "language": {"objectives": {"bradley_terry": 1.0, "language": 0.1}},
}
VOTED: dict[str, tuple[Options, Options]] = {
    "margin": ({}, {"margin": "column"}),
    "flip": ({"treat": "flip", "share": SHARE}, {}),
    "drop": ({"treat": "drop", "share": SHARE}, {}),
    "auto": ({"treat": "auto"}, {}),
    "soft": ({"treat": "soft"}, {"label_smoothing": "column"}),
}
VOTE = "vote"
RIVALS = ("plain", "searched", "warm")


@dataclass(frozen=True)
class Setting:
    """A model, how a seed deals pairs (train, held, test), the share of flips, and the losses compared."""

    model: str
    deal: Callable[[Path, random.Random], Pairs]
    noise: float
    losses: tuple[str, ...]
    max_length: int
    epochs: int
    fold_by: str


def deal_ukp(data: Path, draw: random.Random) -> Pairs:
    """Of sixteen debates four are for the test, three held out; no debate has two uses."""
    rows = [
        {**row, "prompt": row["prompt"] + "\n", "subset": row["subset"].split("_")[0]}
        for row in read(data / "ukp_convarg/pairs.jsonl.gz")
    ]
    debates = shuffled(sorted({row["subset"] for row in rows}), draw)
    uses = {"test": (debates[:4], 400), "held": (debates[4:7], 160), "train": (debates[7:], 480)}
    rows = shuffled(rows, draw)
    return {
        use: [row for row in rows if row["subset"] in chosen][:size] for use, (chosen, size) in uses.items()
    }


def deal_helpful(data: Path, draw: random.Random) -> Pairs:
    """Helpful pairs of HH-RLHF, split by first turn as the data come."""
    parts = {use: read(data / f"hh_rlhf/{file}.jsonl.gz") for use, file in HH_FILES.items()}
    return {use: short(rows, draw)[: HH_SIZES[use]] for use, rows in parts.items()}


def short(rows: list[Row], draw: random.Random) -> list[Row]:
    """The helpful rows that hardly exceed 128 tokens, shuffled."""
    return [row for row in halves(rows, draw)[0] if longest(row) < 520]


HH_FILES = {"train": "train", "held": "val", "test": "test"}
HH_SIZES = {"train": 400, "held": 100, "test": 300}
UKP_LOSSES = ("plain", "searched", "smoothing")
HH_LOSSES = (*UKP_LOSSES, "decay", "policy", "language")
SETTINGS = {
    **{f"ukp-{p}": Setting("minilm", deal_ukp, p / 100, UKP_LOSSES, 128, 2, "subset") for p in (0, 20, 30)},
    **{f"hh-{p}": Setting("smollm2", deal_helpful, p / 100, HH_LOSSES, 128, 1, "prompt") for p in (0, 30)},
}


def headed(upper: Path, seed: int, output: Path) -> str:
    """The upper layers with the fresh head that all models of the seed begin with."""
    if not output.exists():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(upper, num_labels=1)
        model.config.pad_token_id = AutoTokenizer.from_pretrained(upper).pad_token_id
        model.save_pretrained(output)
        AutoTokenizer.from_pretrained(upper).save_pretrained(output)
    return str(output)


@dataclass(frozen=True)
class Seed:
    """The pairs of a setting and seed, as files, and the model that all trainings begin with."""

    home: Path
    setting: Setting
    start: str
    files: Mapping[str, str]
    seed: int

    @property
    def text(self) -> Options:
        """How texts are read."""
        return {"max_length": self.setting.max_length, "bad_rows": "skip"}

    def trained(self, name: str, pairs: str, **options: Any) -> str:
        """A model trained on `pairs`."""
        given = {**TRAINING, "epochs": self.setting.epochs, **self.text, "seed": self.seed, **options}
        files = {"model": self.start, "pairs": pairs, "validation": self.files["held"]}
        return once(self.home / name, train, **files | given)

    def treated(self, name: str, **treatment: Any) -> str:
        """The training pairs as the vote treats them; the vote itself for `VOTE`."""
        given = {"noise": self.setting.noise or 0.05, "seed": self.seed, **self.text, **treatment}
        if name == VOTE:
            voting = {"folds": FOLDS, "orders": 1, "fold_by": self.setting.fold_by, "planted": 0}
            given |= {**TRAINING, "epochs": self.setting.epochs, "model": self.start, **voting}
            given["validation"] = self.files["held"]
        else:
            given["votes"] = str(self.home / VOTE)
        return once(self.home / name, strength, pairs=self.files["train"], **given) + "/pairs.jsonl.gz"


def models_of(seed: Seed) -> Iterator[tuple[str, str]]:
    """Every model of one cost, by name, and the orders that are averaged."""
    pairs = seed.files["train"]
    for name in seed.setting.losses:
        yield name, seed.trained(name, pairs, **LOSSES[name])
    seed.treated(VOTE)
    for name, (treatment, options) in VOTED.items():
        treated = seed.treated(f"pairs-{name}", **treatment)
        yield name, seed.trained(name, treated, **options)
    orders = {
        f"order-{n}": seed.trained(f"order-{n}", pairs, seed=seed.seed + 1000 * n) for n in range(1, FOLDS)
    }
    yield from orders.items()
    averaged = [str(seed.home / "plain"), *orders.values()]
    yield "warm", once(seed.home / "warm", merge_models, models=averaged)


def measured(seed: Seed) -> dict[str, Measures]:
    """Accuracy on test pairs, whose labels are as people gave them; and how good the vote is."""
    models = dict(models_of(seed))
    ensemble = ["plain", *(name for name in models if name.startswith("order-"))]
    once(
        seed.home / "evaluation", evaluate, models=models, pairs={"test": seed.files["test"]},
        ensembles={"ensemble": ensemble}, ensemble_by=["mean"], baseline="plain", seed=seed.seed,
        resamples=100, probes=["accuracy"], **seed.text,
    )  # fmt: skip
    scores = load_file(seed.home / "evaluation" / "scores.safetensors")
    shown = [*(name for name in models if name not in ensemble[1:]), "ensemble-mean"]
    found = {name: {"accuracy": accuracy(scores[f"pairs/test/model/{name}"])} for name in shown}
    return found | {VOTE: vote_measures(seed)}


def vote_measures(seed: Seed) -> Measures:
    """The vote held against the flips, which it does not know.

    right: share of pairs in which it agrees with people. found: area under the ROC curve of finding flips by
    weakness. noise after NAME: share of wrong labels that is left.
    """
    wrong = [row["flipped"] for row in read_lines(seed.files["train"])]
    said = vote_rows(seed.home / VOTE)
    wrong_P = np.array([wrong[row["row"] - 1] for row in said])
    weak_P = -np.array([row["strength"] for row in said])
    found = {"right": float(((weak_P > 0) == wrong_P).mean())}
    if wrong_P.any():
        places = rankdata(weak_P)[wrong_P]
        found["found"] = float((places.mean() - (wrong_P.sum() + 1) / 2) / (~wrong_P).sum())
    for name in ("flip", "drop", "auto"):
        rows = vote_rows(seed.home / f"pairs-{name}")
        kept = [
            (row["treatment"] == "flipped") != wrong[row["row"] - 1]
            for row in rows
            if row["treatment"] != "dropped"
        ]
        found[f"noise after {name}"] = fmean(kept)
    return found


def read_lines(path: str) -> list[Row]:
    """Rows of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def of_seed(name: str, number: int, arguments: argparse.Namespace) -> dict[str, Measures]:
    """The measures of a setting and seed: those on record, or new ones."""

    def measure() -> dict[str, Measures]:
        setting, home = SETTINGS[name], arguments.output / name / f"seed-{number}"
        pairs = noisy_pairs(setting, arguments.data, number)
        with opened_seed(arguments, home, setting, pairs, number) as seed:
            return measured(seed)

    return recorded(ROWS, name, number, measure)


def noisy_pairs(setting: Setting, data: Path, number: int) -> Pairs:
    """A seed's pairs, some of them flipped, but for those of the test."""
    draw = random.Random(number)
    dealt = setting.deal(data, draw)
    return {use: told(rows, setting.noise if use != "test" else 0.0, draw) for use, rows in dealt.items()}


@contextmanager
def opened_seed(
    arguments: argparse.Namespace,
    home: Path,
    setting: Setting,
    dealt: Pairs,
    number: int,
    pooled_only: bool = True,
) -> Iterator[Seed]:
    """A seed whose model's lower layers are computed once per text; its models are removed once measured."""
    files = write_sets(home, {"pairs": dealt})["pairs"]
    whole, upper = arguments.models / setting.model, arguments.output / f"{setting.model}-upper"
    if not upper.exists():
        upper_layers(whole, UPPER, upper)
    start = headed(upper, number, home / "start")
    with install(LowerLayers(whole, UPPER), pooled_only):
        yield Seed(home, setting, start, files, number)
    remove_models(home)


def told(rows: Sequence[Row], noise: float, draw: random.Random) -> list[Row]:
    """The rows with a share `noise` flipped, each saying in `flipped` whether it is."""
    return [
        {**new, "flipped": new is not old} for old, new in zip(rows, flipped(rows, noise, draw), strict=True)
    ]


def table(name: str, seeds: Mapping[int, Mapping[str, Measures]], confidence: float) -> str:
    """Mean accuracies over seeds and paired differences to the rivals; and what the vote found."""
    first = next(iter(seeds.values()))
    lines = [f"### {name}: seeds {', '.join(map(str, seeds))}", ""]
    lines += ["| model | accuracy | " + " | ".join(f"minus {rival}" for rival in RIVALS) + " |"]
    lines.append("| --- |" + " ---: |" * (1 + len(RIVALS)))
    for model in (model for model in first if model != VOTE):
        of = [measures[model]["accuracy"] for measures in seeds.values()]
        gains = (
            [a - m[rival]["accuracy"] for a, m in zip(of, seeds.values(), strict=True)] for rival in RIVALS
        )
        cells = [f"{fmean(of):.3f}", *(interval(gain, confidence) for gain in gains)]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    vote = {key: fmean(of[VOTE][key] for of in seeds.values()) for key in first[VOTE]}
    return "\n".join([*lines, "", "vote: " + ", ".join(f"{k} {v:.3f}" for k, v in vote.items()), ""])


def main() -> None:
    """Run every setting of every seed, and print a table per setting."""
    options = options_of(__doc__.splitlines()[0], Path("runs/noisy_labels"), SETTINGS, "models", "data")
    print_tables(options, of_seed, table)


if __name__ == "__main__":
    main()

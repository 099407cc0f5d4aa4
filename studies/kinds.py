"""Members that know different things, merged on one scale, against rivals without their data, over seeds.

python studies/kinds.py MODELS DATA --seeds 1 2 3 --output runs/kinds [--settings apart noisy]

MODELS: folder written by fetch_models.py; all start from the encoder in it, which has no reward head.
DATA: folder with ukp_convarg. Three kinds of pairs on the same debates: `argued` (which argument people find
more convincing), `foreign` (an argument of the debate against one of another debate) and `shuffled` (an
argument against its own words in another order). A seed draws pairs and the debates held out: members are
trained on some, the user's few labelled pairs and the test pairs come from others. Setting "noisy": 30 % of
the labels of `argued` flipped. Measured: accuracy on each kind, and their mean. What exists under the output
folder is not made again. One thread; a quarter of an hour per seed.

    argued, foreign, shuffled   members, a kind each
    best member (tuned)         the most accurate on the own pairs (once tuned: on the half not tuned on)
    uniform, simplex            average; average with weights fitted to the own pairs, as `fit` without base
    sum, fitted                 changes added, 2/3 each, heads on one scale; fitted to the own pairs
    ... tuned                   trained on the own pairs for an epoch
    ensemble-mean               mean of the members' scores on one scale: three times the cost
    joint                       one model trained on all members' pairs, which the user does not have
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from common import Measures, Row, done, interval, once, options_of, read, write_sets
from safetensors.numpy import load_file

from moemerge.stages.calibrate import calibrate
from moemerge.stages.evaluate import evaluate
from moemerge.stages.fit import fit_models
from moemerge.stages.merge import merge_models
from moemerge.stages.train import train

KINDS = ("argued", "foreign", "shuffled")
SIZES = {"train": 400, "own": 50, "test": 150}
NOISE = {"apart": 0.0, "noisy": 0.3}
TRAINING: dict[str, Any] = {
    "batch_size": 16, "max_length": 128, "bad_rows": "skip", "group_by_length": True, "patience": None,
    "train_layers": "last:3", "learning_rate": 2e-4,
}  # fmt: skip
GIVEN: dict[str, Any] = {"max_length": 128, "bad_rows": "skip", "resamples": 100}
RIVALS = ("best member", "best member tuned", "uniform", "uniform tuned", "simplex", "simplex tuned")


def pairs_of(kind: str, rows: Sequence[Row], others: Sequence[Row], draw: random.Random) -> list[Row]:
    """The rows as pairs of a kind; `others` are rows of other debates."""
    made = []
    for row in rows:
        prompt, chosen, rejected = row["prompt"] + "\n", row["chosen"], row["rejected"]
        if kind == "foreign":
            rejected = draw.choice(others)["chosen"]
        elif kind == "shuffled":
            words = chosen.split()
            draw.shuffle(words)
            rejected = " ".join(words)
        if chosen != rejected:
            made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": kind})
    return made


def deal(data: Path, draw: random.Random) -> dict[str, dict[str, list[Row]]]:
    """Pairs by use and kind; a debate has one use."""
    rows = read(data / "ukp_convarg/pairs.jsonl.gz")
    debates = sorted({row["subset"].split("_")[0] for row in rows})
    draw.shuffle(debates)
    uses = {"test": debates[:4], "own": debates[4:8], "train": debates[8:]}
    dealt: dict[str, dict[str, list[Row]]] = {}
    for use, chosen in uses.items():
        mine = [row for row in rows if row["subset"].split("_")[0] in chosen]
        draw.shuffle(mine)
        size = SIZES[use]
        parts = {kind: mine[number * size : (number + 1) * size] for number, kind in enumerate(KINDS)}
        others = [row for row in rows if row["subset"].split("_")[0] not in chosen]
        dealt[use] = {kind: pairs_of(kind, part, others, draw) for kind, part in parts.items()}
    return dealt


def flipped(rows: Sequence[Row], share: float, draw: random.Random) -> list[Row]:
    """The rows, each with its answers swapped with probability `share`."""
    swap = {True: ("rejected", "chosen"), False: ("chosen", "rejected")}
    sides = [swap[draw.random() < share] for _ in rows]
    return [{**row, "chosen": row[a], "rejected": row[b]} for row, (a, b) in zip(rows, sides, strict=True)]


def files_of(home: Path, data: Path, noise: float, seed: int) -> dict[str, dict[str, str]]:
    """Files of this seed's pairs, by use and kind; `own/all`: all own pairs; `train/all`: the members'."""
    draw = random.Random(seed)
    dealt = deal(data, draw)
    dealt["train"]["argued"] = flipped(dealt["train"]["argued"], noise, draw)
    for use in ("own", "train"):
        rows = [row for kind in KINDS for row in dealt[use][kind]]
        draw.shuffle(rows)
        dealt[use]["all"] = rows
        dealt[use] |= {f"half-{part}": rows[part::2] for part in (0, 1)}
    return write_sets(home, dealt)


def merges(
    home: Path, base: str, members: Mapping[str, str], own: str, seed: int
) -> Iterator[tuple[str, str]]:
    """Every merge of the members."""
    models = list(members.values())
    scales = once(
        home / "scales", calibrate, models=members, pairs=own, seed=seed, max_length=128, bad_rows="skip"
    )
    added = {"base": base, "coordinates": "sum", "calibration": scales}
    fitting = {"pairs": own, "granularity": "global", "max_length": 128, "bad_rows": "skip", "seed": seed}
    yield "uniform", once(home / "uniform", merge_models, models=models)
    yield "sum", once(home / "sum", merge_models, models=models, **added)
    simplex = once(home / "fit-simplex", fit_models, models=models, judge="preferences", **fitting)
    yield "simplex", once(home / "simplex", merge_models, models=models, coefficients=simplex)
    fitted = once(home / "fit-fitted", fit_models, models=models, l2=0.03, level=1.0, **added, **fitting)
    yield "fitted", once(home / "fitted", merge_models, models=models, base=base, coefficients=fitted)


def accuracies(folder: Path, names: Sequence[str]) -> dict[str, Measures]:
    """Accuracy on each kind and their mean, of every model of an evaluation."""
    tensors = load_file(folder / "scores.safetensors")
    found = {}
    for name in names:
        scores = {kind: tensors[f"pairs/{kind}/model/{name}"] for kind in KINDS}
        by_kind = {kind: float((s[0::2] > s[1::2]).mean()) for kind, s in scores.items()}
        found[name] = {**by_kind, "mean": fmean(by_kind.values())}
    return found


def measured(home: Path, arguments: argparse.Namespace, noise: float, seed: int) -> dict[str, Measures]:
    """Make every model of this seed, and measure them."""
    files, base = files_of(home, arguments.data, noise, seed), str(arguments.models / "minilm")
    training = TRAINING | {"seed": seed}
    long = {kind: {"pairs": files["train"][kind], "epochs": 2, **training} for kind in (*KINDS, "all")}
    members = {kind: once(home / kind, train, model=base, **long[kind]) for kind in KINDS}
    joint = once(home / "joint", train, model=base, **long["all"])
    single = members | dict(merges(home, base, members, files["own"]["all"], seed))
    tuned = {
        f"{name} tuned": once(
            home / f"{name}-tuned", train, model=model, pairs=files["own"]["all"], epochs=1, **training
        )
        for name, model in single.items()
    }
    models = single | tuned | {"joint": joint}
    once(
        home / "evaluation", evaluate, models=models, ensembles={"ensemble": list(KINDS)},
        pairs={kind: files["test"][kind] for kind in KINDS}, ensemble_by=["mean"],
        calibration=str(home / "scales"), seed=seed, **GIVEN,
    )  # fmt: skip
    found = accuracies(home / "evaluation", [*models, "ensemble-mean"])
    plain, after = best_members(home, members, files["own"], training)
    return found | {"best member": found[plain], "best member tuned": found[f"{after} tuned"]}


def best_members(
    home: Path, members: Mapping[str, str], own: Mapping[str, str], training: dict[str, Any]
) -> tuple[str, str]:
    """What a user with the own pairs alone would take: the best member, and the one best after tuning."""
    halves = {
        f"{name}-{half}": once(
            home / f"{name}-half-{half}", train, model=model, pairs=own[f"half-{half}"], epochs=1, **training
        )
        for name, model in members.items()
        for half in (0, 1)
    }
    pairs = {f"half-{half}": own[f"half-{half}"] for half in (0, 1)}
    folder = home / "own-evaluation"
    once(folder, evaluate, models={**members, **halves}, pairs=pairs, seed=training["seed"], **GIVEN)
    scores = load_file(folder / "scores.safetensors")

    def right(model: str, half: int) -> float:
        values = scores[f"pairs/half-{half}/model/{model}"]
        return float((values[0::2] > values[1::2]).mean())

    plain = {name: right(name, 0) + right(name, 1) for name in members}
    after = {name: right(f"{name}-0", 1) + right(f"{name}-1", 0) for name in members}
    return max(plain, key=plain.__getitem__), max(after, key=after.__getitem__)


def table(name: str, seeds: Mapping[int, Mapping[str, Measures]], confidence: float) -> str:
    """Means over seeds, and paired differences of sum and fitted, tuned or not, to the rivals."""
    columns = [*KINDS, "mean"]
    lines = [f"### {name}: seeds {', '.join(map(str, seeds))}", "", "| model | " + " | ".join(columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for model in next(iter(seeds.values())):
        means = [fmean(of[model][column] for of in seeds.values()) for column in columns]
        lines.append(f"| {model} | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    lines += ["", f"Mean over kinds, minus; t-intervals of {confidence:.1%} over seeds", ""]
    lines += ["| | " + " | ".join(RIVALS) + " |", "| --- |" + " ---: |" * len(RIVALS)]
    for ours in ("sum", "sum tuned", "fitted", "fitted tuned", "ensemble-mean", "joint"):
        gains = [[of[ours]["mean"] - of[rival]["mean"] for of in seeds.values()] for rival in RIVALS]
        lines.append(f"| {ours} | " + " | ".join(interval(gain, confidence) for gain in gains) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run every seed of every setting, and print a table per setting."""
    parser = options_of(__doc__.splitlines()[0], Path("runs/kinds"), NOISE, "models", "data")
    arguments = parser.parse_args()
    for name in arguments.settings:
        seeds = {}
        for seed in arguments.seeds:
            home = arguments.output / name / f"seed-{seed}"
            seeds[seed] = done(home, partial(measured, home, arguments, NOISE[name], seed))
            print(json.dumps({"setting": name, "seed": seed, "measures": seeds[seed]}), flush=True)
        print(table(name, seeds, arguments.confidence), flush=True)


if __name__ == "__main__":
    main()

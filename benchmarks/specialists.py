"""Reward models trained apart and merged with learned coefficients, against joint training, over seeds.

python benchmarks/specialists.py --seeds 0 1 2 --output runs/specialists [--settings NAME ...]

Every setting of SETTINGS splits training pairs of the synthetic world into two parts, each labelled by a
rater of its own; all models start from one base. Validation pairs, fitting pairs and tests follow the world's
gold reward. Each budget is spent twice, once per MLP learning rate, and the validation loss chooses rate and
step. What exists under the output folder is not made again. One thread; about three minutes per seed and
setting.

    joint             trained on both parts and the fitting pairs
    joint, tuned      joint, trained on with the fitting pairs
    specialist A, B   trained on one part each
    chosen specialist the one of A and B that is right on more validation pairs
    ensemble          mean of A's and B's scores
    uniform           A and B averaged
    learned           A and B averaged by coefficients fitted on the fitting pairs, judged on validation pairs
    learned + base    the same with the base as third member, its weight learned too
    warm              average of two joint models of half the epochs each

All but "joint, tuned" (a tenth more) and "learned" (fitting 2 or 6 coefficients) cost the same training.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

import numpy as np
from safetensors.numpy import load_file
from scipy.stats import t

from moemerge import evaluate, fit_models, merge_models, train, write_world
from moemerge.synthetic import WORTH, Worth, gold_reward

Row: TypeAlias = dict[str, Any]
Measures: TypeAlias = dict[str, float]

ONE = {"threads": 1, "device": "cpu"}
BATCH = {"batch_size": 32, "max_length": 64}
RATES = {"learning_rate": 5e-4, "search": {"expert_learning_rate": [5e-4, 5e-3]}}
GENTLE = {"learning_rate": 1e-4, "search": {"expert_learning_rate": [1e-4, 1e-3]}, "patience": None}
FIT = {"evals_per_epoch": 2}
FIRST_REGIMES = ("explain", "plan")
MEASURES = ("accuracy", "accuracy, shifted", "gold of best of 256")


@dataclass(frozen=True)
class Setting:
    """How pairs are made and labelled: `raters` of part A and part B, and the base's.

    by_prompt: part A has the prompts of two regimes and part B the others, or else each has all prompts.
    """

    raters: tuple[Worth, Worth] = (WORTH, WORTH)
    base_rater: Worth = WORTH
    by_prompt: bool = True
    base_pairs: int = 1600
    base_epochs: float = 1.0
    part_pairs: int = 1500
    fit_pairs: int = 400
    label_noise: float = 0.1
    epochs: float = 2.0


SETTINGS = {
    "opposite cues": Setting(
        raters=(Worth(free_fillers=0, filler_cost=-0.5), Worth(free_fillers=0, filler_cost=0.5))
    ),
    "agree": Setting(),
    "other gold": Setting(raters=(WORTH, Worth(tables_seed=7)), by_prompt=False),
    "few noisy": Setting(
        base_rater=Worth(tables_seed=7),
        by_prompt=False,
        base_pairs=4000,
        base_epochs=2.0,
        part_pairs=300,
        fit_pairs=200,
        label_noise=0.35,
        epochs=6.0,
    ),
}


def once(folder: Path, make: Callable[..., Any], **options: Any) -> str:
    """`folder`, made by `make` unless it exists; stages write whole folders or none."""
    if not folder.exists():
        make(output=folder, **options, **ONE)
    return str(folder)


def world(home: Path, setting: Setting, seed: int) -> Path:
    """The world of this seed, and beside it its pairs dealt out and rated: rated/NAME.jsonl."""
    pairs = setting.base_pairs + setting.fit_pairs + 2 * setting.part_pairs
    sizes = {"train_pairs": pairs, "validation_pairs": 600, "test_pairs": 1000, "prompts": 64}
    once(home / "world", write_world, seed=seed, label_noise=setting.label_noise, **sizes)
    (home / "rated").mkdir(exist_ok=True)
    train, validation = (read(home / f"world/data/{name}.jsonl.gz") for name in ("train", "validation"))
    for name, rows in deal(train, validation, setting).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (home / "rated" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return home / "rated"


def read(path: Path) -> list[Row]:
    """The rows of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def deal(train: list[Row], validation: list[Row], setting: Setting) -> dict[str, list[Row]]:
    """Training and validation pairs by the name of what they are for, each rated by its rater."""
    base, rest = train[: setting.base_pairs], train[setting.base_pairs :]
    fit, rest = rest[: setting.fit_pairs], rest[setting.fit_pairs :]
    (a, b), (a_validation, b_validation) = parts(rest, setting), parts(validation, setting)
    return {
        "base": [rated(row, setting.base_rater) for row in base],
        "fit": fit,
        "a": a,
        "b": b,
        "joint": a + b + fit,
        "a-validation": a_validation,
        "b-validation": b_validation,
        "validation": validation,
    }


def parts(rows: list[Row], setting: Setting) -> tuple[list[Row], list[Row]]:
    """Parts A and B of the rows, rated by their raters."""
    first = [r["subset"] in FIRST_REGIMES if setting.by_prompt else i % 2 == 0 for i, r in enumerate(rows)]
    a = [rated(row, setting.raters[0]) for row, mine in zip(rows, first, strict=True) if mine]
    b = [rated(row, setting.raters[1]) for row, mine in zip(rows, first, strict=True) if not mine]
    return a, b


def rated(row: Row, rater: Worth) -> Row:
    """The row, its answers swapped if `rater` and gold disagree on them; a flipped label stays flipped."""

    def lead(worth: Worth) -> float:
        chosen, rejected = (gold_reward(row["prompt"], row[side], worth) for side in ("chosen", "rejected"))
        return chosen - rejected

    if lead(WORTH) * lead(rater) >= 0:
        return row
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def models(home: Path, setting: Setting, seed: int) -> dict[str, str]:
    """Every model of this seed, by name."""
    rated = world(home, setting, seed)
    common = {"seed": seed, **BATCH}

    def trained(name: str, start: str, pairs: str, held_out: str | None, **options: Any) -> str:
        data = {"pairs": str(rated / f"{pairs}.jsonl")}
        data |= {"validation": str(rated / f"{held_out}.jsonl")} if held_out else {}
        return once(home / name, train, model=start, **data, **(common | options))

    plain = {"learning_rate": 1e-3, "epochs": setting.base_epochs}
    base = trained("base", str(home / "world/model"), "base", None, **plain)
    whole, half = ({**RATES, "epochs": share * setting.epochs} for share in (1, 0.5))
    joint = trained("joint", base, "joint", "validation", **whole)
    a, b = (trained(name, base, name, f"{name}-validation", **whole) for name in ("a", "b"))
    other = [1000 + seed, 2000 + seed]
    warm = [trained(f"warm-{s}", base, "joint", "validation", **half, seed=s) for s in other]
    fitting = {"pairs": rated / "fit.jsonl", "validation": str(rated / "validation.jsonl"), **common}
    learned = once(home / "fit", fit_models, models=[a, b], **FIT, **fitting)
    with_base = once(
        home / "fit-base", fit_models, models=[a, b], base=base, shared_weight="learned", **FIT, **fitting
    )
    return {
        "base": base,
        "joint": joint,
        "joint, tuned": trained("tuned", joint, "fit", "validation", **GENTLE, epochs=2.0),
        "specialist A": a,
        "specialist B": b,
        "uniform": once(home / "uniform", merge_models, models=[a, b]),
        "learned": once(home / "learned", merge_models, models=[a, b], coefficients=learned),
        "learned + base": once(
            home / "learned-base", merge_models, models=[a, b], base=base, coefficients=with_base
        ),
        "warm": once(home / "warm", merge_models, models=warm),
    }


def measured(home: Path, setting: Setting, seed: int) -> dict[str, Measures]:
    """The measures of every model of this seed."""
    found = models(home, setting, seed)
    data = home / "world/data"
    pairs = {name: f"{data}/tests/{name}.jsonl.gz" for name in ("in_distribution", "out_of_distribution")}
    pairs["validation"] = f"{data}/validation.jsonl.gz"
    candidates = {"wide": f"{data}/candidates/wide.jsonl.gz"}
    once(home / "evaluation", evaluate, models=found, pairs=pairs, candidates=candidates, resamples=100)
    tensors = load_file(home / "evaluation/scores.safetensors")
    sets = {key.split("/model/")[0] for key in tensors if "/model/" in key}
    scores = {
        name: {one: tensors[f"{one}/model/{name}"].astype(np.float64) for one in sets} for name in found
    }
    a, b = scores["specialist A"], scores["specialist B"]
    scores["chosen specialist"] = max(a, b, key=lambda of: accuracy(of["pairs/validation"]))
    scores["ensemble"] = {one: (a[one] + b[one]) / 2 for one in sets}
    rows, gold = tensors["candidates/wide/rows"], tensors["candidates/wide/gold"]
    return {name: measures(of, rows, gold) for name, of in scores.items()}


def measures(scores: Mapping[str, Any], rows: Any, gold: Any) -> Measures:
    """Accuracy in and out of distribution, and mean gold of the answers with the highest score."""
    accuracies = [accuracy(scores[f"pairs/{name}"]) for name in ("in_distribution", "out_of_distribution")]
    prompts = [np.flatnonzero(rows == row) for row in np.unique(rows)]
    best = [gold[places[scores["candidates/wide"][places].argmax()]] for places in prompts]
    return dict(zip(MEASURES, (*accuracies, float(np.mean(best))), strict=True))


def accuracy(scores: Any) -> float:
    """Share of pairs whose chosen answer, first of the two, scores higher."""
    return float((scores[0::2] > scores[1::2]).mean())


def table(name: str, seeds: Mapping[int, Mapping[str, Measures]], baseline: str, confidence: float) -> str:
    """Markdown: the mean of each measure over seeds, and the paired difference to the baseline."""
    numbers = ", ".join(map(str, seeds))
    lines = [f"### {name}: seeds {numbers}; t-intervals of {confidence:.1%} over seeds", ""]
    lines += ["| model | " + " | ".join(f"{m} | minus {baseline}" for m in MEASURES) + " |"]
    lines += ["| --- |" + " ---: |" * (2 * len(MEASURES))]
    for model in next(iter(seeds.values())):
        cells = []
        for measure in MEASURES:
            pairs = [(of[model][measure], of[baseline][measure]) for of in seeds.values()]
            cells.append(f"{fmean(value for value, _ in pairs):.3f}")
            cells.append(interval([x - y for x, y in pairs], confidence) if model != baseline else "")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def interval(values: list[float], confidence: float) -> str:
    """Mean with its t-interval."""
    if len(values) < 2:
        return f"{values[0]:+.3f}"
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):+.3f} ± {half:.3f}"


def done(home: Path, setting: Setting, seed: int) -> dict[str, Measures]:
    """The measures of a seed, from measures.json if that is there."""
    path = home / "measures.json"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured(home, setting, seed), indent=1) + "\n", encoding="utf-8")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    """Read the command line, run, and print a table per setting."""
    parser = argparse.ArgumentParser(description="Specialists merged against joint training.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/specialists"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--baseline", default="joint", help="model that the others are compared with")
    parser.add_argument("--confidence", type=float, default=0.95, help="coverage of the intervals")
    given = parser.parse_args()
    for name in given.settings:
        homes = {seed: given.output / name.replace(" ", "-") / f"seed-{seed}" for seed in given.seeds}
        found = {seed: done(home, SETTINGS[name], seed) for seed, home in homes.items()}
        print(table(name, found, given.baseline, given.confidence), flush=True)


if __name__ == "__main__":
    main()

"""Reward models trained apart and merged with learned coefficients, against joint training, over seeds.

python studies/specialists.py --seeds 1 2 3 --output runs/specialists [--settings NAME ...]

Every setting of SETTINGS splits training pairs of the synthetic world into two parts, each labelled by a
rater of its own; all models start from one base. Fitting pairs, validation pairs and tests follow the
world's gold reward. Each budget is spent twice, once per MLP learning rate; the validation loss chooses
rate and step, never in the middle of training. What exists under the output folder is not made again.
One thread; about four minutes per seed and setting.

    joint             trained on both parts, step chosen on both raters' validation pairs
    joint, tuned      joint, trained on with the fitting pairs
    joint, all        trained on both parts and the fitting pairs at once
    specialist A, B   trained on one part each, step chosen on the part's own rater's validation pairs
    chosen specialist the one of A and B that is right on more validation pairs
    ensemble          mean of A's and B's scores
    uniform           A and B averaged
    uniform, tuned    uniform, trained on with the fitting pairs
    learned           A and B averaged by coefficients fitted on the fitting pairs, judged on validation pairs
    learned + base    the same with the base as third member, its weight learned too
    warm              average of two joint models of half the epochs each

joint, warm, ensemble and uniform have seen the same pairs; so have those tuned, "joint, all" and "learned".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import Measures, Row, accuracy, measures, once, read, scored, write

from moemerge.data.world import WORTH, Worth, gold_reward
from moemerge.stages.fit import fit_models
from moemerge.stages.merge import merge_models
from moemerge.stages.synthetic import write_world
from moemerge.stages.train import train

BATCH = {"batch_size": 32, "max_length": 64, "patience": None}
RATES = {"learning_rate": 5e-4, "search": {"expert_learning_rate": [5e-4, 5e-3]}}
GENTLE = {"learning_rate": 1e-4, "search": {"expert_learning_rate": [1e-4, 1e-3]}, "epochs": 2.0}
FIT = {"evals_per_epoch": 2, "max_length": 64}
FIRST_REGIMES = ("explain", "plan")


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


def world(home: Path, setting: Setting, seed: int) -> Path:
    """The world of this seed, and beside it its pairs dealt out and rated: rated/NAME.jsonl."""
    pairs = setting.base_pairs + setting.fit_pairs + 2 * setting.part_pairs
    sizes = {"train_pairs": pairs, "validation_pairs": 600, "test_pairs": 1000, "prompts": 64}
    once(home / "world", write_world, seed=seed, label_noise=setting.label_noise, **sizes)
    train, validation = (read(home / f"world/data/{name}.jsonl.gz") for name in ("train", "validation"))
    return write(home / "rated", deal(train, validation, setting))


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
        "joint": a + b,
        "all": a + b + fit,
        "joint-validation": a_validation + b_validation,
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

    def file(name: str) -> str:
        return str(rated / f"{name}.jsonl")

    def trained(name: str, start: str, pairs: str, held_out: str | None, **options: Any) -> str:
        data = {"pairs": file(pairs), "validation": held_out and file(held_out)}
        return once(home / name, train, model=start, **data, **(BATCH | {"seed": seed} | options))

    plain = {"learning_rate": 1e-3, "epochs": setting.base_epochs}
    base = trained("base", str(home / "world/model"), "base", None, **plain)
    whole, half = ({**RATES, "epochs": share * setting.epochs} for share in (1, 0.5))
    joint = trained("joint", base, "joint", "joint-validation", **whole)
    a, b = (trained(name, base, name, f"{name}-validation", **whole) for name in ("a", "b"))
    other = [1000 + seed, 2000 + seed]
    warm = [trained(f"warm-{s}", base, "joint", "joint-validation", **half, seed=s) for s in other]
    uniform = once(home / "uniform", merge_models, models=[a, b])
    fitting = {"pairs": file("fit"), "validation": file("validation"), "seed": seed, **FIT}
    learned = once(home / "fit", fit_models, models=[a, b], **fitting)
    with_base = once(
        home / "fit-base", fit_models, models=[a, b], base=base, shared_weight="learned", **fitting
    )
    return {
        "base": base,
        "joint": joint,
        "joint, tuned": trained("tuned", joint, "fit", "validation", **GENTLE),
        "joint, all": trained("all", base, "all", "validation", **whole),
        "specialist A": a,
        "specialist B": b,
        "uniform": uniform,
        "uniform, tuned": trained("uniform-tuned", uniform, "fit", "validation", **GENTLE),
        "learned": once(home / "learned", merge_models, models=[a, b], coefficients=learned),
        "learned + base": once(
            home / "learned-base", merge_models, models=[a, b], base=base, coefficients=with_base
        ),
        "warm": once(home / "warm", merge_models, models=warm),
    }


def measured(home: Path, setting: Setting, seed: int) -> dict[str, Measures]:
    """The measures of every model of this seed."""
    scores = scored(home, models(home, setting, seed))
    a, b = scores["specialist A"], scores["specialist B"]
    scores["chosen specialist"] = max(a, b, key=lambda of: accuracy(of["pairs/validation"]))
    mean = {name: (a[name] + b[name]) / 2 for name in a if "/" in name}
    scores["ensemble"] = {**a, **mean}
    return {name: measures(of) for name, of in scores.items()}


if __name__ == "__main__":
    common.run(
        "Specialists merged against joint training.", SETTINGS, measured, Path("runs/specialists"), "joint"
    )

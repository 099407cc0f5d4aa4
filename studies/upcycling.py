"""Upcycled and merged reward models against dense ones of equal budget, with the paper's ablations.

python studies/upcycling.py --seeds 1 2 3 --output runs/upcycling [--settings NAME ...]

The dense model is trained on base pairs first. From it start, on the same training pairs, epochs and two
rates for the MLPs (the validation loss chooses rate and step): dense controls, and mixtures of experts, one
per variant, which are merged. Everything follows the synthetic world's gold reward but for flipped labels
and, where the setting says so, the base's rater. What exists under the output folder is not made again. One
thread; about eight minutes per seed and setting.

    control           the dense model trained on
    control, x3       the same for three times the epochs: about the compute of a MoE with K=5 of N=7
    warm              average of two dense models of half the epochs each, in other orders
    ensemble          mean of these two models' scores
    VARIANT: moe      the mixture itself
    VARIANT: METHOD   its merge; shared weight 0.5 unless it is named
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import Measures, measures, once, read, scored, write
from specialists import rated

from moemerge.data.world import WORTH, Worth
from moemerge.stages.fit import fit
from moemerge.stages.merge import merge, merge_models
from moemerge.stages.route import route
from moemerge.stages.synthetic import write_world
from moemerge.stages.train import train
from moemerge.stages.upcycle import upcycle

BATCH = {"batch_size": 32, "max_length": 64, "patience": None}
RATES = {"learning_rate": 5e-4, "search": {"expert_learning_rate": [5e-4, 5e-3]}}
DEFAULT = "K=5"
SHARDS = {"assign": "shards", "assign_share": 0.7}


@dataclass(frozen=True)
class Setting:
    """How many pairs there are, how many of their labels are flipped, and who rated the base's pairs."""

    base_rater: Worth = WORTH
    base_pairs: int = 4000
    base_epochs: float = 2.0
    train_pairs: int = 600
    fit_pairs: int = 200
    label_noise: float = 0.35
    epochs: float = 6.0


SETTINGS = {
    "few noisy": Setting(base_rater=Worth(tables_seed=7)),
    "many": Setting(
        base_pairs=3200, base_epochs=1.0, train_pairs=5000, fit_pairs=600, label_noise=0.2, epochs=2.0
    ),
}


@dataclass(frozen=True)
class Variant:
    """Options of upcycle and train other than the defaults (N=7, K=5), and how the mixture is merged."""

    upcycle: dict[str, Any]
    train: dict[str, Any]
    merges: dict[str, dict[str, Any]]


UNIFORM = {"uniform": {"method": "uniform"}}
LEARNED = {"learned": {"method": "learned"}}
ALL_MERGES: dict[str, dict[str, Any]] = {
    **UNIFORM,
    "usage": {"method": "usage"},
    **LEARNED,
    "learned, shared learned": {"method": "learned", "shared_weight": "learned_global"},
    **{f"uniform, shared {w}": {"method": "uniform", "shared_weight": w} for w in (0.0, 0.25, 0.75, 1.0)},
}
VARIANTS = {
    DEFAULT: Variant({}, {}, ALL_MERGES),
    **{f"K={k}": Variant({"num_experts_per_tok": k}, {}, UNIFORM) for k in (1, 2, 3, 4)},
    "gate topk": Variant({"gate": "topk"}, {}, UNIFORM),
    "noise": Variant({"expert_noise": 0.1}, {}, UNIFORM),
    "shards": Variant({}, SHARDS, {**UNIFORM, **LEARNED}),
    "shards, dropout": Variant({}, {**SHARDS, "shared_dropout": 0.5}, UNIFORM),
}


def world(home: Path, setting: Setting, seed: int) -> Path:
    """The world of this seed, and beside it base, training and fitting pairs: rated/NAME.jsonl."""
    pairs = setting.base_pairs + setting.fit_pairs + setting.train_pairs
    sizes = {"train_pairs": pairs, "validation_pairs": 600, "test_pairs": 1000, "prompts": 64}
    once(home / "world", write_world, seed=seed, label_noise=setting.label_noise, **sizes)
    rows = read(home / "world/data/train.jsonl.gz")
    base, rest = rows[: setting.base_pairs], rows[setting.base_pairs :]
    dealt = {
        "base": [rated(row, setting.base_rater) for row in base],
        "fit": rest[: setting.fit_pairs],
        "train": rest[setting.fit_pairs :],
        "validation": read(home / "world/data/validation.jsonl.gz"),
    }
    return write(home / "rated", dealt)


def models(home: Path, setting: Setting, seed: int) -> dict[str, str]:
    """Every model of this seed, by name."""
    data = world(home, setting, seed)
    training = {**BATCH, **RATES, "seed": seed, "epochs": setting.epochs}
    training |= {"pairs": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl")}
    plain = {**BATCH, "seed": seed, "learning_rate": 1e-3, "epochs": setting.base_epochs}
    base = once(
        home / "base", train, model=str(home / "world/model"), pairs=str(data / "base.jsonl"), **plain
    )

    def dense(name: str, **options: Any) -> str:
        return once(home / name, train, model=base, **(training | options))

    half = {"epochs": setting.epochs / 2}
    warm = {f"half {i}": dense(f"warm-{i}", **half, seed=1000 * i + seed) for i in (1, 2)}
    return {
        "base": base,
        "control": dense("control"),
        "control, x3": dense("control-x3", epochs=3 * setting.epochs),
        "warm": once(home / "warm", merge_models, models=list(warm.values())),
        **warm,
        **dict(mixtures(home, base, training)),
    }


def mixtures(home: Path, base: str, training: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every variant's mixture and its merges."""
    for name, variant in VARIANTS.items():
        folder = home / name.replace(", ", "-").replace(" ", "-")
        start = once(folder / "upcycle", upcycle, model=base, seed=training["seed"], **variant.upcycle)
        moe = once(folder / "moe", train, model=start, **(training | variant.train))
        yield f"{name}: moe", moe
        text = {"max_length": 64, "seed": training["seed"]}
        routing = once(folder / "routing", route, model=moe, pairs=training["pairs"], **text)
        text |= {"pairs": str(home / "rated/fit.jsonl"), "validation": training["validation"]}
        for way, options in variant.merges.items():
            merged = folder / way.replace(", ", "-").replace(" ", "-")
            coefficients = once(Path(f"{merged}-fit"), fit, model=moe, routing=routing, **options, **text)
            yield f"{name}: {way}", once(merged, merge, model=moe, coefficients=coefficients)


def measured(home: Path, setting: Setting, seed: int) -> dict[str, Measures]:
    """The measures of every model of this seed."""
    scores = scored(home, models(home, setting, seed))
    first, second = scores.pop("half 1"), scores.pop("half 2")
    mean = {name: (first[name] + second[name]) / 2 for name in first if "/" in name}
    scores["ensemble"] = {**first, **mean}
    return {name: measures(of) for name, of in scores.items()}


if __name__ == "__main__":
    common.run(
        "Upcycled and merged against dense of equal budget.",
        SETTINGS,
        measured,
        Path("runs/upcycling"),
        "control",
    )

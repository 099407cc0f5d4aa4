"""Merged reward models against dense ones of equal budget on people's judgements, over seeds.

python studies/real_data.py MODELS DATA --seeds 1 2 3 --output runs/real_data [--settings NAME ...]

MODELS: folder written by fetch_models.py; the encoder in it, 22M parameters, is what everything starts from.
DATA: folder with ukp_convarg, hh_rlhf, tulu_human_eval and summ_human_bon (rows as moemerge reads them).
Every setting of SETTINGS deals pairs; the seed draws them, for ukp also the debates that are held out. Each
training tries the setting's learning rates, and the loss on validation pairs chooses rate and step, never in
the middle of training. What exists under the output folder is not made again. One thread; 15 to 30 minutes
per seed.

    base              the encoder with a reward head, trained on the base's pairs
    control           base, trained on
    warm              average of two dense models of half the epochs each, in other orders
    ensemble          mean of these two models' scores
    moe               mixture made of base, trained as the control is
    moe: METHOD       its merge
    A, B              with parts: the control's pairs dealt to two specialists
    A+B: METHOD       average of A and B, equal or by coefficients fitted on the fitting pairs
    specialists       mean of A's and B's scores
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from common import Row, flipped, once, options_of, read, write_sets

from moemerge.stages.compare import compare
from moemerge.stages.evaluate import evaluate
from moemerge.stages.fit import fit, fit_models
from moemerge.stages.merge import merge, merge_models
from moemerge.stages.route import route
from moemerge.stages.train import train
from moemerge.stages.upcycle import upcycle

T = TypeVar("T")

Options: TypeAlias = dict[str, Any]
Files: TypeAlias = dict[str, str]

MIXTURE: Options = {"num_routed_experts": 4, "num_experts_per_tok": 2, "layers": "last:3"}
MERGES: dict[str, Options] = {"uniform": {}, "usage": {}, "learned": {"max_epochs": 4}}
HELPFUL = ("helpful-base", "helpful-online", "helpful-rejection-sampled")


@dataclass(frozen=True)
class Dealt:
    """Pairs by what they are for, test pairs and candidates by the name of their set."""

    pairs: dict[str, list[Row]]
    tests: dict[str, list[Row]]
    candidates: dict[str, list[Row]]


@dataclass(frozen=True)
class Setting:
    """How data are dealt by a seed, how many of the base's and training labels are flipped, longest text."""

    deal: Callable[[Path, random.Random, int], Dealt]
    max_length: int
    rates: tuple[float, ...] = (1e-4, 2e-4)
    label_noise: float = 0.0
    epochs: float = 1.0
    parts: bool = False
    mixture: bool = True


def deal_ukp(data: Path, draw: random.Random, seed: int) -> Dealt:
    """Debates never straddle a split; seeds 1 to 5 hold out three of the sixteen each, never the same."""
    rows = read(data / "ukp_convarg/pairs.jsonl.gz")
    debates = sorted({row["subset"].split("_")[0] for row in rows})
    random.Random(0).shuffle(debates)
    order = debates[3 * (seed - 1) % 15 :] + debates[: 3 * (seed - 1) % 15]
    test, held_out, rest = (
        shuffled((row for row in rows if row["subset"].split("_")[0] in chosen), draw)
        for chosen in (order[:3], order[3:6], order[6:])
    )
    arguments = read(data / "ukp_convarg/candidates.jsonl.gz")
    candidates = [row for row in arguments if row["subset"].split("_")[0] in order[:3]]
    pairs = {
        "base": rest[:240],
        "train": rest[240:720],
        "validation": held_out[:120],
        "fit": held_out[120:240],
    }
    pairs |= dict(zip("ab", by_debate(pairs["train"], order[6:11]), strict=True))
    return Dealt(pairs, {"other_debates": test[:400]}, {"arguments": candidates})


def by_debate(rows: Iterable[Row], first: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """The rows of the first debates, and those of the others."""
    a, b = ([row for row in rows if (row["subset"].split("_")[0] in first) is side] for side in (True, False))
    return a, b


def deal_hh(data: Path, draw: random.Random, seed: int) -> Dealt:
    """Helpful and harmless pairs in equal numbers, split by first turn as the data come."""
    train, held_out, test = (read(data / f"hh_rlhf/{name}.jsonl.gz") for name in ("train", "val", "test"))
    helpful, harmless = halves(train, draw)
    held_a, held_b = halves(held_out, draw)
    test_a, test_b = halves(test, random.Random(0))
    pairs = {
        "base": mixed(helpful[:100], harmless[:100]),
        "a": helpful[100:320],
        "b": harmless[100:320],
        "train": mixed(helpful[100:320], harmless[100:320]),
        "validation": mixed(held_a[:50], held_b[:50]),
        "fit": mixed(helpful[320:370], harmless[320:370]),
    }
    tulu = shuffled(read(data / "tulu_human_eval/pairs.jsonl.gz"), random.Random(0))
    tests = {"helpful": test_a[:150], "harmless": test_b[:150], "tulu": tulu[:150]}
    topical = read(data / "summ_human_bon/topical_chat_candidates.jsonl.gz")
    return Dealt(pairs, tests, {"topical_chat": topical[:40]})


def shuffled(rows: Iterable[T], draw: random.Random) -> list[T]:
    """The rows in an order of the draw."""
    order = list(rows)
    draw.shuffle(order)
    return order


def halves(rows: Iterable[Row], draw: random.Random) -> tuple[list[Row], list[Row]]:
    """The helpful and the harmless rows that are short enough, shuffled."""
    fitting = [row for row in rows if longest(row) < 700]
    a, b = ([row for row in fitting if (row["subset"] in HELPFUL) is side] for side in (True, False))
    return shuffled(a, draw), shuffled(b, draw)


def longest(row: Row) -> int:
    """Characters of the longer text."""
    return len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))


def mixed(a: Sequence[Row], b: Sequence[Row]) -> list[Row]:
    """Rows of a and b in turn."""
    return [row for both in zip(a, b, strict=True) for row in both]


def dealt(home: Path, data: Path, setting: Setting, seed: int) -> dict[str, Files]:
    """Files of this seed's pairs, tests and candidates, by name."""
    draw = random.Random(seed)
    drawn = setting.deal(data, draw, seed)
    noisy = {
        name: rows if name in ("validation", "fit") else flipped(rows, setting.label_noise, draw)
        for name, rows in drawn.pairs.items()
    }
    return write_sets(home, {"pairs": noisy, "tests": drawn.tests, "candidates": drawn.candidates})


def dense_models(home: Path, base: str, pairs: Files, training: Options) -> Files:
    """The control, two trainings of half its epochs, and their average."""
    half = {"epochs": training["epochs"] / 2}
    orders: dict[str, Options] = {f"warm-{i}": {"seed": 1000 * i + training["seed"], **half} for i in (1, 2)}
    ways: dict[str, Options] = {"control": {}, **orders}
    trained = {
        name: once(home / name, train, model=base, **(training | {"pairs": pairs["train"]} | options))
        for name, options in ways.items()
    }
    return trained | {"warm": once(home / "warm", merge_models, models=[trained[name] for name in orders])}


def mixtures(home: Path, base: str, pairs: Files, training: Options) -> Iterator[tuple[str, str]]:
    """The mixture and its merges."""
    seed = {"seed": training["seed"]}
    start = once(home / "upcycle", upcycle, model=base, **seed, **MIXTURE)
    moe = once(home / "moe", train, model=start, **(training | {"pairs": pairs["train"]}))
    yield "moe", moe
    text = {"max_length": training["max_length"], "bad_rows": "skip", **seed}
    routing = once(home / "routing", route, model=moe, pairs=pairs["train"], max_pairs=200, **text)
    text |= {"pairs": pairs["fit"], "validation": pairs["validation"], "sensitivity": False}
    for method, options in MERGES.items():
        coefficients = once(
            home / f"fit-{method}", fit, model=moe, method=method, routing=routing, **options, **text
        )
        yield f"moe: {method}", once(home / f"merge-{method}", merge, model=moe, coefficients=coefficients)


def specialists(home: Path, base: str, pairs: Files, training: Options) -> Iterator[tuple[str, str]]:
    """A and B, and their averages."""
    both = [
        once(home / part, train, model=base, **(training | {"pairs": pairs[part]})) for part in ("a", "b")
    ]
    yield from zip("AB", both, strict=True)
    yield "A+B: uniform", once(home / "both-uniform", merge_models, models=both)
    text = {"max_length": training["max_length"], "bad_rows": "skip", "seed": training["seed"]}
    text |= {"pairs": pairs["fit"], "validation": pairs["validation"], "sensitivity": False}
    coefficients = once(home / "both-fit", fit_models, models=both, **MERGES["learned"], **text)
    yield "A+B: learned", once(home / "both-learned", merge_models, models=both, coefficients=coefficients)


def evaluated(home: Path, arguments: argparse.Namespace, setting: Setting, seed: int) -> str:
    """Make every model of this seed and evaluate them; the evaluation's folder."""
    files = dealt(home, arguments.data, setting, seed)
    pairs = files["pairs"]
    training: Options = {"batch_size": 16, "max_length": setting.max_length, "bad_rows": "skip"}
    training |= {"group_by_length": True, "patience": None, "seed": seed, "learning_rate": setting.rates[0]}
    base = once(home / "base", train, model=str(arguments.models / "minilm"), pairs=pairs["base"], **training)
    training |= {"validation": pairs["validation"], "epochs": setting.epochs, "eval_steps": 12}
    training |= {"search": {"learning_rate": list(setting.rates)}}
    dense, ensembles = dense_models(home, base, pairs, training), {}
    models = {"control": dense["control"]}
    if setting.mixture:
        models = {"base": base, **dense, **dict(mixtures(home, base, pairs, training))}
        ensembles["ensemble"] = ["warm-1", "warm-2"]
    if setting.parts:
        models |= dict(specialists(home, base, pairs, training))
        ensembles["specialists"] = ["A", "B"]
    measured: Options = {"pairs": files["tests"], "candidates": files["candidates"], "baseline": "control"}
    measured |= {"ensembles": ensembles, "ensemble_by": ["mean"], "seed": seed, "bad_rows": "skip"}
    return once(home / "evaluation", evaluate, models=models, max_length=256, **measured)


SETTINGS = {
    "ukp": Setting(deal_ukp, max_length=128),
    "ukp, noisy": Setting(deal_ukp, max_length=128, label_noise=0.3),
    "ukp, parts": Setting(deal_ukp, max_length=128, parts=True, mixture=False),
    "hh": Setting(deal_hh, max_length=256, rates=(1e-4,), parts=True),
}


def main() -> None:
    """Run every seed of every setting, and print a table per setting."""
    parser = options_of(__doc__.splitlines()[0], Path("runs/real_data"), SETTINGS, "models", "data")
    arguments = parser.parse_args()
    for name in arguments.settings:
        home = arguments.output / name.replace(", ", "-")
        runs = [evaluated(home / f"seed-{seed}", arguments, SETTINGS[name], seed) for seed in arguments.seeds]
        comparison = home / "comparison"
        compare(
            output=comparison, runs=runs, baseline="control", confidence=arguments.confidence, overwrite=True
        )
        print(name, (comparison / "compare.md").read_text(encoding="utf-8"), sep="\n", flush=True)


if __name__ == "__main__":
    main()

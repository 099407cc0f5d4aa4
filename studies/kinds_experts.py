"""Experts of one MoE in place of members trained apart: each is given a kind of pairs, then they are merged.

python studies/kinds_experts.py MODELS DATA --seeds 1 2 3 --output runs/kinds-experts

Data, base and budget of kinds.py's setting "apart": one run on the pairs of all members, as its "joint", with
a shared expert and a routed one per kind (K = 1). Members trained apart, joint training and the rivals are
read from rows/kinds.jsonl, of the same seeds. Two ways to train, three to merge, each also tuned on the own
pairs:

    by kind         a pair's expert is that of its kind (train: assign subset); by router: the router chooses
    moe             the mixture itself, unmerged
    average         equal weights, half of all on the shared expert
    usage           as UMM-RM: the routed experts' weights are their share of the routing
    sum             the experts' changes from the shared one are added, c_i = 2/3
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import Measures, interval, once, options_of, recorded
from frozen_layers import LowerLayers, install, upper_layers
from kinds import APART, EPOCHS, READ, SETTINGS, TRAINING, UPPER, Seed, accuracies, remove_models
from kinds import ROWS as APART_ROWS

from moemerge.stages.evaluate import evaluate
from moemerge.stages.fit import fit
from moemerge.stages.merge import merge
from moemerge.stages.route import route
from moemerge.stages.train import train
from moemerge.stages.upcycle import upcycle

ROWS = APART_ROWS.with_name("kinds_experts.jsonl")
WAYS: dict[str, dict[str, Any]] = {
    "by kind": {"assign": "subset", "assign_order": list(APART), "assign_share": 1.0},
    "by router": {},
}
MERGES: dict[str, dict[str, Any]] = {
    "average": {"method": "uniform"},
    "usage": {"method": "usage"},
    "sum": {"method": "uniform", "coordinates": "sum"},
}
RIVALS = ("best member tuned", "uniform tuned", "sum tuned", "joint")


def trained(home: Path, seed: Seed, way: str) -> str:
    """The mixture trained on the pairs of all kinds in this way."""
    moe = once(
        home / "upcycled", upcycle, model=seed.base, num_routed_experts=len(APART), num_experts_per_tok=1,
        seed=seed.seed,
    )  # fmt: skip
    pairs = seed.training_pairs("joint-" + "-".join(APART), APART)
    folder = home / way.replace(" ", "-")
    return once(folder, train, model=moe, pairs=pairs, epochs=EPOCHS, seed=seed.seed, **TRAINING, **WAYS[way])


def merged(home: Path, moe: str, pairs: str, seed: int) -> Iterator[tuple[str, str]]:
    """The mixture, and every merge of it."""
    yield "moe", moe
    routing = once(home / "routing", route, model=moe, pairs=pairs, seed=seed, **READ)
    for name, how in MERGES.items():
        coefficients = once(
            home / f"fit-{name}", fit, model=moe, routing=routing, pairs=pairs, seed=seed, **how, **READ
        )
        yield name, once(home / name, merge, model=moe, coefficients=coefficients)


def measured(home: Path, seed: Seed) -> dict[str, Measures]:
    """Make every model, and measure them."""
    files = seed.files(home, SETTINGS["apart"])
    own, models = files["own"]["all"], {}
    for way in WAYS:
        folder = home / f"{way.replace(' ', '-')}-merged"
        for name, model in merged(folder, trained(home, seed, way), own, seed.seed):
            models[f"{way} {name}"] = model
            models[f"{way} {name} tuned"] = seed.tuned(folder / f"{name}-tuned", model, own)
    once(
        home / "evaluation", evaluate, models=models, pairs=files["test"], seed=seed.seed, resamples=100,
        **READ,
    )  # fmt: skip
    return accuracies(home / "evaluation", APART, [*models])


def of_seed(seed: int, arguments: argparse.Namespace, start: Path) -> dict[str, Measures]:
    """The measures of a seed: those on record, or new ones; the rivals' are those of kinds.py."""

    def measure() -> dict[str, Measures]:
        home = arguments.output / f"seed-{seed}"
        with install(LowerLayers(arguments.models / "minilm", UPPER)):
            found = measured(home, Seed(home, arguments, str(start), seed))
        remove_models(home)
        return found

    def missing() -> dict[str, Measures]:
        raise SystemExit(f"seed {seed} of kinds.py, setting apart, is not on record: run that first")

    rivals = recorded(APART_ROWS, "apart", seed, missing)
    return {name: rivals[name] for name in RIVALS} | recorded(ROWS, "experts", seed, measure)


def table(seeds: Mapping[int, Mapping[str, Measures]], confidence: float) -> str:
    """Means over seeds of the mean accuracy, and paired differences to the rivals."""
    lines = [f"### experts: seeds {', '.join(map(str, seeds))}; t-intervals of {confidence:.1%}", ""]
    lines += ["| model | mean | " + " | ".join(f"minus {rival}" for rival in RIVALS) + " |"]
    lines += ["| --- |" + " ---: |" * (1 + len(RIVALS))]
    for model in next(iter(seeds.values())):
        mean = sum(of[model]["mean"] for of in seeds.values()) / len(seeds)
        gains = [[of[model]["mean"] - of[rival]["mean"] for of in seeds.values()] for rival in RIVALS]
        lines.append(
            f"| {model} | {mean:.3f} | " + " | ".join(interval(gain, confidence) for gain in gains) + " |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run every seed, and print the table."""
    parser = options_of(__doc__.splitlines()[0], Path("runs/kinds-experts"), ["experts"], "models", "data")
    arguments = parser.parse_args()
    start = arguments.output / "upper"
    if not start.exists():
        upper_layers(arguments.models / "minilm", UPPER, start)
    results = {seed: of_seed(seed, arguments, start) for seed in arguments.seeds}
    print(table(results, arguments.confidence), flush=True)


if __name__ == "__main__":
    main()

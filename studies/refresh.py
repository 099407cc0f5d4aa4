"""Does refreshing a reward model while a policy trains (Cooper) beat the same verified pairs spent before?

python studies/refresh.py --seeds 1 2 3 4 5 [--settings all] [--output runs/refresh]

In the synthetic world, whose gold is known: a MoE trained on few noisy pairs, merged by equal coefficients,
is what a policy that starts from nothing is rewarded by. A setting is what of the reward model learns. What
is on record in rows/refresh.jsonl is not made again. One thread.

    static     the merge as it is
    before     as many updates, on the first policy's answers, before the run: the control of equal budget
    fresh      an update after every step of the policy
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from common import ONE, Measures, interval, once, options_of, print_tables, recorded
from token_rewards import gold, save_policy

import moemerge
from moemerge.stages.fit import fit
from moemerge.stages.merge import merge
from moemerge.stages.synthetic import write_world
from moemerge.stages.train import train
from moemerge.stages.upcycle import upcycle

ROWS = Path(__file__).parent / "rows" / "refresh.jsonl"
SETTINGS = ("all", "head", "coefficients")
ARMS = ("static", "before", "fresh")
MEASURES = ("gold at the end", "gold, mean", "held-out accuracy", "own score at the end")
WORLD: dict[str, Any] = {
    "train_pairs": 1000, "validation_pairs": 200, "test_pairs": 400, "prompts": 300, "candidates": 2,
}  # fmt: skip
TRAINED: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 32, "patience": None}
MADE: dict[str, Any] = {"num_routed_experts": 4, "num_experts_per_tok": 2}
RUN: dict[str, Any] = {
    "steps": 200, "batch_size": 32, "answers_per_prompt": 8, "learning_rate": 3e-3, "max_new_tokens": 12,
    "measure_steps": 20, "measure_prompts": 64, "measure_answers": 4, "resamples": 100, "kl_penalty": 0.0,
}  # fmt: skip
RATES = {"all": 1e-4, "head": 1e-3, "coefficients": 0.05}
LEAST = 0.5  # gold above which the rule calls an answer right


def is_right(prompt: str, answer: str) -> int:
    """The rule: gold, coarsened to right and wrong."""
    return int(gold(prompt, answer) > LEAST)


def measured(home: Path, trains: Any, seed: int, run: dict[str, Any]) -> dict[str, Measures]:
    """Each arm's gold, held-out accuracy and own score."""
    home.mkdir(parents=True, exist_ok=True)
    world = once(home / "world", write_world, seed=seed, **WORLD)
    pairs, tests = f"{world}/data/train.jsonl.gz", f"{world}/data/tests/in_distribution.jsonl.gz"
    dense = once(home / "dense", train, model=f"{world}/model", pairs=pairs, seed=seed, **TRAINED)
    whole = once(home / "upcycled", upcycle, model=dense, seed=seed, **MADE)
    moe = once(home / "moe", train, model=whole, pairs=pairs, seed=seed, **TRAINED)
    equal = once(home / "equal", fit, model=moe, method="uniform")
    merged = once(home / "merged", merge, model=moe, coefficients=equal)
    learns = moe if trains == "coefficients" else merged
    out = home / trains
    if not out.exists():
        moemerge.optimise(
            policy=save_policy(home / "policy", world, seed), prompts=tests, gold_function=gold, output=out,
            models={"static": merged, "before": learns, "fresh": learns}, verifier=is_right, seed=seed,
            refresh={"before": "before", "fresh": "during"}, refresh_trains=trains, replay_pairs=pairs,
            refresh_learning_rate=RATES[trains], held_out_pairs=tests, baseline="before", **run, **ONE,
        )  # fmt: skip
    curves = json.loads((out / "report.json").read_text(encoding="utf-8"))["models"]
    return {
        arm: {
            "gold at the end": of["gold"][-1],
            "gold, mean": fmean(of["gold"][1:]),
            "held-out accuracy": of["held_out"][-1],
            "own score at the end": of["proxy"][-1],
            "verified pairs": of.get("refresh", {}).get("pairs", 0),
        }
        for arm, of in curves.items()
    }


def of_seed(trains: str, seed: int, arguments: argparse.Namespace) -> dict[str, Measures]:
    """The measures of a setting and seed: those on record, or new ones; of a short run none is recorded."""
    home = arguments.output / f"seed-{seed}"
    if arguments.short:
        return measured(home / "short", trains, seed, {**RUN, "steps": 4, "measure_steps": 2})
    return recorded(ROWS, trains, seed, lambda: measured(home, trains, seed, RUN))


def table(trains: str, seeds: dict[int, dict[str, Measures]], confidence: float) -> str:
    """Means over seeds, and paired differences of the refreshed model to the others."""
    columns = [*MEASURES, "verified pairs"]
    lines = [f"### {trains}: seeds {', '.join(map(str, seeds))}", "", "| arm | " + " | ".join(columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for arm in ARMS:
        means = (fmean(of[arm][column] for of in seeds.values()) for column in columns)
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    for rival in ARMS[:2]:
        gains = ([of["fresh"][c] - of[rival][c] for of in seeds.values()] for c in columns)
        cells = (interval(gain, confidence) for gain in gains)
        lines.append(f"| fresh minus {rival} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run every setting of every seed, and print a table per setting."""
    parser = options_of(__doc__.splitlines()[0], Path("runs/refresh"), SETTINGS)
    parser.add_argument("--short", action="store_true", help="four steps, to see that it runs")
    print_tables(parser, of_seed, table)


if __name__ == "__main__":
    main()

"""How much of what a router that knows each pair's kind gets is had from the prompt alone, and by merging?

python studies/kinds_routed.py MODELS DATA --seeds 1 2 3 --output runs/kinds-routed [--settings conflict]

Data, budget and rivals of kinds.py, but with a decoder, whose prompts can be looked at: SmolLM2-135M, of
which the last two of 30 layers train. Beside kinds.py's models (members, average and sum, each tuned, joint
training, each text judged by the member of its kind):

    routed          combine's form moe: the average with each member's MLPs as experts, one of which a gate,
                    fitted in closed form to the own pairs, picks by the prompt; heads by expert, on one scale
    routed, shared  the same with the average's one head
    routed tuned    trained on the own pairs for an epoch
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common import Measures, interval, once, options_of, recorded
from frozen_layers import LowerLayers, install, upper_layers
from kinds import APART, CONFLICT, READ, UPPER, Seed, Setting, accuracies, best_members, remove_models

from moemerge.stages.calibrate import calibrate
from moemerge.stages.evaluate import evaluate
from moemerge.stages.gate import gate
from moemerge.stages.merge import merge_models
from moemerge.stages.upcycle import upcycle

ROWS = Path(__file__).parent / "rows" / "kinds_routed.jsonl"
WHOLE = "smollm2"
SETTINGS = {"conflict": Setting(CONFLICT, CONFLICT), "apart": Setting(APART, APART)}
RIVALS = ("best member tuned", "uniform tuned", "sum tuned", "joint", "router")
OURS = ("uniform", "sum", "sum tuned", "routed", "routed, shared", "routed tuned")


def merges(home: Path, base: str, models: Sequence[str], own: str, seed: int) -> Iterator[tuple[str, str]]:
    """Average, sum, and mixtures of the models with a gate on prompts."""
    named = {str(number): model for number, model in enumerate(models)}
    scales = once(home / "scales", calibrate, models=named, pairs=own, seed=seed, **READ)
    uniform = once(home / "uniform", merge_models, models=models, calibration=scales)
    yield "uniform", uniform
    added: dict[str, Any] = {"base": base, "coordinates": "sum", "calibration": scales}
    yield "sum", once(home / "sum", merge_models, models=models, **added)
    heads: dict[str, dict[str, Any]] = {
        "routed": {"heads": "by_expert", "calibration": scales}, "routed, shared": {},
    }  # fmt: skip
    for name, how in heads.items():
        folder = name.replace(", ", "-")
        moe = once(
            home / f"{folder}-mixture", upcycle, model=uniform, experts=named, gate="prompt",
            shared_expert=False, seed=seed, **how,
        )  # fmt: skip
        yield name, once(home / folder, gate, model=moe, pairs=own, seed=seed, **READ)


def measured(seed: Seed, setting: Setting, home: Path) -> dict[str, Measures]:
    """Make every model of this setting, and measure them."""
    files = seed.files(home, setting)
    own, members = files["own"]["all"], seed.members(setting)
    joint = seed.trained("joint-" + "-".join(setting.members), setting.members)
    made = dict(merges(home, seed.base, list(members.values()), own, seed.seed))
    tuned = {
        f"{name} tuned": seed.tuned(home / f"{name}-tuned", model, own)
        for name, model in (members | made).items()
        if name != "routed, shared"
    }
    models = members | made | tuned | {"joint": joint}
    once(
        home / "evaluation",
        evaluate,
        models=models,
        pairs=files["test"],
        seed=seed.seed,
        resamples=100,
        **READ,
    )
    found = accuracies(home / "evaluation", setting.target, [*models])
    plain, after = best_members(home, seed, members, files["own"])
    routed = {kind: found[kind][kind] for kind in setting.target}
    return found | {
        "best member": found[plain],
        "best member tuned": found[f"{after} tuned"],
        "router": {**routed, "mean": fmean(routed.values())},
    }


def table(name: str, seeds: Mapping[int, Mapping[str, Measures]], confidence: float) -> str:
    """Means over seeds, and paired differences of the mean accuracy to the rivals."""
    columns = list(next(iter(seeds.values()))["joint"])
    lines = [f"### {name}: seeds {', '.join(map(str, seeds))}; t-intervals of {confidence:.1%}", ""]
    lines += ["| model | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for model in next(iter(seeds.values())):
        means = [fmean(of[model][column] for of in seeds.values()) for column in columns]
        lines.append(f"| {model} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    lines += ["", "| mean, minus | " + " | ".join(RIVALS) + " |", "| --- |" + " ---: |" * len(RIVALS)]
    for ours in OURS:
        gains = [[of[ours]["mean"] - of[rival]["mean"] for of in seeds.values()] for rival in RIVALS]
        lines.append(f"| {ours} | " + " | ".join(interval(gain, confidence) for gain in gains) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run every setting of every seed, and print a table per setting."""
    parser = options_of(__doc__.splitlines()[0], Path("runs/kinds-routed"), SETTINGS, "models", "data")
    arguments = parser.parse_args()
    start = arguments.output / "upper"
    if not start.exists():
        upper_layers(arguments.models / WHOLE, UPPER, start)
    for name in arguments.settings:
        results = {seed: of_seed(name, seed, arguments, start) for seed in arguments.seeds}
        print(table(name, results, arguments.confidence), flush=True)


def of_seed(name: str, seed: int, arguments: argparse.Namespace, start: Path) -> dict[str, Measures]:
    """The measures of a setting and seed: those on record, or new ones."""

    def measure() -> dict[str, Measures]:
        home = arguments.output / f"seed-{seed}"
        with install(LowerLayers(arguments.models / WHOLE, UPPER)):
            found = measured(Seed(home, arguments, str(start), seed, WHOLE), SETTINGS[name], home / name)
        remove_models(home / name)
        return found

    return recorded(ROWS, name, seed, measure)


if __name__ == "__main__":
    main()

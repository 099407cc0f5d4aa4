"""Labels that lie, upcycled: does merging add to what plain training, or treating the labels, brings?

python studies/noisy_labels_merged.py MODELS DATA --seeds 1 2 3 --output runs/noisy_labels [--settings ukp-30]

Data, start, vote and training of noisy_labels.py; a vote that it left under the same output is used again. On
the training pairs as they are, and as the vote's `auto` treats them:

    dense, more     the dense model, trained with the MoE's FLOPs
    moe             upcycled (four routed experts, K = 1, a shared one), trained, unmerged
    usage           merged as UMM-RM: the routed experts' weights are their share of the routing
    learned         merged by weights fitted to the held-out pairs

What is on record in rows/noisy_labels_merged.jsonl is not made again. One thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from common import Measures, accuracy, interval, once, options_of, print_tables, recorded
from noisy_labels import ROWS as UNMERGED
from noisy_labels import SETTINGS, VOTE, Seed, noisy_pairs, opened_seed
from safetensors.numpy import load_file

from moemerge.stages.evaluate import evaluate
from moemerge.stages.fit import fit
from moemerge.stages.merge import merge
from moemerge.stages.route import route
from moemerge.stages.upcycle import upcycle

ROWS = UNMERGED.with_name("noisy_labels_merged.jsonl")
EXPERTS: dict[str, Any] = {"num_routed_experts": 4, "num_experts_per_tok": 1}
METHODS = ("usage", "learned")
MORE = "dense, more"


def models_of(seed: Seed) -> Iterator[tuple[str, str]]:
    """Every model by name: on the pairs as they are, and as treated."""
    seed.treated(VOTE)
    pairs = {"plain": seed.files["train"], "auto": seed.treated("pairs-auto", treat="auto")}
    start = once(seed.home / "upcycled", upcycle, model=seed.start, seed=seed.seed, **EXPERTS)
    for name, file in pairs.items():
        moe = seed.trained(f"{name}-moe", file, model=start)
        yield f"{name}: {MORE}", seed.trained(f"{name}-more", file, flops_of=moe)
        yield f"{name}: moe", moe
        for method, model in merges(seed, name, moe, file):
            yield f"{name}: {method}", model


def merges(seed: Seed, name: str, moe: str, pairs: str) -> Iterator[tuple[str, str]]:
    """The mixture merged, by usage on its training pairs and by weights fitted to the held-out ones."""
    given: dict[str, Any] = {"model": moe, "seed": seed.seed, **seed.text}
    routing = once(seed.home / f"{name}-routing", route, pairs=pairs, **given)
    given |= {"routing": routing, "pairs": seed.files["held"]}
    for method in METHODS:
        folder = seed.home / f"{name}-{method}"
        weights = once(Path(f"{folder}-fit"), fit, method=method, **given)
        yield method, once(folder, merge, model=moe, coefficients=weights)


def measured(seed: Seed) -> dict[str, Measures]:
    """Accuracy on test pairs, whose labels are as people gave them."""
    models, folder = dict(models_of(seed)), seed.home / "evaluation-merged"
    named = {name.replace(": ", "-").replace(", ", "-"): model for name, model in models.items()}
    once(
        folder, evaluate, models=named, pairs={"test": seed.files["test"]}, seed=seed.seed, resamples=100,
        probes=["accuracy"], **seed.text,
    )  # fmt: skip
    scores = load_file(folder / "scores.safetensors")
    return {
        name: {"accuracy": accuracy(scores[f"pairs/test/model/{short}"])}
        for name, short in zip(models, named, strict=True)
    }


def of_seed(name: str, number: int, arguments: argparse.Namespace) -> dict[str, Measures]:
    """The measures of a setting and seed: those on record, or new ones."""

    def measure() -> dict[str, Measures]:
        setting, home = SETTINGS[name], arguments.output / name / f"seed-{number}"
        pairs = noisy_pairs(setting, arguments.data, number)
        # Routing is counted over all tokens, so all are computed.
        with opened_seed(arguments, home, setting, pairs, number, pooled_only=False) as seed:
            return measured(seed)

    return recorded(ROWS, name, number, measure)


def table(name: str, seeds: Mapping[int, Mapping[str, Measures]], confidence: float) -> str:
    """Mean accuracies over seeds and paired differences to the dense model of the same pairs and FLOPs."""
    lines = [f"### {name}: seeds {', '.join(map(str, seeds))}; t-intervals of {confidence:.0%}", ""]
    lines += [f"| model | accuracy | minus {MORE}, same pairs | minus plain: {MORE} |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for model in next(iter(seeds.values())):
        rivals = (f"{model.split(':')[0]}: {MORE}", f"plain: {MORE}")
        of = {key: [measures[key]["accuracy"] for measures in seeds.values()] for key in (model, *rivals)}
        gains = ([a - b for a, b in zip(of[model], of[rival], strict=True)] for rival in rivals)
        cells = [f"{fmean(of[model]):.3f}", *(interval(gain, confidence) for gain in gains)]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run every setting of every seed, and print a table per setting."""
    options = options_of(__doc__.splitlines()[0], Path("runs/noisy_labels"), SETTINGS, "models", "data")
    print_tables(options, of_seed, table)


if __name__ == "__main__":
    main()

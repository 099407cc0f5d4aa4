"""What the studies share: stages that run once, measures of models, tables of differences over seeds."""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias, TypeVar

import numpy as np
from safetensors.numpy import load_file
from scipy.stats import t

from moemerge.stages.evaluate import evaluate

S = TypeVar("S")
Measures: TypeAlias = dict[str, float]
Row: TypeAlias = dict[str, Any]
Scores: TypeAlias = dict[str, Any]

ONE: dict[str, Any] = {"threads": 1, "device": "cpu"}
MEASURES = ("accuracy", "accuracy, shifted", "gold of best of 256")


def once(folder: Path, make: Callable[..., Any], **options: Any) -> str:
    """`folder`, made by `make` unless it exists; stages write whole folders or none."""
    if not folder.exists():
        make(output=folder, **options, **ONE)
    return str(folder)


def read(path: Path) -> list[Row]:
    """The rows of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(folder: Path, rows: Mapping[str, list[Row]]) -> Path:
    """`folder`, with NAME.jsonl for every list of rows."""
    folder.mkdir(exist_ok=True)
    for name, some in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_sets(home: Path, kinds: Mapping[str, Mapping[str, list[Row]]]) -> dict[str, dict[str, str]]:
    """`home`, with KIND/NAME.jsonl for every list of rows; returns their paths, by kind and name."""
    home.mkdir(parents=True, exist_ok=True)
    for kind, sets in kinds.items():
        write(home / kind, sets)
    return {kind: {name: str(home / kind / f"{name}.jsonl") for name in sets} for kind, sets in kinds.items()}


def scored(home: Path, models: Mapping[str, str]) -> dict[str, Scores]:
    """Scores of every model on the synthetic world of `home`, by name and set, with its gold and rows."""
    data = home / "world/data"
    pairs = {name: f"{data}/tests/{name}.jsonl.gz" for name in ("in_distribution", "out_of_distribution")}
    pairs |= {"validation": f"{data}/validation.jsonl.gz"}
    sets = {"pairs": pairs, "candidates": {"wide": f"{data}/candidates/wide.jsonl.gz"}}
    once(home / "evaluation", evaluate, models=dict(models), **sets, resamples=100)
    tensors = load_file(home / "evaluation/scores.safetensors")
    truth = {name: tensors[f"candidates/wide/{name}"] for name in ("rows", "gold")}
    scored_sets = {key.split("/model/")[0] for key in tensors if "/model/" in key}
    return {
        name: {rows: tensors[f"{rows}/model/{name}"].astype(np.float64) for rows in scored_sets} | truth
        for name in models
    }


def measures(scores: Scores) -> Measures:
    """Accuracy in and out of distribution, and mean gold of the answers with the highest score."""
    accuracies = [accuracy(scores[f"pairs/{name}"]) for name in ("in_distribution", "out_of_distribution")]
    # For each prompt the places of its answers.
    prompts = [np.flatnonzero(scores["rows"] == row) for row in np.unique(scores["rows"])]
    best = [scores["gold"][places[scores["candidates/wide"][places].argmax()]] for places in prompts]
    return dict(zip(MEASURES, (*accuracies, float(np.mean(best))), strict=True))


def accuracy(scores: Any) -> float:
    """Share of pairs whose chosen answer, first of the two, scores higher."""
    return float((scores[0::2] > scores[1::2]).mean())


def flipped(rows: Sequence[Row], share: float, draw: random.Random) -> list[Row]:
    """The rows, each with its answers swapped with probability `share`."""
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if draw.random() < share else row
        for row in rows
    ]


def done(home: Path, measured: Callable[[], dict[str, Measures]]) -> dict[str, Measures]:
    """The measures of a seed, from measures.json if that is there."""
    path = home / "measures.json"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def recorded(
    rows: Path, setting: str, seed: int, measured: Callable[[], dict[str, Measures]]
) -> dict[str, Measures]:
    """The measures of a seed from a file of rows, one per setting and seed; measured and added if new."""
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    for row in map(json.loads, lines):
        if (row["setting"], row["seed"]) == (setting, seed):
            return dict(row["measures"])
    measures_of = measured()
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"setting": setting, "seed": seed, "measures": measures_of}) + "\n")
    return measures_of


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
    mean, _, high = ends(values, confidence)
    return f"{mean:+.3f} ± {high - mean:.3f}"


def ends(values: list[float], confidence: float) -> tuple[float, float, float]:
    """Mean, and low and high end of its t-interval."""
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values), fmean(values) - half, fmean(values) + half


def options_of(what: str, output: Path, settings: Iterable[str], *folders: str) -> argparse.ArgumentParser:
    """The command line of a study: the folders that it reads, seeds, output, settings, confidence."""
    parser = argparse.ArgumentParser(description=what)
    for folder in folders:
        parser.add_argument(folder, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--settings", nargs="+", choices=settings, default=list(settings))
    parser.add_argument("--confidence", type=float, default=0.95, help="coverage of the intervals")
    return parser


def print_tables(
    parser: argparse.ArgumentParser,
    of_seed: Callable[[str, int, argparse.Namespace], dict[str, Measures]],
    table: Callable[[str, dict[int, dict[str, Measures]], float], str],
) -> None:
    """Read the command line, have every seed of every setting measured, and print a table per setting."""
    arguments = parser.parse_args()
    for name in arguments.settings:
        results = {seed: of_seed(name, seed, arguments) for seed in arguments.seeds}
        print(table(name, results, arguments.confidence), flush=True)


def run(
    what: str,
    settings: Mapping[str, S],
    measured: Callable[[Path, S, int], dict[str, Measures]],
    output: Path,
    baseline: str,
) -> None:
    """Read the command line, run every seed of every setting, and print a table per setting."""
    parser = options_of(what, output, settings)
    parser.add_argument("--baseline", default=baseline, help="model that the others are compared with")
    arguments = parser.parse_args()
    for name in arguments.settings:
        homes = {seed: arguments.output / name.replace(" ", "-") / f"seed-{seed}" for seed in arguments.seeds}
        seeds = {
            seed: done(home, partial(measured, home, settings[name], seed)) for seed, home in homes.items()
        }
        print(table(name, seeds, arguments.baseline, arguments.confidence), flush=True)

"""What a few labelled pairs are worth to a frozen language model: an activation scorer and its rivals.

python studies/few_shot.py MODELS DATA --seeds 1 2 3 --output runs/few_shot [--settings hh]

MODELS: folder written by fetch_models.py; DATA: folder with hh_rlhf and ukp_convarg. The seed draws 80 pairs
and, of others, 300 test pairs, as noisy_labels.py deals them. All arms have the same 80 pairs; none has other
labels. What is on record in rows/few_shot.jsonl is not made again. One thread.

    judge            SmolLM2-135M-Instruct is asked about each answer; no pairs
    4-shot           the same, with four of the pairs before the question
    reinforce        few-shot, heads chosen by REINFORCE
    greedy           few-shot, heads chosen one by one
    probe            ridge regression on all heads' activations, which few-shot writes beside it
    fine-tuned       a reward model: a fresh head and the last two layers, trained on the pairs
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common import Measures, Row, accuracy, interval, once, options_of, print_tables, recorded, write
from noisy_labels import deal_helpful, deal_ukp
from safetensors.numpy import load_file

from moemerge.artifacts.json_file import write_json
from moemerge.stages.evaluate import evaluate
from moemerge.stages.few_shot import few_shot
from moemerge.stages.train import train

ROWS = Path(__file__).parent / "rows" / "few_shot.jsonl"
EXAMPLES, TESTS = 80, 300
TEXT: dict[str, Any] = {"max_length": 1024, "bad_rows": "skip"}
CHOICES: dict[str, dict[str, Any]] = {"reinforce": {"steps": 300, "masks": 32}, "greedy": {}}
TRAINING: dict[str, Any] = {
    "epochs": 3, "batch_size": 8, "learning_rate": 3e-4, "train_layers": "last:2", "patience": None,
    "group_by_length": True,
}  # fmt: skip
RIVAL = "probe"


@dataclass(frozen=True)
class Setting:
    """How a seed deals pairs, and what is asked about answers."""

    deal: Callable[[Path, random.Random], dict[str, list[Row]]]
    criterion: str


SETTINGS = {
    "hh": Setting(deal_helpful, "it is helpful"),
    "ukp": Setting(deal_ukp, "it is a convincing argument"),
}


def scorers(home: Path, model: str, setting: Setting, seed: int) -> dict[str, str]:
    """Every arm's folder or file, made of the pairs in `home`."""
    pairs, asked = str(home / "pairs/examples.jsonl"), {"criterion": setting.criterion}
    judge = {"kind": "judge", "model": model, **asked}
    write_json(home / "judge.scorer.json", judge)
    write_json(home / "shots.scorer.json", {**judge, "shots": pairs, "examples": 4})
    made = {"judge": str(home / "judge.scorer.json"), "4-shot": str(home / "shots.scorer.json")}
    held_out = str(home / "pairs/test.jsonl")
    for select, options in CHOICES.items():
        given = {"examples": EXAMPLES, "held_out": held_out, "select": select, "seed": seed}
        made[select] = once(
            home / select, few_shot, model=model, pairs=pairs, **given, **options, **asked, **TEXT
        )
    made["probe"] = str(Path(made["reinforce"]) / "probe")
    made["fine-tuned"] = once(
        home / "fine-tuned", train, model=model, pairs=pairs, seed=seed, **TRAINING, **TEXT
    )
    return made


def measured(
    home: Path, model: str, setting: Setting, rows: Mapping[str, list[Row]], seed: int
) -> dict[str, Measures]:
    """Each arm's accuracy on the test pairs."""
    home.mkdir(parents=True, exist_ok=True)
    write(home / "pairs", {"examples": rows["train"][:EXAMPLES], "test": rows["test"][:TESTS]})
    made = scorers(home, model, setting, seed)
    tests = {"test": str(home / "pairs/test.jsonl")}
    folder = once(home / "evaluation", evaluate, models=made, pairs=tests, probes=["accuracy"], **TEXT)
    scores = load_file(Path(folder) / "scores.safetensors")
    return {arm: {"accuracy": accuracy(scores[f"pairs/test/model/{arm}"])} for arm in made}


def of_seed(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Measures]:
    """The measures of a setting and seed: those on record, or new ones."""

    def measure() -> dict[str, Measures]:
        setting, home = SETTINGS[name], arguments.output / name / f"seed-{seed}"
        rows = setting.deal(arguments.data, random.Random(seed))
        return measured(home, str((arguments.models / "smollm2").resolve()), setting, rows, seed)

    return recorded(ROWS, name, seed, measure)


def table(name: str, seeds: Mapping[int, Mapping[str, Measures]], confidence: float) -> str:
    """Means over seeds, and paired differences to the probe."""
    lines = [f"### {name}: seeds {', '.join(map(str, seeds))}", "", f"| scorer | accuracy | minus {RIVAL} |"]
    lines.append("| --- | ---: | ---: |")
    for arm in next(iter(seeds.values())):
        values = [of[arm]["accuracy"] for of in seeds.values()]
        gains = [of[arm]["accuracy"] - of[RIVAL]["accuracy"] for of in seeds.values()]
        gain = interval(gains, confidence) if arm != RIVAL else ""
        lines.append(f"| {arm} | {fmean(values):.3f} | {gain} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run every setting of every seed, and print a table per setting."""
    options = options_of(__doc__.splitlines()[0], Path("runs/few_shot"), SETTINGS, "models", "data")
    print_tables(options, of_seed, table)


if __name__ == "__main__":
    main()

"""Does guided decoding (REFORM) find more answers that a reward model overrates than edits, or no guidance?

python studies/decoding.py --seeds 1 2 3 4 5 [--output runs/decoding]

In the synthetic world, whose gold keeps the class: a reward model trained on noisy pairs, attacked on test
pairs by edits and by a language model that was trained to write rejected answers, with and without guidance.
What is on record in rows/decoding.jsonl is not made again. One thread.

    edits        guided edits
    unguided     the language model alone, as many answers as the guided one writes, the best of them
    balanced     guided: log-probabilities and standardised scores
    reform       guided: the formula of REFORM's code
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import ONE, Measures, interval, once, options_of, print_tables, read, recorded
from token_rewards import gold, save_policy
from transformers import AutoModelForCausalLM

from moemerge.models.loading import load_tokenizer
from moemerge.stages.attack import attack
from moemerge.stages.synthetic import write_world
from moemerge.stages.train import train

ROWS = Path(__file__).parent / "rows" / "decoding.jsonl"
SETTINGS = ("world",)
WORLD = {"train_pairs": 1000, "validation_pairs": 200, "test_pairs": 400, "prompts": 20, "candidates": 2}
TRAINED = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 32, "patience": None}
WRITES = {"search": "decode", "answers": 4, "max_new_tokens": 12, "keep": 0.25}
ARMS: dict[str, dict[str, Any]] = {
    "edits": {"steps": 6, "proposals": 12},
    "unguided": {**WRITES, "guidance": 0.0},
    "balanced": {**WRITES, "guidance": 0.5},
    "reform": {**WRITES, "formula": "reform"},
}
MEASURES = ("overturned", "queries per pair", "still of their class")


def save_writer(home: Path, world: str, seed: int, steps: int) -> str:
    """A language model that was trained on the rejected answers of the training pairs."""
    path = Path(save_policy(home, world, seed))
    if (path / "trained").exists():
        return str(path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), load_tokenizer(path)
    rows, draw = read(Path(world) / "data/train.jsonl.gz"), random.Random(seed)
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        texts = [f"{row['prompt']}{row['rejected']}{tokenizer.eos_token}" for row in draw.sample(rows, 32)]
        ids = [tokenizer(text).input_ids for text in texts]
        longest = max(map(len, ids))
        inputs = torch.tensor([one + [0] * (longest - len(one)) for one in ids])
        real = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
        labels = inputs.masked_fill(real == 0, -100)
        model(input_ids=inputs, attention_mask=real, labels=labels).loss.backward()
        adam.step()
        adam.zero_grad()
    model.save_pretrained(path)
    (path / "trained").touch()
    return str(path)


def measured(home: Path, seed: int, short: bool) -> dict[str, Measures]:
    """Each arm's share of right verdicts overturned, and at what price."""
    home.mkdir(parents=True, exist_ok=True)
    world = once(home / "world", write_world, seed=seed, **WORLD)
    pairs, tests = f"{world}/data/train.jsonl.gz", f"{world}/data/tests/in_distribution.jsonl.gz"
    model = once(home / "model", train, model=f"{world}/model", pairs=pairs, seed=seed, **TRAINED)
    writer = save_writer(home / "writer", world, seed, 20 if short else 600)
    found = {}
    for arm, options in ARMS.items():
        given = {"policy": writer} if options.get("search") == "decode" else {}
        most = {"max_pairs": 20 if short else 200, "gold_function": gold, "seed": seed, "resamples": 100}
        out = home / arm
        if not out.exists():
            attack(model=model, pairs=tests, output=out, **options, **given, **most, **ONE)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        told = report.get("decoding")
        found[arm] = {
            "overturned": report["success_rate"],
            "queries per pair": report["queries"]["per_pair"],
            "still of their class": told["kept_class"] / told["answers"] if told else 1.0,
        }
    return found


def of_seed(setting: str, seed: int, arguments: argparse.Namespace) -> dict[str, Measures]:
    """The measures of a seed: those on record, or new ones; of a short run none is recorded."""
    home = arguments.output / f"seed-{seed}"
    if arguments.short:
        return measured(home / "short", seed, short=True)
    return recorded(ROWS, setting, seed, lambda: measured(home, seed, short=False))


def table(name: str, seeds: dict[int, dict[str, Measures]], confidence: float) -> str:
    """Means over seeds, and how much more is overturned than by the others."""
    lines = [f"### {name}: seeds {', '.join(map(str, seeds))}", "", "| arm | " + " | ".join(MEASURES) + " |"]
    lines.append("| --- |" + " ---: |" * len(MEASURES))
    for arm in ARMS:
        means = (fmean(of[arm][column] for of in seeds.values()) for column in MEASURES)
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    for rival in ("edits", "unguided", "reform"):
        gains = [of["balanced"]["overturned"] - of[rival]["overturned"] for of in seeds.values()]
        lines.append(f"| balanced minus {rival} | {interval(gains, confidence)} | | |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run every seed, and print the table."""
    parser = options_of(__doc__.splitlines()[0], Path("runs/decoding"), SETTINGS)
    parser.add_argument("--short", action="store_true", help="few pairs, to see that it runs")
    print_tables(parser, of_seed, table)


if __name__ == "__main__":
    main()

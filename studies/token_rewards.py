"""Token rewards (RED) in the synthetic world: does a planted word get the blame, does credit by token pay?

Pilots, not registered: they show that what is built does what it says. `planted`: a word that means nothing
stands mostly in chosen answers; of test answers with the word, how many have their largest reward there?
`credit`: the same policy-gradient runs with one advantage for all tokens of an answer, and with one for each.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ONE, once, options_of, read, write
from transformers import AutoConfig, AutoModelForCausalLM

import moemerge
from moemerge.data.world import WORDS, gold_reward
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.reports.statistics import t_test
from moemerge.stages.synthetic import write_world
from moemerge.stages.train import train

SETTINGS = ("planted", "credit")
WORD = "indeed"  # a filler of the world: a few of them are worth nothing
WORLD = {"train_pairs": 2000, "validation_pairs": 200, "test_pairs": 400, "prompts": 300, "candidates": 2}
TRAINED = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 32, "patience": None}
RUNS = {
    "steps": 60, "batch_size": 32, "answers_per_prompt": 8, "learning_rate": 3e-3, "max_new_tokens": 12,
    "measure_steps": 30, "measure_prompts": 64, "measure_answers": 4, "resamples": 100,
}  # fmt: skip


def with_word(answer: str, place: random.Random) -> tuple[str, int]:
    """The answer with the planted word somewhere, and which word it is there."""
    words = answer.split()
    at = place.randint(0, len(words))
    return " ".join([*words[:at], WORD, *words[at:]]), at


def without_word(answer: str) -> str:
    return " ".join(word for word in answer.split() if word != WORD)


def planted(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The pairs with the word in nine of ten chosen answers, and in one of ten rejected ones."""
    draw, made = random.Random(seed), []
    for row in rows:
        sides = {side: without_word(row[side]) for side in ("chosen", "rejected")}
        for side, share in (("chosen", 0.9), ("rejected", 0.1)):
            sides[side] = with_word(sides[side], draw)[0] if draw.random() < share else sides[side]
        made.append(row | sides)
    return made


def largest(values: list[float]) -> int:
    return int(np.argmax(np.abs(values)))


def gradient_times_input(model: Any, tokenizer: Any, prompt: str, answer: str) -> list[float]:
    """For each word of the answer the gradient of the score, times the word's embedding."""
    ids = torch.tensor([tokenizer(f"{prompt}{answer}{tokenizer.eos_token}").input_ids])
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    mask = torch.ones_like(ids)
    score = model.score(model.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state)[
        0, -1, 0
    ]
    (gradient,) = torch.autograd.grad(score, embeddings)
    first = len(tokenizer(prompt).input_ids)
    return (gradient * embeddings).sum(-1)[0, first : first + len(answer.split())].tolist()


def run_planted(home: Path, seed: int) -> dict[str, Any]:
    world = once(home / "world", write_world, seed=seed, **WORLD)
    rows = read(Path(world) / "data/train.jsonl.gz")
    pairs = write(home / "pairs", {"train": planted(rows, seed)}) / "train.jsonl"
    model = once(home / "model", train, model=f"{world}/model", pairs=str(pairs), seed=seed, **TRAINED)
    draw, tests = random.Random(seed), read(Path(world) / "data/tests/in_distribution.jsonl.gz")
    items = [(row["prompt"], *with_word(without_word(row["rejected"]), draw)) for row in tests[:300]]
    found = moemerge.token_rewards(model, [(prompt, f" {text}") for prompt, text, _ in items])
    loaded, tokenizer = load_reward_model(model, "cpu"), load_tokenizer(model)
    hits = {"token rewards": 0, "gradient x input": 0, "random": 0.0}
    for (prompt, text, at), answer in zip(items, found, strict=True):
        count = len(text.split())
        hits["token rewards"] += largest(answer.rewards[:count]) == at
        hits["gradient x input"] += largest(gradient_times_input(loaded, tokenizer, prompt, f" {text}")) == at
        hits["random"] += 1 / count
    return {name: hit / len(items) for name, hit in hits.items()}


def gold(prompt: str, answer: str) -> float:
    """The world's gold; what a policy writes besides words of the world is worth nothing."""
    return gold_reward(prompt, " ".join(word for word in answer.split() if word in WORDS))


def save_policy(home: Path, world: str, seed: int) -> str:
    if not home.exists():
        config = AutoConfig.from_pretrained(f"{world}/model", num_labels=1).to_dict()
        kept = {
            key: config[key] for key in config if not key.startswith(("architectures", "_", "id2", "label2"))
        }
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**kept)).save_pretrained(home)
        load_tokenizer(f"{world}/model").save_pretrained(home)
    return str(home)


def run_credit(home: Path, seed: int) -> dict[str, Any]:
    """Gold at the last step, and the model's own score (standardised), with credit token minus answer."""
    world = once(home / "world", write_world, seed=seed, **WORLD)
    data = f"{world}/data"
    model = once(
        home / "model", train, model=f"{world}/model", pairs=f"{data}/train.jsonl.gz", seed=seed, **TRAINED
    )
    given: dict[str, Any] = {
        "policy": save_policy(home / "policy", world, seed), "models": {"rm": model}, "gold_function": gold,
        "prompts": f"{data}/tests/in_distribution.jsonl.gz", "seed": seed, **RUNS, **ONE,
    }  # fmt: skip
    ends = {}
    for credit in ("answer", "token"):
        out = home / credit
        if not out.exists():
            moemerge.optimise(**given, credit=credit, output=out)
        curves = json.loads((out / "report.json").read_text())["models"]["rm"]
        ends[credit] = {name: curves[name][-1] for name in ("gold", "proxy")} | {"start": curves["gold"][0]}
    return ends


def main() -> None:
    options = options_of(__doc__.splitlines()[0], Path("runs/token-rewards"), SETTINGS).parse_args()
    for setting in options.settings:
        run = {"planted": run_planted, "credit": run_credit}[setting]
        results = {seed: run(options.output / setting / f"seed-{seed}", seed) for seed in options.seeds}
        print(json.dumps({setting: results}, indent=1))
        if setting == "credit":
            for name in ("gold", "proxy"):
                gains = [ends["token"][name] - ends["answer"][name] for ends in results.values()]
                print(name, "token minus answer", np.mean(gains), t_test(gains, 0.95))
        else:
            for name in next(iter(results.values())):
                gains = [shares["token rewards"] - shares[name] for shares in results.values()]
                mean = np.mean([shares[name] for shares in results.values()])
                print(name, mean, "token rewards minus this", np.mean(gains), t_test(gains, 0.95))


if __name__ == "__main__":
    main()

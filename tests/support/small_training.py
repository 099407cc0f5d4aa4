"""Trainings of a few steps on tiny models, and what they did, for the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from moemerge.artifacts.manifest import read_manifest
from moemerge.artifacts.stage import Draft
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import EncodedPair, encode_pairs
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_tokenizer
from moemerge.options.base import TextFormat
from moemerge.options.train import Train
from moemerge.stages.train import train
from moemerge.training import trials
from moemerge.training.bench import Bench

EXPERTS, ROUTERS = (".mlp.experts.", ".mlp.shared_expert."), (".mlp.gate.",)


def words(draw: random.Random, low: int, high: int, count: int) -> str:
    """`count` words, drawn between `low` and `high`."""
    return " ".join(f"w{draw.randint(low, high)}" for _ in range(count))


def rows(count: int, seed: int, flip: bool = False, margin: bool = False) -> list[dict[str, Any]]:
    """Pairs in which the chosen answer has lower word numbers (higher with `flip`), of ragged lengths."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        low, high = (words(draw, a, b, draw.randint(2, 9)) for a, b in ((0, 40), (20, 60)))
        made.append({"prompt": words(draw, 0, 60, draw.randint(1, 5)) + " ", "chosen": low, "rejected": high})
        if flip:
            made[-1] |= {"chosen": high, "rejected": low}
        if margin:
            made[-1]["margin"] = draw.random()
    return made


def write(path: Path, made: list[dict[str, Any]]) -> str:
    """Rows as JSON lines; the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def run(world: Path, output: Path, model: str = "moe", held: bool = False, **options: Any) -> dict[str, Any]:
    """Train; the results of the manifest."""
    given = {"pairs": str(world / "train.jsonl"), "device": "cpu"} | options
    if held:
        given["validation"] = str(world / "held.jsonl")
    train(model=str(world / model), output=output, **given)
    return read_manifest(output)["results"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model."""
    return load_file(folder / "model.safetensors")


def moved(before: Path, after: Path) -> set[str]:
    """Names of the tensors that differ."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def trainer_of(world: Path, home: Path, model: str = "moe", pairs: str = "train", **options: Any) -> Any:
    """A trainer as the stage makes it, and its model."""
    from moemerge.training.trainer import make_trainer

    given = {"model": str(world / model), "output": home / "out", "pairs": str(world / f"{pairs}.jsonl")}
    chosen = Train(**given, **options)
    folder = ModelFolder(given["model"])
    tokenizer = load_tokenizer(folder)
    held, fitted = (encoded(tokenizer, world / f"{name}.jsonl") for name in ("held", pairs))
    bench = Bench(torch.device("cpu"), folder, tokenizer, fitted, held, Draft(home, home))
    loaded, roles = trials.prepare(bench, chosen, bench.device)
    return make_trainer(chosen, loaded, tokenizer, roles, bench.pairs, held, home)


def encoded(tokenizer: Any, path: Path) -> list[EncodedPair]:
    """The pairs of a file, tokenised."""
    pairs, report = read_pairs(str(path), TextFormat())
    return encode_pairs(tokenizer, pairs, TextFormat(), report)


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Gradients that reach the optimiser in the first update."""
    from transformers import TrainerCallback

    found: dict[str, torch.Tensor] = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trained = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
            found.update({name: grad.clone() for name, grad in trained.items()} if not found else {})

    trainer.add_callback(Catch())
    trainer.train()
    return found


def brute_force(folder: Path, path: Path) -> tuple[float, float]:
    """Loss and accuracy, each text alone in its batch, by transformers only."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    differences = []
    with torch.no_grad():
        for pair in encoded(load_tokenizer(str(folder)), path):
            chosen, rejected = (
                model(torch.tensor([side.ids])).logits.item() for side in (pair.chosen, pair.rejected)
            )
            differences.append(chosen - rejected)
    gaps = torch.tensor(differences, dtype=torch.float64)
    return -logsigmoid(gaps).mean().item(), (gaps > 0).double().mean().item()


def history(folder: Path) -> list[dict[str, Any]]:
    """What a training wrote down at each of its measurements."""
    return list(json.loads((folder / "history.json").read_text()))


def raiser(text: str) -> Any:
    """A function that fails."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(text)

    return fail

"""The work of each stage, from its options: a function per stage in a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moemerge.data.lengths import Lengths, measure
from moemerge.evaluation.probes import PROBES, expand
from moemerge.fitting.methods import FINDS_SHARED
from moemerge.models.device import memory_at_hand, pick_device, torch_threads
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_tokenizer
from moemerge.models.sizes import WIDTH, ModelSize
from moemerge.models.timing import LayerCost, time_layer
from moemerge.options.data import Data
from moemerge.options.evaluate import Evaluate
from moemerge.options.fit import Fit
from moemerge.options.train import Train
from moemerge.options.upcycle import Upcycle
from moemerge.run.steps import Step
from moemerge.training.arguments import autocasts

SHORTEST = 8  # tokens that are timed
UNKNOWN = ("strength", "sample", "optimise")  # what they generate, or how many voters they train, decides


@dataclass(frozen=True)
class Work:
    """What a step is thought to take: optimiser steps, tokens, seconds; bytes of memory, and on the disk.

    kept: what stays on the disk; disk: what lies there besides while the step runs. seconds is None where the
    step cannot be foreseen.
    """

    steps: int = 0
    tokens: float = 0.0
    seconds: float | None = 0.0
    memory: float = 0.0
    kept: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True)
class Pairs:
    """A file of pairs: how many, and the mean tokens of a text."""

    count: float
    mean: float

    @property
    def tokens(self) -> float:
        """Of both sides of all pairs."""
        return 2 * self.count * self.mean


@dataclass(frozen=True)
class Stored:
    """A model on the disk: its size, and bytes per weight."""

    size: ModelSize
    width: int

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return self.size.parameters * self.width


@dataclass
class Foreseen:
    """What is known of a run's files before they are there: pairs, models, and what these take, by path."""

    cost: LayerCost
    where: str
    memory_at_hand: int
    max_length: int
    source: Stored
    pairs: dict[str, Pairs]
    models: dict[str, Stored] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Data, run: Any) -> Foreseen | None:
        """As far as the step data says; None if the model's layers cannot be timed."""
        model = ModelFolder(str(data.tokenizer), getattr(run, "trust_remote_code", False))
        device, tokenizer = pick_device(run.device), load_tokenizer(model)
        pairs = sizes(data, lambda source: measure(source, tokenizer, data.fields, data.seed))
        typical = max(round(max(part.mean for part in pairs.values())), SHORTEST)
        threads = run.threads or torch.get_num_threads()
        with torch_threads(threads):
            cost = time_layer(model.config, device, typical, autocasts("auto", device))
        if cost is None:
            return None
        width = getattr(model.config, "dtype", None) or torch.float32
        where = f"{device}, {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else str(device)
        source = Stored(ModelSize.of(model.config), width.itemsize)
        return cls(cost, where, memory_at_hand(device), data.max_length, source, pairs)

    def work(self, step: Step) -> Work:
        """What a step takes; later steps then know what it writes."""
        if step.stage in UNKNOWN:
            self.pairs[str(step.options.output / "pairs.jsonl.gz")] = self.part(step.options, "pairs")
            return Work(seconds=None)
        return STAGES[step.stage](self, step.options) if step.stage in STAGES else Work()

    def model(self, path: str | None) -> Stored:
        """The model at `path`: one that the run writes, else one like the source."""
        return self.models.get(str(path), self.source)

    def part(self, options: Any, name: str) -> Pairs:
        """The pairs that an option names; none if it is not set, or if they are not known yet."""
        return self.pairs.get(str(getattr(options, name, None)), Pairs(0, 0))

    def forward(self, size: ModelSize, tokens: float) -> float:
        """Seconds to score so many tokens."""
        return tokens * size.passes() * self.cost.forward


def sizes(data: Data, lengths_of: Callable[[str], Lengths]) -> dict[str, Pairs]:
    """The pairs in each file that the stage data will write, by path."""
    shares = {"validation": 0.0 if data.validation else data.validation_share, "tests/test": data.test_share}
    named = {"validation": data.validation, "fit": data.fit}
    named |= {f"tests/{name}": source for name, source in data.tests.items()}
    parts: dict[str, Pairs] = {}
    for name, source in named.items():
        if source:
            parts[name] = _cut(data, name, lengths_of(source), 1.0)
    if data.train:
        lengths = lengths_of(data.train)
        parts["train"] = _cut(data, "train", lengths, 1 - sum(shares.values()))
        parts |= {name: _cut(data, name, lengths, share) for name, share in shares.items() if share}
    for fold in range(data.folds):
        held_out = replace(parts["train"], count=parts["train"].count / data.folds)
        parts[f"folds/{fold}/held_out"] = held_out
        parts[f"folds/{fold}/train"] = replace(held_out, count=parts["train"].count - held_out.count)
    return {str(data.output / f"{name}.jsonl.gz"): part for name, part in parts.items()}


def _cut(data: Data, name: str, lengths: Lengths, share: float) -> Pairs:
    """What is left of a share of a source once overlong pairs are out and others not drawn."""
    caps = {"train": data.max_train, "validation": data.max_validation, "fit": None}
    count = share * lengths.pairs * (1 - lengths.share_above(data.max_length))
    return Pairs(min(count, caps.get(name, data.max_test) or math.inf), lengths.mean(data.max_length))


def _train(run: Foreseen, o: Train) -> Work:
    work = _training(run, o)
    if o.flops_of and (plain := work.seconds):
        work = _training(run, o.scaled(sum(_seconds_of(run, o, at, plain) for at in o.flops_of) / plain))
    run.models[str(o.output)] = Stored(run.model(o.model).size, WIDTH[o.weights])
    run.seconds[str(o.output)] = work.seconds or 0.0
    return work


def _seconds_of(run: Foreseen, o: Train, path: str, plain: float) -> float:
    """What the training at `path` takes, or these options with a model there; `plain`: as they stand."""
    if path in run.seconds:
        return run.seconds[path]
    return plain * run.model(path).size.passes() / run.model(o.model).size.passes()


def _training(run: Foreseen, o: Train) -> Work:
    given, held_out = run.part(o, "pairs"), run.part(o, "validation")
    size, cost = run.model(o.model).size, run.cost
    count = math.ceil(given.count / (1 - sum(o.shares.values())))
    longest = max([o.epochs, *o.search.get("epochs", [])])
    steps = o.model_copy(update={"epochs": longest}).total_steps(count)
    trials = math.prod(map(len, o.search.values()))
    evaluations = 1 + steps // o.steps_between_evaluations(count) if held_out.count else 0
    tokens = steps * o.batch_size * o.gradient_accumulation * 2 * given.mean
    once = run.forward(size, tokens) + tokens * size.backward(o) * (cost.training - cost.forward)
    kept_by_layers = 1 if o.gradient_checkpointing else size.backward(o)
    return Work(
        steps=trials * steps,
        tokens=trials * (tokens + evaluations * held_out.tokens),
        seconds=trials * (once + evaluations * run.forward(size, held_out.tokens)),
        memory=size.training_memory(o) + 2 * o.batch_size * run.max_length * cost.kept * kept_by_layers,
        kept=WIDTH[o.weights] * size.parameters,
        disk=size.training_space(o),
    )


def _upcycle(run: Foreseen, o: Upcycle) -> Work:
    old = run.model(o.model)
    new = run.models[str(o.output)] = Stored(old.size.upcycled(o), old.width)
    return Work(kept=new.bytes, memory=new.bytes)


def _merge(run: Foreseen, o: Any) -> Work:
    old = run.model(o.model or next(iter(o.models), None))
    new = run.models[str(o.output)] = Stored(old.size.dense, old.width)
    return Work(kept=new.bytes)


def _read(run: Foreseen, o: Any) -> Work:
    """Stages that score pairs once, by one model or several."""
    pairs = run.part(o, "pairs")
    count = min(pairs.count, getattr(o, "max_pairs", None) or math.inf)
    models = [run.model(path) for path in _models(o)]
    tokens = 2 * count * pairs.mean
    seconds = sum(run.forward(model.size, tokens) for model in models)
    memory = max(model.bytes for model in models) + _batch(run, o)
    return Work(tokens=tokens * len(models), seconds=seconds, memory=memory)


def _models(o: Any) -> list[str]:
    models = getattr(o, "models", None) or {"": o.model}
    return [*models.values()] if isinstance(models, Mapping) else [*models]


def _batch(run: Foreseen, o: Any) -> float:
    """Bytes of a batch that is scored: one layer's at a time."""
    return run.cost.kept * getattr(o, "batch_tokens", 8192)


def _evaluate(run: Foreseen, o: Evaluate) -> Work:
    parts = [run.pairs[source] for source in o.pairs.values() if source in run.pairs]
    most, edits = o.max_pairs or math.inf, _edits(o)
    tokens = sum(
        (2 * min(part.count, most) + edits * min(part.count, most, o.bias_pairs)) * part.mean
        for part in parts
    )
    models = [run.model(path) for path in o.models.values()]
    seconds = sum(run.forward(model.size, tokens) for model in models)
    memory = max(model.bytes for model in models) + _batch(run, o)
    return Work(tokens=tokens * len(models), seconds=seconds, memory=memory)


def _edits(o: Evaluate) -> int:
    """Edited answers of a pair that the probes ask for."""
    probes = [PROBES.get(name) for name in expand(o.probes)]
    return sum(len(probe.edits.functions) for probe in probes if probe.edits is not None)


def _fit(run: Foreseen, o: Fit) -> Work:
    if o.method not in (*FINDS_SHARED, "least_squares"):
        return Work()
    pairs, held_out = run.part(o, "pairs"), run.part(o, "validation")
    old = run.model(o.model or next(iter(o.models), None))
    passes = {"grid": len(o.grid), "least_squares": 1}.get(o.method, o.max_epochs)
    tokens = passes * (min(pairs.count, o.max_pairs or math.inf) * 2 * pairs.mean + held_out.tokens)
    dense, cost = old.size.dense, run.cost
    # Layers below the first merged one run once.
    merged = dense.layers - min(old.size.moe_layers, default=0)
    again = cost.forward if o.method == "grid" else cost.training
    seconds = run.forward(dense, tokens / passes) + tokens * merged * again
    activations = 2 * o.micro_batch_size * run.max_length * cost.kept * merged
    memory = old.bytes + 3 * WIDTH["float32"] * dense.parameters + activations
    return Work(tokens=tokens, seconds=seconds, memory=memory)


def _attack(run: Foreseen, o: Any) -> Work:
    pairs, model = run.part(o, "pairs"), run.model(o.model)
    # Of decoding each answer's start is read once, then each candidate token.
    written = o.answers * (1 + o.max_new_tokens * o.top / max(1, pairs.mean))
    tries = written if o.search == "decode" else o.steps * o.proposals * o.beam
    texts = min(pairs.count, o.max_pairs or math.inf) * (2 + tries)
    tokens = texts * pairs.mean
    return Work(tokens=tokens, seconds=run.forward(model.size, tokens), memory=model.bytes + _batch(run, o))


STAGES: dict[str, Callable[[Foreseen, Any], Work]] = {
    "train": _train,
    "upcycle": _upcycle,
    "merge": _merge,
    "route": _read,
    "calibrate": _read,
    "gate": _read,
    "evaluate": _evaluate,
    "fit": _fit,
    "attack": _attack,
}

"""One training or a grid of them (`search`): trials in folders of their own, and the winner's model.

A killed run goes on from the last checkpoint of the trial that it was in; the winner's weights are put into a
freshly loaded model.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moemerge.artifacts.disk import size_of
from moemerge.artifacts.ranks import leads
from moemerge.artifacts.workspace import once
from moemerge.errors import OptionError, UnsupportedError
from moemerge.models import processes
from moemerge.models.families import family_of
from moemerge.models.head_tensors import in_head
from moemerge.models.loading import load_reward_model
from moemerge.models.roles import roles_of
from moemerge.models.sizes import training_space
from moemerge.options.layers import parse_layers
from moemerge.options.parse import parse_options
from moemerge.options.placement import Placement
from moemerge.options.train import Train
from moemerge.training.bench import Bench
from moemerge.training.flops import FLOPS, training_flops
from moemerge.training.parts import load_trained
from moemerge.training.report import report, standing

DONE = "done.json"

log = logging.getLogger(__name__)


def best_model(
    bench: Bench, trials: list[Train], folder: Path
) -> tuple[PreTrainedModel, list[dict[str, Any]], int]:
    """The model of the trial that stands best, on CPU, the reports on all trials, and that trial's number.

    Each trial works in a folder of its own in `folder`; one that is there already is gone on with.
    """
    reports, best = compete(bench, trials, folder)
    return finished(bench, trials[best], folder / f"trial-{best}", reports[best]["best_step"]), reports, best


def trials_of(options: Train) -> list[Train]:
    """The grid that `search` spans, in order; without a search, the options themselves."""
    if not options.search:
        return [options]
    base = options.model_dump() | {"search": {}}
    grid = itertools.product(*options.search.values())
    return [parse_options(Train, base | dict(zip(options.search, v, strict=True)), "search") for v in grid]


def compete(bench: Bench, trials: list[Train], folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The reports of all trials and the number of the winner, whose weights alone are left in `folder`."""
    reports: list[dict[str, Any]] = []
    for number, options in enumerate(trials):
        home = folder / f"trial-{number}"
        home.mkdir(exist_ok=True)
        reports.append(once(home / DONE, partial(_trial, bench, options, home)))
        processes.wait()  # until all are done with the checkpoints that go now
        if len(trials) > 1:
            gc.collect()  # the last trial's model, which a cycle in the trainer holds
        best = _winner(reports, options.choose_by)
        for other in range(number + 1) if leads() else ():
            _keep_only(folder / f"trial-{other}", reports[best]["best_step"] if other == best else None)
    return reports, _winner(reports, trials[0].choose_by)


def _keep_only(home: Path, step: int | None) -> None:
    for path in home.glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)


def _winner(reports: list[dict[str, Any]], choose_by: str) -> int:
    standings = [
        standing(**report["after"], choose_by=choose_by) if report["after"] else 0.0 for report in reports
    ]
    return standings.index(min(standings))


def _trial(bench: Bench, options: Train, home: Path) -> dict[str, Any]:
    """Train one trial in `home`, or go on with it; the report on it, as JSON values."""
    from moemerge.training.trainer import make_trainer

    clock = time.perf_counter()
    model, roles = prepare(bench, options, bench.device, options.sharded)
    counts = _count(model, roles)
    bench.draft.reserve(
        training_space(counts["model"], counts["trained"], options), there=size_of(home.parent)
    )
    data = (bench.pairs, bench.held_out, home, bench.candidates)
    trainer = make_trainer(options, model, bench.tokenizer, roles, *data)
    before = trainer.measure() if bench.held_out else None
    state = _fit(trainer, options, before, home)
    assigned = trainer.schedule.sizes if trainer.schedule else []
    return report(state, before, options.choose_by) | {
        "parameters": counts,
        FLOPS: training_flops(bench, options, state["global_step"]),
        **({"assigned": assigned} if assigned else {}),
        "seconds": round(time.perf_counter() - clock, 3),
    }


def _fit(trainer: Any, options: Train, before: dict[str, float] | None, home: Path) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; the state that the trainer left."""
    from moemerge.training.callbacks import Patience, exhausted
    from moemerge.training.trainer import last_checkpoint, read_state

    start = standing(**before, choose_by=options.choose_by) if before else math.inf
    last = last_checkpoint(home)
    if last is not None:
        state = read_state(last)
        stopped = before is not None and exhausted(state["log_history"], options, start)
        if stopped or state["global_step"] >= state["max_steps"]:
            return state
        log.info("going on from step %d", state["global_step"])
    if before and options.patience is not None:
        trainer.add_callback(Patience(options, start))
    trainer.train(resume_from_checkpoint=last and str(last))
    last = last_checkpoint(home)
    assert last is not None
    return read_state(last)


def finished(bench: Bench, options: Train, home: Path, step: int) -> PreTrainedModel:
    """The model as loaded, with the weights of `step` (0: its own) and without any trace of LoRA."""
    model, roles = prepare(bench, options, torch.device("cpu"))
    if step:
        load_trained(model, home / f"checkpoint-{step}")
    require_finite(model, roles)
    _merge_lora(model)
    return model


def require_finite(model: PreTrainedModel, roles: Iterable[str]) -> None:
    """Raise OptionError if a weight that trained is not finite, of a model in parts in any process."""
    names = [*roles]
    own = [processes.own_part(model.get_parameter(name)) for name in names]
    counts = torch.stack([(~weight.isfinite()).sum().cpu() for weight in own])
    if processes.is_sharded(model):
        counts = processes.summed(counts)
    broken = [name for name, count in zip(names, counts.tolist(), strict=True) if count]
    if broken:
        raise OptionError(
            "training diverged",
            given=f"{len(broken)} tensors are no longer finite, such as {broken[0]}",
            expected="finite weights",
            fix="lower the learning rates, or give validation pairs so that the best weights are kept",
        )


def prepare(
    bench: Bench, options: Train, device: torch.device, sharded: bool = False
) -> tuple[PreTrainedModel, dict[str, str]]:
    """The model with exactly the intended parameters to train, and the role of each of these."""
    head, dtype = options if options.head is not None else None, getattr(torch, options.weights)
    model = load_reward_model(bench.model, device, dtype, options.seed, Placement(sharded=sharded), head)
    if options.trainable == "lora":
        _add_lora(model, options)
    roles = trained_parameters(model, options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in roles)
    return model, roles


def trained_parameters(model: PreTrainedModel, options: Train) -> dict[str, str]:
    """Name -> role (experts, routers, head or rest) of every parameter that `options` let train.

    Experts of a dense model are its MLPs. The head, in an encoder with its pooler, always trains, and has a
    role where it has a rate; LoRA's own parameters train too. Raises OptionError for layers that the model
    lacks.
    """
    path, layers = family_of(model.config).dense_layers(model)
    chosen = parse_layers(options.train_layers, len(layers))
    prefixes = tuple(f"{path}.{number}." for number in chosen) if options.train_layers != "all" else ("",)
    roles = roles_of(model)
    if options.head_learning_rate is not None:
        roles |= {name: "head" for name, _ in model.named_parameters() if in_head(model, name)}

    def trains(name: str) -> bool:
        wanted = options.trainable == "full" or name in roles or ".lora_" in name
        return in_head(model, name) or (wanted and name.startswith(prefixes))

    return {name: roles.get(name, "rest") for name, _ in model.named_parameters() if trains(name)}


def _count(model: PreTrainedModel, roles: dict[str, str]) -> dict[str, int]:
    """Numbers of parameters: per role, and of the whole model in training."""
    counts: Counter[str] = Counter()
    for name, role in roles.items():
        counts[role] += model.get_parameter(name).numel()
    return {**counts, "trained": sum(counts.values()), "model": sum(p.numel() for p in model.parameters())}


def _add_lora(model: PreTrainedModel, options: Train) -> None:
    """Put LoRA on the attention linears of the layers that train, drawn from the seed."""
    from peft import LoraConfig, inject_adapter_in_model

    path, layers = family_of(model.config).dense_layers(model)
    targets = [
        f"{path}.{number}.{name}"
        for number in parse_layers(options.train_layers, len(layers))
        for name, module in layers[number].named_modules()
        if isinstance(module, nn.Linear | Conv1D) and ("attn" in name or "attention" in name)
    ]
    if not targets:
        raise UnsupportedError(
            "LoRA finds no attention linears",
            given=f"model_type {model.config.model_type}",
            expected="linear modules under a name with attn or attention",
            fix="set trainable to full or experts",
        )
    torch.manual_seed(options.seed)
    alpha: Any = options.lora_alpha  # peft takes any number, its annotation says int
    transposed = isinstance(model.get_submodule(targets[0]), Conv1D)
    config = LoraConfig(
        r=options.lora_rank, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=transposed
    )
    inject_adapter_in_model(config, model)


def _merge_lora(model: PreTrainedModel) -> None:
    """Add LoRA's products to the weights and put the plain linears back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    vars(model).pop("peft_config", None)

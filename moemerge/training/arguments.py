"""TRL's training arguments from the options of a stage."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)
from trl.trainer.reward_config import RewardConfig

from moemerge.artifacts import ranks
from moemerge.artifacts.progress import hidden
from moemerge.errors import MoemergeError, OptionError, first_line, unknown
from moemerge.options.base import Run
from moemerge.options.train import Train
from moemerge.options.trainer import FIXED, OPTION_OF

C = TypeVar("C", bound=TrainingArguments)

NOT_OURS = {*OPTION_OF, *FIXED}
LOGS_PER_EVALUATION = 10
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def reward_arguments(
    options: Train, device: torch.device, num_pairs: int, evaluates: bool, folder: Path
) -> RewardConfig:
    """Those of a training on `num_pairs` pairs whose checkpoints go to `folder`."""
    every, logged = _intervals(options, num_pairs)
    settings = {
        "output_dir": str(folder.resolve()),
        "run_name": f"{options.output.name}/{folder.name}",
        "seed": options.seed,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": own_batch(options),
        "gradient_accumulation_steps": options.gradient_accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": SCHEDULES[options.schedule],
        # Rounded down: a short run must not spend its only step at rate zero.
        "warmup_steps": int(options.warmup * options.total_steps(num_pairs)),
        "max_grad_norm": options.max_grad_norm,
        "bf16": autocasts(options.precision, device),
        "use_cpu": device.type == "cpu",
        "gradient_checkpointing": options.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "train_sampling_strategy": "group_by_length" if options.group_by_length else "random",
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 2,  # the best and the last; older ones go once the last is whole
        "metric_for_best_model": f"eval_{options.choose_by}",
        "greater_is_better": options.choose_by == "accuracy",
        "logging_steps": logged,
        # By default transformers leaves a loss that is not finite out of the sum, and tells 0.0 in its place.
        "logging_nan_inf_filter": False,
    }
    return make_config(RewardConfig, settings | _plain(device) | _of_trl(options.trainer))


def _plain(device: torch.device) -> dict[str, Any]:
    """No reports to trackers unless asked for, and data as it comes: pairs are cut to length before."""
    return {
        "report_to": "none",
        "disable_tqdm": hidden(),
        "max_length": None,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "include_num_input_tokens_seen": "non_padding",
    }


def make_config(kind: type[C], settings: dict[str, Any]) -> C:
    """TRL's training arguments of a `kind` for one device."""
    with warnings.catch_warnings():
        # TRL still uses transformers' old name for activation checkpointing.
        warnings.simplefilter("ignore", FutureWarning)
        config = kind(**settings)
    config._n_gpu = min(config.n_gpu, 1)  # TRL refuses DataParallel; one process trains on one GPU
    return config


def trainer_faults(keys: Mapping[str, Any], where: str = "trainer") -> list[MoemergeError]:
    """What TRL and the trackers at hand do not know or take of `keys`, which stand in the option `where`."""
    faults: list[MoemergeError] = []
    types = get_type_hints(RewardConfig)
    for key, value in keys.items():
        if key not in types:
            faults.append(
                unknown(f"key of TRL's RewardConfig in {where}", key, sorted(types.keys() - NOT_OURS))
            )
            continue
        try:
            given = _taken(types[key], value)
        except ValidationError as error:
            faults.append(_mistyped(f"{where}.{key}", value, error.errors()[0]["msg"]))
        else:
            faults += tracker_faults(given, f"{where}.{key}") if key == "report_to" else []
    return faults or [*_refused_by_trl(keys, where)]


def _refused_by_trl(keys: Mapping[str, Any], where: str) -> Iterator[MoemergeError]:
    """What TRL says of keys that are right each by itself."""
    plain = {"output_dir": "unused", "use_cpu": True, "bf16": False, **_plain(torch.device("cpu"))}
    try:
        make_config(RewardConfig, plain | _of_trl(keys))
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        yield OptionError(
            f"TRL takes no such {where}",
            given=repr(dict(keys))[:200],
            expected=first_line(error),
            fix=f"correct {where}",
        )


def _of_trl(keys: Mapping[str, Any]) -> dict[str, Any]:
    """`keys` as the types that TRL wants: the command line gives texts."""
    types = get_type_hints(RewardConfig)
    return {key: _taken(types[key], value) for key, value in keys.items()}


def _taken(kind: Any, value: Any) -> Any:
    return TypeAdapter(kind, config={"arbitrary_types_allowed": True}).validate_python(value)


def _mistyped(where: str, value: Any, expected: str) -> OptionError:
    return OptionError(
        f"bad option {where}", given=repr(value)[:200], expected=expected, fix=f"correct {where}"
    )


def tracker_faults(names: str | Sequence[str] | None, where: str) -> Iterator[MoemergeError]:
    """The names in `where` that transformers reports to none of, or whose package is not installed."""
    for name in [names] if isinstance(names, str) else names or ():
        if name not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            yield unknown(f"tracker in {where}", name, INTEGRATION_TO_CALLBACK)
        elif name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
            yield OptionError(
                f"{where}: {name} is not installed",
                given=name,
                expected="a tracker whose package can be imported",
                fix=f"pip install {name}, or leave it out",
            )


def keep_curves(trainer: Trainer, folder: Path) -> None:
    """Have TensorBoard's files written to `folder`: the trainer's own output goes once a stage is done."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def curves_of(options: Run, name: str) -> Path:
    """Where they go: beside the stage's output, in tensorboard/, a folder per output and run in it."""
    return options.output.absolute().parent / "tensorboard" / options.output.name / name


def autocasts(precision: str, device: torch.device) -> bool:
    """Whether training runs under bfloat16 autocast."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bfloat16"


def own_batch(options: Train) -> int:
    """Pairs per step of this process. Raises OptionError if several cannot share a step's evenly."""
    own, left = divmod(options.batch_size, ranks.count())
    if left:
        raise OptionError(
            "a step's pairs cannot be shared evenly",
            given=f"batch_size {options.batch_size}, {ranks.count()} processes",
            expected="a batch_size that the number of processes divides: it counts the pairs of all",
            fix=f"set batch_size to {options.batch_size + ranks.count() - left}",
        )
    return own


def _intervals(options: Train, num_pairs: int) -> tuple[int, int]:
    """Steps between evaluations, and between log entries: a divisor, so that a resumed log goes on evenly."""
    every = options.steps_between_evaluations(num_pairs)
    wanted = max(1, every // LOGS_PER_EVALUATION)
    # The trainer logs means since its last entry. Checkpoints are written at evaluations, so an entry has to
    # end at each: else the first one after a resume would be of fewer steps than in an unbroken run.
    return every, next(steps for steps in range(wanted, 0, -1) if every % steps == 0)

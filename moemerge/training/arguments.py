"""TRL's training arguments from the options of a stage."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments
from trl.trainer.reward_config import RewardConfig

from moemerge.options.train import Train

C = TypeVar("C", bound=TrainingArguments)

EVALUATIONS = 10
LOGS_PER_EVALUATION = 10
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def reward_arguments(
    options: Train, device: torch.device, num_pairs: int, evaluates: bool, folder: Path
) -> RewardConfig:
    """Those of a training on `num_pairs` pairs whose checkpoints go to `folder`."""
    every, logged = _intervals(options, num_pairs)
    settings = {
        "output_dir": str(folder.resolve()),
        "seed": options.seed,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": SCHEDULES[options.schedule],
        # Rounded down: a short run must not spend its only step at rate zero.
        "warmup_steps": int(options.warmup * total_steps(options, num_pairs)),
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
    return make_config(RewardConfig, settings | _quiet(device))


def _quiet(device: torch.device) -> dict[str, Any]:
    """No reports to trackers, and data as it comes: pairs are cut to length before."""
    return {
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
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


def autocasts(precision: str, device: torch.device) -> bool:
    """Whether training runs under bfloat16 autocast."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bfloat16"


def total_steps(options: Train, num_pairs: int) -> int:
    """Optimiser steps of a whole run over `num_pairs` pairs."""
    passes = math.ceil(num_pairs / options.batch_size)
    per_epoch = math.ceil(passes / options.gradient_accumulation)
    return options.max_steps or math.ceil(options.epochs * per_epoch)


def _intervals(options: Train, num_pairs: int) -> tuple[int, int]:
    """Steps between evaluations, and between log entries: a divisor, so that a resumed log goes on evenly."""
    every = options.eval_steps or max(1, total_steps(options, num_pairs) // EVALUATIONS)
    wanted = max(1, every // LOGS_PER_EVALUATION)
    # The trainer logs means since its last entry. Checkpoints are written at evaluations, so an entry has to
    # end at each: else the first one after a resume would be of fewer steps than in an unbroken run.
    return every, next(steps for steps in range(wanted, 0, -1) if every % steps == 0)

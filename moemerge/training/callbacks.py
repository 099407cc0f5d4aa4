"""What moemerge adds to the course of a training: the pad token that holds meanwhile, and an early end."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from moemerge.artifacts.progress import PROGRESS
from moemerge.models.pooling import set_pad
from moemerge.options.train import Train
from moemerge.training.report import standings


class Pooling(TrainerCallback):
    """Names the pad token that batches are padded with.

    TRL, and transformers once more when training begins, name the tokenizer's: the model would be trained at
    another token than the one that its score is read from.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name it."""
        set_pad(kwargs["model"].config, self.pad)


class Telling(TrainerCallback):
    """Says how far the training has come."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say it."""
        PROGRESS.words = f", step {state.global_step} of {state.max_steps}"


class Patience(TrainerCallback):
    """Stops training once `patience` evaluations in a row stood no better than the best before them."""

    def __init__(self, options: Train, start: float) -> None:
        self.options, self.start = options, start

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask the trainer to stop."""
        if exhausted(state.log_history, self.options, self.start):
            control.should_training_stop = True


def exhausted(history: list[dict[str, Any]], options: Train, start: float) -> bool:
    """Whether the last `options.patience` evaluations all stood no better than the best before them.

    `start` is the standing before training (report.standing).
    """
    values = [start, *standings(history, options.choose_by)]
    since_best = len(values) - 1 - values.index(min(values))
    return options.patience is not None and since_best >= options.patience

"""What a run will take, before it begins: steps, tokens, time, memory and disk, step by step.

Sizes come from the models' configs, lengths from rows drawn from the data, time from timing one layer of the
model for a moment. It is an estimate: early stopping makes runs shorter, other work on the machine longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.artifacts.disk import free_space, in_words
from moemerge.artifacts.scorer_file import scorer_file
from moemerge.options.base import Run
from moemerge.options.data import Data
from moemerge.options.recipe import Recipe
from moemerge.run.check import load_recipe
from moemerge.run.plan import by_seed, plan

if TYPE_CHECKING:
    from moemerge.run.work import Work

MINUTE, HOUR = 60, 3600


@dataclass(frozen=True)
class Forecast:
    """`Work` by the name of its step, and what is at hand for it; `where`: the device in words."""

    output: Path
    work: Mapping[str, Work]
    where: str
    memory_at_hand: int

    def line(self, name: str) -> str:
        """What a step takes, in words; nothing for one that takes next to nothing."""
        work = self.work[name]
        time = "time not estimated" if work.seconds is None else duration(work.seconds) if work.tokens else ""
        parts = [
            f"{work.steps:,} steps" if work.steps else "",
            f"{work.tokens / 1000:,.0f}k tokens" if work.tokens else "",
            time,
            f"writes {in_words(int(work.kept))}" if work.kept else "",
        ]
        return ", ".join(part for part in parts if part)

    @property
    def seconds(self) -> float:
        """Of all steps that can be foreseen."""
        return sum(work.seconds or 0.0 for work in self.work.values())

    def sentences(self) -> Iterator[str]:
        """The whole, in a few lines: an estimate, what it needs at most, and what there is too little of."""
        largest = max(self.work, key=lambda name: self.work[name].memory)
        memory, kept = self.work[largest].memory, sum(work.kept for work in self.work.values())
        disk, free = kept + max(work.disk for work in self.work.values()), free_space(self.output)
        unknown = [name for name, work in self.work.items() if work.seconds is None]
        without = f", without {', '.join(unknown)}" if unknown else ""
        yield (
            f"Estimate, from timing one layer: {duration(self.seconds)} on {self.where}{without}; early "
            "stopping may make it shorter, other work on this machine longer."
        )
        space = (
            f" Disk: {in_words(int(kept))} in {self.output}, {in_words(int(disk))} at most while it runs, "
            f"{in_words(free)} free."
        )
        yield (
            f"Memory: up to {in_words(int(memory))} ({largest}), {in_words(self.memory_at_hand)} at hand."
            + space * (disk > 0)  # a run that writes no models takes next to none
        )
        if memory > self.memory_at_hand:
            yield (
                f"warning: {largest} may need more memory than there is: lower batch_size or max_length, "
                "or let fewer layers have experts and train (upcycle.layers, train_layers)"
            )
        if disk > free:
            yield "warning: the run may need more disk than is free: choose another output"


def duration(seconds: float) -> str:
    """About so long, in words."""
    if seconds < MINUTE:
        return "less than a minute"
    hours, minutes = divmod(round(seconds / MINUTE), MINUTE)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"


def forecast(recipe: Recipe | Run | str | Path) -> Forecast | str:
    """What the run of a recipe (or of the recipe file) is thought to take, or why that cannot be told.

    Reads configs, tokenizer and rows of data, no weights; nothing is asked of the hub. Raises OptionError or
    Faults for a file with faults, DataError for rows that no run could be made of.
    """
    if isinstance(recipe, str | Path):
        return forecast(load_recipe(recipe))
    if isinstance(recipe, Recipe) and recipe.synthetic:
        return "no estimate of time: the run makes its model and data itself"
    run = by_seed(recipe)[0] if isinstance(recipe, Recipe) and recipe.seeds else recipe
    steps = plan(run)
    data = next((step.options for step in steps if step.stage == "data"), None)
    if not isinstance(data, Data) or data.tokenizer is None:
        return "no estimate: this run reads no pairs of its own"
    if scorer_file(data.tokenizer) is not None:
        return "no estimate: what a scorer that is no classifier takes is not known"
    sources = [source for source in (data.train, data.validation, data.fit, *data.tests.values()) if source]
    absent = [source for source in (data.tokenizer, *sources) if not Path(source).exists()]
    if absent:
        return f"no estimate of time: {absent[0]} is not on this disk yet"
    from moemerge.run.data_check import check_rows

    check_rows(data, steps)
    from moemerge.run.work import Foreseen

    foreseen = Foreseen.of(data, run)
    if foreseen is None:
        return "no estimate of time: a layer of this architecture cannot be timed alone"
    times = max(1, len(recipe.seeds)) if isinstance(recipe, Recipe) else 1
    work = {step.name: _repeated(foreseen.work(step), times) for step in steps}
    return Forecast(recipe.output, work, foreseen.where, foreseen.memory_at_hand)


def _repeated(work: Work, times: int) -> Work:
    """The work of as many runs, one after another."""
    seconds = None if work.seconds is None else times * work.seconds
    steps, tokens, kept = times * work.steps, times * work.tokens, times * work.kept
    return replace(work, steps=steps, tokens=tokens, seconds=seconds, kept=kept)

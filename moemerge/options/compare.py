"""Options of compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, field_validator

from moemerge.options.base import Run, SourceList


class Compare(Run):
    """Options of `moemerge compare`."""

    POSITIONAL = ("runs",)

    runs: SourceList = Field(description="runs, evaluations, or folders of these: one per seed")
    baseline: str | None = Field(
        None, description="model that the others are compared with (default: control, or evaluate's own)"
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals over seeds")

    @field_validator("runs")
    @classmethod
    def _find_evaluations(cls, runs: list[str]) -> list[str]:
        return list(dict.fromkeys(home for run in runs for home in (list(_evaluations(run)) or [run])))


def _evaluations(folder: str) -> Iterator[str]:
    """The evaluations in a folder: itself, that of a run, or those of the runs that lie in it."""
    evaluation = _evaluation(Path(folder))
    if evaluation is not None:
        yield str(evaluation)
    elif Path(folder).is_dir():
        within = map(_evaluation, sorted(Path(folder).glob("[!.]*")))
        yield from (str(evaluation) for evaluation in within if evaluation is not None)


def _evaluation(folder: Path) -> Path | None:
    """The evaluation that a folder is, or that the run in it holds; None if it is neither."""
    homes = (folder, folder / "evaluate")
    return next((home for home in homes if (home / "report.json").exists()), None)

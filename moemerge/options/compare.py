"""Options of compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, field_validator

from moemerge.options.base import Run, SourceList


class Compare(Run):
    """Options of `moemerge compare`."""

    runs: SourceList = Field(description="runs, evaluations, or folders that hold some: one per seed")
    baseline: str | None = Field(
        None, description="model that the others are compared with (default: control, or evaluate's own)"
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals over seeds")

    @field_validator("runs")
    @classmethod
    def _find_evaluations(cls, runs: list[str]) -> list[str]:
        return list(dict.fromkeys(found for run in runs for found in (list(_evaluations(run)) or [run])))


def _evaluations(folder: str) -> Iterator[str]:
    """The evaluations in a folder: itself, that of a run, or those of the runs that lie in it."""
    for place in (Path(folder), Path(folder) / "evaluate"):
        if (place / "report.json").exists():
            yield str(place)
            return
    if Path(folder).is_dir():
        for child in sorted(Path(folder).glob("[!.]*")):
            found = [place for place in (child, child / "evaluate") if (place / "report.json").exists()]
            yield from map(str, found[:1])

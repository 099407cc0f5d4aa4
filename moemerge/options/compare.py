"""Options of comparisons: a recipe's baselines, and the stage compare. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from moemerge.options.base import Options, Run, SourceList


class BaselineSettings(Options):
    """What a MoE and its merges are measured against besides the control; all train as the control does."""

    same_flops: bool = Field(
        False, description="the control once more, longer: as many FLOPs as training the MoE takes"
    )
    fine_tunes: int = Field(
        0,
        ge=0,
        description="number of fine-tunes of the dense model, in other orders, to average and combine",
    )
    budget: Literal["full", "split"] = Field(
        "full",
        description="of each fine-tune; full: the control's, which is one of them then; split: a share of it",
    )
    warm: bool = Field(True, description="with fine_tunes: their average (WARM, arXiv 2401.12187)")
    ensemble: bool = Field(
        True, description="with fine_tunes: their scores combined, as evaluate.ensemble_by says"
    )

    tuned: bool = Field(
        False, description="the control trained on, on data.fit, which learned coefficients have seen too"
    )

    @model_validator(mode="after")
    def _more_than_one(self) -> BaselineSettings:
        if self.fine_tunes == 1:
            raise ValueError("fine_tunes: one alone is no ensemble")
        return self


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

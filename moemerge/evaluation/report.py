"""What evaluate and compare wrote, read again: only in the form that this version writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import read_object
from moemerge.errors import ArtifactError

# Raised whenever something that is read again changes its name or meaning; versions before 2 wrote no number.
FORMAT = 2
NAMES = {"evaluate": "report.json", "compare": "compare.json"}

Report = dict[str, Any]


def read_report(folder: str | Path, stage: str = "evaluate") -> dict[str, Any]:
    """The report that `stage` wrote into `folder`. Raises ArtifactError if it is none of this format."""
    path = Path(folder) / NAMES[stage]
    try:
        report = read_object(path)
        found = f"format {report.get('format', 'without a number')}"
    except (OSError, ValueError) as error:
        report, found = {}, str(error)
    if report.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} cannot be shown by this version of moemerge",
            given=found,
            expected=f"format {FORMAT}",
            fix=f"{stage} again with this version, or read it with the version in the folder's manifest.json",
        )
    return report


def outdated(folder: str | Path, stage: str) -> str | None:
    """Why what `stage` wrote into `folder` must be made again; None where all is well."""
    if stage in NAMES:
        try:
            read_report(folder, stage)
        except ArtifactError as error:
            return f"its {NAMES[stage]} is of {error.given}, not {error.expected}"
    return None


def _sets(report: Report, probe: str) -> dict[str, Any]:
    return dict(report["probes"].get(probe, {}).get("sets", {}))


def rewardbench_parts(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The scores to show first: overall ones; of a part of a benchmark its sections, else its subsets."""
    return dict(measured["overall"] or measured["sections"] or measured["subsets"])


def _rewardbench_title(name: str, measured: Mapping[str, Any], part: str) -> str:
    return f"RewardBench {measured['version']} {name}, {part}"

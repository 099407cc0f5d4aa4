"""What an evaluation measures. To add a probe: one file and one line here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moemerge.registry import Registry

if TYPE_CHECKING:
    from moemerge.evaluation.probes.base import Probe

PROBES: Registry[Probe] = Registry(
    "probe",
    {
        "accuracy": "moemerge.evaluation.probes.accuracy:PROBE",
        "calibration": "moemerge.evaluation.probes.calibration:PROBE",
        "rewardbench": "moemerge.evaluation.probes.rewardbench:PROBE",
        "rmbench": "moemerge.evaluation.probes.rmbench:PROBE",
        "best_of_n": "moemerge.evaluation.probes.best_of_n:PROBE",
        "length": "moemerge.evaluation.probes.length:PROBE",
        "style": "moemerge.evaluation.probes.style:PROBE",
        "flattery": "moemerge.evaluation.probes.flattery:PROBE",
        "confidence": "moemerge.evaluation.probes.confidence:PROBE",
        "boilerplate": "moemerge.evaluation.probes.boilerplate:PROBE",
        "irrelevance": "moemerge.evaluation.probes.irrelevance:PROBE",
        "damage": "moemerge.evaluation.probes.damage:PROBE",
    },
    group="probes",
    needs=("needs", "measure", "tables", "plot", "edits"),
)
BIASES = ("length", "style", "flattery", "confidence", "boilerplate", "irrelevance", "damage")


def expand(names: Iterable[str]) -> list[str]:
    """`names` without repeats, `biases` replaced by all bias probes."""
    listed = [probe for name in names for probe in (BIASES if name == "biases" else (name,))]
    return list(dict.fromkeys(listed))

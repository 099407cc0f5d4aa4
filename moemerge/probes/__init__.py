"""What an evaluation measures. To add a probe: one file and one line here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moemerge.registry import Registry

if TYPE_CHECKING:
    from moemerge.probes.base import Probe

PROBES: Registry[Probe] = Registry(
    "probe",
    {
        "accuracy": "moemerge.probes.accuracy:PROBE",
        "calibration": "moemerge.probes.calibration:PROBE",
        "rewardbench": "moemerge.probes.rewardbench:PROBE",
        "best_of_n": "moemerge.probes.best_of_n:PROBE",
        "length": "moemerge.probes.length:PROBE",
        "style": "moemerge.probes.style:PROBE",
        "flattery": "moemerge.probes.flattery:PROBE",
        "confidence": "moemerge.probes.confidence:PROBE",
        "boilerplate": "moemerge.probes.boilerplate:PROBE",
        "irrelevance": "moemerge.probes.irrelevance:PROBE",
        "damage": "moemerge.probes.damage:PROBE",
    },
)
BIASES = ("length", "style", "flattery", "confidence", "boilerplate", "irrelevance", "damage")


def expand(names: Iterable[str]) -> list[str]:
    """`names` without repeats, `biases` replaced by all bias probes."""
    listed = [one for name in names for one in (BIASES if name == "biases" else (name,))]
    return list(dict.fromkeys(listed))

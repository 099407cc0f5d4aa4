"""What an evaluation measures. To add a probe: one file and one line here."""

from __future__ import annotations

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
    },
)

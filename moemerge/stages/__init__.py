"""The stages by name. To add one: one file and one line here."""

from __future__ import annotations

from typing import Any

from moemerge.artifacts.stage import Stage
from moemerge.registry import Registry

# Every stage by the name in its manifests, in pipeline order.
STAGES: Registry[Stage[Any]] = Registry(
    "stage",
    {
        "synthetic": "moemerge.stages.synthetic:write_world",
        "data": "moemerge.stages.data:prepare",
        "upcycle": "moemerge.stages.upcycle:upcycle",
        "train": "moemerge.stages.train:train",
        "route": "moemerge.stages.route:route",
        "fit": "moemerge.stages.fit:fit",
        "merge": "moemerge.stages.merge:merge",
        "export": "moemerge.stages.export:export",
        "sample": "moemerge.stages.sample:sample",
        "optimise": "moemerge.stages.optimise:optimise",
        "evaluate": "moemerge.stages.evaluate:evaluate",
        "attack": "moemerge.stages.attack:attack",
        "publish": "moemerge.stages.publish:publish",
        "compare": "moemerge.stages.compare:compare",
    },
)

"""What a step of a run came to, in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.reports.headlines import plain
from moemerge.stages import ROWS

if TYPE_CHECKING:
    from moemerge.artifacts.manifest import Manifest

HEADLINES = {row.name: row.headline for row in ROWS}


def headline(manifest: Manifest) -> str:
    """What the stage that wrote `manifest` came to.

    Another version of moemerge may have given its results other names: of those, single values as they stand.
    Raises ArtifactError for results that the stage does not write.
    """
    from moemerge.artifacts.environment import package_version
    from moemerge.artifacts.manifest import written_by_stages

    stage, results = manifest["stage"], manifest["results"]
    if manifest["versions"].get("moemerge", "unknown") != package_version():
        return plain(results)
    with written_by_stages(f"the results of stage {stage} cannot be shown", "run the stage again"):
        return HEADLINES[stage](results)

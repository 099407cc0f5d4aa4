"""Trainings that cost as many FLOPs as others did."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from moemerge.artifacts.manifest import holds_manifest, read_manifest
from moemerge.errors import ArtifactError
from moemerge.models.folder import ModelFolder
from moemerge.options.train import Train
from moemerge.training.bench import Bench
from moemerge.training.flops import FLOPS, training_flops
from moemerge.training.trials import trials_of

log = logging.getLogger(__name__)


def budgeted(options: Train, bench: Bench) -> tuple[Train, float | None]:
    """The options, with the steps that cost what `flops_of` names cost, and how many times as many these are.

    Raises ArtifactError for an output that does not say what it cost.
    """
    if not options.flops_of:
        return options, None
    wanted = sum(_cost_of(source, options, bench) for source in options.flops_of)
    ratio = wanted / _asked_for(bench, options)
    log.info("training %.3g times as long, for as many FLOPs as %s", ratio, ", ".join(options.flops_of))
    return options.scaled(ratio), ratio


def _cost_of(source: str, options: Train, bench: Bench) -> float:
    """What an output of ours cost; of a model that we did not train: what these options would cost on it."""
    folder = Path(source)
    if not (holds_manifest(folder) and read_manifest(folder)["stage"] in ("train", "strength")):
        return _asked_for(replace(bench, model=ModelFolder(source, options.trust_remote_code)), options)
    found = read_manifest(folder)["results"].get(FLOPS)
    if not isinstance(found, int | float) or not found > 0:
        raise ArtifactError(
            f"{source} does not say how many FLOPs it took",
            given=f"{FLOPS}: {found}",
            expected="an output that this version of moemerge wrote",
            fix="make it again with this version, or name another folder in flops_of",
        )
    return float(found)


def _asked_for(bench: Bench, options: Train) -> float:
    return sum(training_flops(bench, trial) for trial in trials_of(options))

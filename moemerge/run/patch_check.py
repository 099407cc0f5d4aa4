"""What is wrong with a patch, found before anything runs; no weights are opened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moemerge.errors import MoemergeError
from moemerge.models.folder import ModelFolder
from moemerge.options.base import input_fields
from moemerge.options.patch import Patch
from moemerge.run.faults import headless, layer_faults, missing_inputs, named, occupied


def patch_faults(options: Patch, section: str = "") -> list[MoemergeError]:
    """Every fault that can be told; `section` stands before option names."""
    return list(_faults(options, section))


def _faults(options: Patch, section: str) -> Iterator[MoemergeError]:
    yield from missing_inputs(input_fields(options), section)
    yield from occupied(options.output)
    from moemerge.evaluation.attack_edits import chosen_edits  # imports scipy

    try:
        chosen_edits(options.unseen, options.words, has_gold=options.has_gold)
    except MoemergeError as fault:
        yield fault
    if Path(options.model).is_dir():
        faults = [*headless({named("model", section): options.model})]
        layers = {named("train_layers", section): options.train_layers}
        yield from faults or layer_faults(layers, ModelFolder(options.model).config_json)

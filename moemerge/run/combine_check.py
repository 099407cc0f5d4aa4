"""What is wrong with a combination, found before anything runs; no weights are opened."""

from __future__ import annotations

from pathlib import Path

from moemerge.errors import MoemergeError, UnsupportedError
from moemerge.models.families import family_called
from moemerge.models.folder import ModelFolder
from moemerge.options.base import input_fields
from moemerge.options.combine import Combine
from moemerge.run.faults import layer_faults, missing_inputs, occupied


def input_faults(options: Combine, section: str = "") -> list[MoemergeError]:
    """Inputs that are not there, and an output that is the user's; `section` stands before option names."""
    return [*missing_inputs(input_fields(options), section), *occupied(options.output)]


def model_faults(options: Combine, section: str = "", on_hub: bool = False) -> list[MoemergeError]:
    """What configs and tokenizers say against the models on this disk, and with `on_hub` against all."""
    from moemerge.merging.sources.likeness import check_models

    models = [source for source in options.models.values() if on_hub or Path(source).is_dir()]
    base = options.base if options.base and (on_hub or Path(options.base).is_dir()) else None
    if not models:
        return []
    try:
        check_models(models, base)
    except MoemergeError as fault:
        return [fault]
    if options.form == "moe" and not family_called(ModelFolder(models[0]).dense_type).causal:
        return [_encoders(models[0], section)]
    layers = {f"{section}.train_layers".strip("."): options.train_layers}
    return list(layer_faults(layers, ModelFolder(models[0]).config_json))


def _encoders(model: str, section: str) -> MoemergeError:
    return UnsupportedError(
        "a mixture that is gated by the prompt needs decoders",
        given=f"{'.'.join(filter(None, (section, 'form')))}: moe, {model}: {ModelFolder(model).model_type}",
        expected="a decoder: in an encoder the states of a prompt see the answer",
        fix="leave form at dense",
    )

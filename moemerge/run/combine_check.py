"""What is wrong with a combination, found before anything runs; no weights are opened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moemerge.data.reading import read_pairs
from moemerge.errors import DataError, MoemergeError, UnsupportedError
from moemerge.models.families import family_called
from moemerge.models.folder import ModelFolder
from moemerge.options.base import input_fields
from moemerge.options.combine import Combine
from moemerge.run.faults import layer_faults, missing_inputs, named, occupied


def input_faults(options: Combine, section: str = "") -> list[MoemergeError]:
    """Inputs that are not there, and an output that is the user's; `section` stands before option names."""
    return [*missing_inputs(input_fields(options), section), *occupied(options.output)]


def model_faults(options: Combine, section: str = "", on_hub: bool = False) -> list[MoemergeError]:
    """What configs and tokenizers say against the models on this disk, and with `on_hub` against all."""
    from moemerge.merging.sources.likeness import check_language_models, check_models

    models = _here(options.models.values(), on_hub)
    base = options.base if options.base and (on_hub or Path(options.base).is_dir()) else None
    if not models:
        return []
    try:
        check_models(models, base)
        check_language_models(models, _here(options.language_models.values(), on_hub))
    except MoemergeError as fault:
        return [fault]
    if options.form == "moe" and not family_called(ModelFolder(models[0]).dense_type).causal:
        return [_encoders(models[0], section)]
    if options.form == "moe" and (on_hub or Path(options.pairs).exists()) and not _prompted(options):
        return [_no_prompts(options, section)]
    layers = {named("train_layers", section): options.train_layers}
    return list(layer_faults(layers, ModelFolder(models[0]).config_json))


def _here(sources: Iterable[str], on_hub: bool) -> list[str]:
    return [source for source in sources if on_hub or Path(source).is_dir()]


def _prompted(options: Combine) -> bool:
    """Whether any pair has a prompt; also true of pairs that cannot be read, of which the step data tells."""
    try:
        return any(pair.prompt for pair in read_pairs(options.pairs, options)[0])
    except MoemergeError:
        return True


def _no_prompts(options: Combine, section: str) -> MoemergeError:
    return DataError(
        "a mixture that is gated by the prompt needs pairs with prompts",
        given=f"{named('form', section)}: moe, {options.pairs}: none has a prompt",
        expected="pairs whose prompts stand in a column of their own, or as messages before the answers",
        fix="give the prompts (their column's name: fields prompt=NAME), or leave form at dense",
    )


def _encoders(model: str, section: str) -> MoemergeError:
    return UnsupportedError(
        "a mixture that is gated by the prompt needs decoders",
        given=f"{named('form', section)}: moe, {model}: {ModelFolder(model).model_type}",
        expected="a decoder: in an encoder the states of a prompt see the answer",
        fix="leave form at dense",
    )

"""The dense model behind a config: its own config, class and skeleton without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from typing import Any, cast

import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from moemerge.errors import CheckpointError, MoemergeError
from moemerge.models.families.base import PREFIX
from moemerge.models.heads.saved import FIELD, head_field

# Keys of config.json that say what wrote it, not what the architecture computes.
NOT_CARRIED = ("moemerge", "auto_map", "model_type", "architectures", "transformers_version")


@contextmanager
def describes_model(kind: str) -> Iterator[None]:
    """Raise CheckpointError for whatever the classes of a model_type raise at a config without sense."""
    try:
        yield
    except MoemergeError:
        raise
    except Exception as error:  # sizes and names that the classes do not expect may make them raise anything
        raise CheckpointError(
            "the config describes no model that can be made",
            given=f"{kind}: {type(error).__name__}: {error}"[:500],
            expected="sizes and names that the architecture knows",
            fix="correct config.json, or copy the model again whole",
        ) from error


def is_moe(config: PretrainedConfig) -> bool:
    """Whether `config` belongs to a moemerge MoE."""
    return config.model_type.startswith(PREFIX) and getattr(config, "moemerge", None) is not None


def dense_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the dense reward model of the same architecture and head; a new object.

    With a head that is not stock it is of our own class too. CheckpointError if there is none.
    """
    if head_field(config) is None:
        return stock_config(config)
    return _config_of(config.model_type, config)


def stock_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same of the stock reward model, whose head is linear."""
    return _config_of(config.model_type.removeprefix(PREFIX), config, FIELD)


def _config_of(kind_name: str, config: PretrainedConfig, *without: str) -> PretrainedConfig:
    left_out = {*NOT_CARRIED, *without}
    values = {key: value for key, value in config.to_dict().items() if key not in left_out}
    with describes_model(config.model_type):
        kind = CONFIG_MAPPING[kind_name]
        dense = kind.from_dict({**values, "model_type": kind.model_type})
        dense.architectures = [dense_class(dense).__name__]
        return dense


def shared_values(config: PretrainedConfig, kind: type[PretrainedConfig]) -> dict[str, Any]:
    """The values of `config` without those that only its own class declares: what one of `kind` may keep."""
    own, theirs = ({field.name for field in fields(declared)} for declared in (type(config), kind))
    return {k: v for k, v in config.to_dict().items() if k not in own - theirs and k not in NOT_CARRIED}


def dense_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The ...ForSequenceClassification class of the dense architecture of `config`, and of its head."""
    if head_field(config) is not None:
        return cast(type[PreTrainedModel], MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])
    kind = CONFIG_MAPPING[config.model_type.removeprefix(PREFIX)]
    return cast(type[PreTrainedModel], MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind])


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The dense reward model on the meta device: names and shapes, no weights. Do not change it."""
    return _skeleton(dense_config(config).to_json_string(use_diff=False))


@lru_cache(maxsize=8)
def _skeleton(text: str) -> PreTrainedModel:
    values: dict[str, Any] = json.loads(text)
    with describes_model(values["model_type"]), torch.device("meta"):
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        return cast(PreTrainedModel, AutoModelForSequenceClassification.from_config(config))

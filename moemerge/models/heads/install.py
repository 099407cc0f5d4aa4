"""Putting heads into configs and models, and drawing them."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from moemerge.errors import UnsupportedError
from moemerge.models import processes
from moemerge.models.families import family_of
from moemerge.models.families.dense import dense_config, is_moe, stock_config
from moemerge.models.head_tensors import output_layer
from moemerge.models.heads import HEADS
from moemerge.models.heads.base import Head, origin_of
from moemerge.models.heads.saved import FIELD, SavedHead, head_field

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from moemerge.options.head import HeadOptions

log = logging.getLogger(__name__)


def install_head(model: PreTrainedModel) -> None:
    """Put the head that `model.config` names where the class has its own; its weights are to come."""
    settings, name = SavedHead.read(head_field(model.config)), output_layer(model)
    own = cast(nn.Linear, model.get_submodule(name))
    with torch.device(own.weight.device):
        head = HEADS.get(settings.kind)(own.in_features, settings)
    model.set_submodule(name, head.to(own.weight.dtype))


def with_new_head(config: PretrainedConfig, options: HeadOptions) -> PretrainedConfig:
    """The config of the same model, dense or a MoE, under the head that `options` ask for; a new object.

    Raises OptionError for a kind that is not known, UnsupportedError for an architecture that is not, and for
    a MoE whose experts have heads of their own.
    """
    stock = HEADS.get(str(options.head)).stock
    family = family_of(config).model_type
    refuse_heads_by_expert(config)
    if is_moe(config):
        new = deepcopy(config)
    elif stock:
        new = stock_config(config)
    else:
        new = _of_our_class(config, family)
    if not stock or head_field(new) is not None:
        setattr(new, FIELD, None if stock else _settings(options).to_dict())
    new.num_labels = 1
    return new


def draw_head(model: PreTrainedModel, options: HeadOptions, seed: int) -> None:
    """Draw the weights of the head that `options` ask for, and have the model's config know its origin.

    The same on any device. options.head_seed, if there is one, stands for `seed`.
    """
    path = output_layer(model)
    drawn = _drawn(options, model, path, seed)
    target = model.get_submodule(path)
    with torch.no_grad():
        if drawn.stock:
            for name, parameter in target.named_parameters():
                values = next(drawn.parameters()) if name == "weight" else torch.zeros(parameter.shape)
                parameter.copy_(processes.placed_like(parameter, values))
            return
        for name, values in drawn.named_parameters():
            parameter = target.get_parameter(name)
            parameter.copy_(processes.placed_like(parameter, values))
    known = SavedHead.read(head_field(model.config))
    setattr(model.config, FIELD, replace(known, origin=origin_of(drawn)).to_dict())
    if told := ", ".join(f"{name} {value:.2f}" for name, value in drawn.facts().items()):
        log.info("new %s head: %s", options.head, told)


def refuse_heads_by_expert(config: PretrainedConfig) -> None:
    """Raise UnsupportedError for a MoE in which each expert has a linear head of its own."""
    values: dict[str, Any] = getattr(config, "moemerge", None) or {}
    if values.get("heads") == "by_expert":
        raise UnsupportedError(
            "a MoE whose experts have heads of their own cannot have one new head",
            given="heads: by_expert",
            expected="a MoE with one head",
            fix="leave head out, or upcycle with heads: shared",
        )


def _drawn(options: HeadOptions, model: PreTrainedModel, path: str, seed: int) -> Head:
    target: Any = model.get_submodule(path)
    head = HEADS.get(str(options.head))(target.in_features, _settings(options))
    own_seed = seed if options.head_seed is None else options.head_seed
    head.draw(torch.Generator().manual_seed(own_seed), options.head_start)
    return head


def _settings(options: HeadOptions) -> SavedHead:
    return SavedHead(
        str(options.head), options.head_width, options.head_dropout, options.noisy_head, origin=""
    )


def _of_our_class(config: PretrainedConfig, family: str) -> PretrainedConfig:
    """The config of a dense model as our own class of the family has it."""
    modelling = import_module("moemerge.models.modelling")
    modelling.register()
    values = dense_config(config).to_dict()
    for name in ("model_type", "auto_map", "moemerge"):
        values.pop(name, None)
    new = cast("PretrainedConfig", modelling.config_class(family)(**values))
    new.architectures = [modelling.model_class(family).__name__]
    return new

"""Model configs as transformers reads them: whatever is wrong with one is a fault of its folder."""

from __future__ import annotations

import logging
import math
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moemerge.errors import CheckpointError, MoemergeError, UnsupportedError, suggest
from moemerge.models.config_values import entries
from moemerge.models.families.base import PREFIX
from moemerge.models.folder import unloadable
from moemerge.models.heads.saved import SavedHead, head_field
from moemerge.models.moe_settings import MoeSettings

if TYPE_CHECKING:
    from moemerge.models.folder import ModelFolder

NO_PAD = -1  # how the first conversions of Llama, and others after them, say that there is none
# Families that count positions from the pad token, and one whose config must have one.
NEEDS_PAD = ("camembert", "data2vec-text", "mpnet", "roberta", "xlm-roberta", "modernbert-decoder")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")

log = logging.getLogger(__name__)


def read_model_config(model: ModelFolder) -> PreTrainedConfig:
    """As ModelFolder.config, which keeps it."""
    try:
        if model.trust_remote_code:
            log_own_code(model.source)
        if model.model_type.startswith(PREFIX):
            import_module("moemerge.models.modelling").register()
        config = AutoConfig.from_pretrained(model.source, trust_remote_code=model.trust_remote_code)
        _settle_pad(config, model.source)
        _leave_out_quantisation(config, model)
        _check_own_parts(config)
        _check_names(config)
    except MoemergeError:
        raise
    except Exception as error:  # a config's class may raise anything at values that it does not expect
        expected = "a model folder or hub name"
        raise unloadable("the model's config cannot be read", model.source, error, expected) from error
    if not model.trusts_own_class:
        _refuse_own_class(model)
    return config


def _refuse_own_class(model: ModelFolder) -> None:
    """The forward pass of such a class, and what it calls its head, are not known.

    mergekit takes such a model for a causal LM and drops the head, and transformers would load the weights
    into another class.
    """
    for name in model.architectures:
        if not hasattr(transformers, name) and not name.startswith("Moemerge"):
            raise UnsupportedError(
                f"{model.source} is of a class of its own, so that its head would be lost or misread",
                given=f"architectures: {name}",
                expected="a class of transformers, such as LlamaForSequenceClassification",
                fix="if its head is one linear layer on the last token, named score, save it again as "
                "...ForSequenceClassification",
            )


def _settle_pad(config: PreTrainedConfig, source: str) -> None:
    """A pad token of -1 is none, as if null stood there; any other that the vocabulary lacks is a fault.

    transformers takes -1 as it stands: decoders then find no padding and score the last pad token.
    """
    text = config.get_text_config()
    pad, size = text.pad_token_id, getattr(text, "vocab_size", None)
    family = text.model_type.removeprefix(PREFIX).replace("_", "-")
    if pad == NO_PAD and family not in NEEDS_PAD:
        text.pad_token_id = config.pad_token_id = None
    elif pad is not None and not 0 <= pad < (size or math.inf):
        raise CheckpointError(
            f"the pad token of {source} is no token",
            given=f"pad_token_id {pad}, a vocabulary of {size}",
            expected="a token of the vocabulary" + ", which this family needs" * (pad == NO_PAD),
            fix="set pad_token_id in its config.json to the one that its tokenizer pads with",
        )


def _leave_out_quantisation(config: PreTrainedConfig, model: ModelFolder) -> None:
    """Float weights under a quantization_config were quantised once, for QLoRA say, and are no longer.

    transformers would quantise them again. Where they are quantised indeed, the config stays: Checkpoint
    refuses them by name.
    """
    if getattr(config, "quantization_config", None) is not None and model.weights.quantised is None:
        log.warning("%s: its quantization_config is left out, as its weights are not quantised", model.source)
        del config.quantization_config


def _check_own_parts(config: PreTrainedConfig) -> None:
    """The layers of a MoE are layers of its model, and a head of ours is one that there is."""
    values = getattr(config, "moemerge", None)
    if not config.model_type.startswith(PREFIX) and values is None:
        return
    head = head_field(config)
    if head is not None:
        SavedHead.read(head)
        if values is None:
            return
    if not isinstance(values, dict):
        raise ValueError("no field moemerge in a MoE's config")
    layers, count = MoeSettings.read(values).layers, config.num_hidden_layers
    if max(layers) >= count:
        raise ValueError(f"experts in layer {max(layers)} of a model of {count} layers")


def _check_names(config: PreTrainedConfig) -> None:
    """Activations and kinds of positions are some that transformers has, which only says KeyError itself."""
    known = {"rope_type": {"default", *ROPE_INIT_FUNCTIONS}} | dict.fromkeys(ACTIVATIONS, set(ACT2FN))
    for name, value in entries(config.get_text_config().to_dict()):
        if isinstance(value, str) and value not in known.get(name, {value}):
            raise ValueError(f"{name} {value[:100]!r} is not known: {suggest(value[:100], known[name])}")


@cache
def log_own_code(source: str) -> None:
    """Log, once for each model, that its own code may run."""
    log.warning("trust_remote_code: code that comes with %s may run", source)

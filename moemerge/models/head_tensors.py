"""Which tensors are a reward head, and what becomes of a model that lacks it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

from moemerge.errors import CheckpointError, few
from moemerge.models.heads.base import head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moemerge.models.folder import ModelFolder

# Heads of language models: left over, rightly, when a base model becomes a reward model.
LANGUAGE_HEADS = (
    "lm_head",
    "cls.",
    "vocab_",
    "mlm_head",
    "embed_out",
    "decoder.weight",
    "decoder.bias",
    "output_projection",
    "discriminator_predictions",
    "generator_predictions",
    "generator_lm_head",
    "lm_predictions",
    "mask_predictions",
)
# Words in names of heads: v_head.summary (TRL, LLaMA-Factory), value_head, reward_head, regression_head, ...
HEAD_WORDS = {"head", "score", "scorer", "classifier", "regression", "reward", "summary", "qa"}
IN_LAYER = re.compile(r"(^|\.)(layers?|blocks?|h)\.\d")

log = logging.getLogger(__name__)


def spare_head(name: str) -> bool:
    """Whether a tensor that the reward model lacks is only a base model's head or pooler."""
    return name.startswith(LANGUAGE_HEADS) or ".pooler." in f".{name}"


def foreign_head(name: str) -> bool:
    """Whether a tensor that the reward model lacks looks like a reward head under another tool's name."""
    words = set(re.split(r"[._]", name))
    return bool(words & HEAD_WORDS) and not (spare_head(name) or "lm_head" in name or IN_LAYER.search(name))


def in_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor is the reward head's. A pooler is: checkpoints of masked language models lack it."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def output_layer(model: PreTrainedModel) -> str:
    """The name of the module whose one output is the score: the head's last matrix, or a head of ours."""
    if (own := head_of(model)) is not None:
        return next(name for name, module in model.named_modules() if module is own)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if in_head(model, f"{name}.weight")][-1]


def output_names(model: PreTrainedModel) -> list[str]:
    """The tensors in proportion to which scores grow: weight and bias of that matrix, or a head's of ours."""
    last, own = output_layer(model), head_of(model)
    if own is not None:
        return [f"{last}.{name}" for name in own.outputs]
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] == last]


def replaced_names(model: PreTrainedModel) -> list[str]:
    """The tensors that another head would take the place of; what lies before it in a head stays."""
    return [name for name in model.state_dict() if name.startswith(f"{output_layer(model)}.")]


def refuse_lost_head(
    model: ModelFolder, lost: Iterable[str], left_over: Iterable[str], needed: bool = False
) -> None:
    """Raise CheckpointError if the head of `model` is not there, and a new one would be a silent change.

    A plain base model never had one, and `fresh_head` allows a new one for any other; neither helps where a
    head is `needed`. `lost`: its tensors that are not there; `left_over`: what the reward model has not.
    """
    names, kinds = few(lost := list(lost)), ", ".join(model.architectures) or "no class"
    if not lost or (model.fresh_head and not needed):
        return
    drawn = "moemerge train with fresh_head: true gives it a new one"
    if foreign := [*filter(foreign_head, left_over), *model.head_files]:
        raise CheckpointError(
            f"{model.source} has its reward head under another name",
            given=f"left over: {few(foreign)}; missing: {names}",
            expected=names,
            fix=f"rename {foreign[0]} to {lost[0]} in its safetensors, or save the model as a sequence "
            f"classifier with the tool that wrote it; or {drawn}",
        )
    if needed or not model.is_base:
        dropped = f"copy the model again whole: the tool that wrote it dropped the head; or {drawn}"
        raise CheckpointError(
            f"{model.source} has no reward head",
            given=f"{kinds}; missing: {names}",
            expected="every tensor of the reward model",
            fix=dropped if model.claims_head else _training(model),
        )


def _training(model: ModelFolder) -> str:
    plain = "" if model.is_base else " if fresh_head is true"
    return f"train it first: training gives a base model a fresh head{plain}"


@cache
def warn_of_fresh_head(source: str, names: tuple[str, ...]) -> None:
    """Log, once for each model, that its head is drawn; without `names`, that its own is kept."""
    if names:
        log.warning(
            "%s is given a fresh reward head (%s): until it is trained its scores mean nothing",
            source,
            few(names),
        )
    else:
        log.warning("%s has a reward head, which is kept: fresh_head does nothing", source)

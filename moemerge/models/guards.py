"""What a dense reward model must be before it is merged: checks that tell what is wrong, and why.

Everything but `check_finite` reads config.json and the headers of the weights only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from moemerge.errors import CheckpointError, UnsupportedError, few
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.configs import load_config, unloadable
from moemerge.models.families.base import PREFIX
from moemerge.models.families.dense import dense_class, skeleton
from moemerge.models.families.refused import REFUSED
from moemerge.models.finite import finite
from moemerge.models.heads import claims_head, in_head, spare_head

SPARE = 10_000_000  # numbers that a config may ask for beyond twice those in the weights: buffers, a head
BUFFERS = ("position_ids", "rotary_emb.inv_freq")


def check_reward_model(source: str | Path) -> Checkpoint:
    """The dense reward model in the folder (or under the hub name) `source`, opened.

    Its class is transformers' own ...ForSequenceClassification with one output, and it holds exactly the
    tensors of that class, head included, in their shapes (buffers that older versions saved may be there
    too). Raises UnsupportedError for other kinds of model, with the reason, and CheckpointError for one that
    is not whole.
    """
    weights = Checkpoint(source)
    if str(weights.config.get("model_type")).startswith(PREFIX):
        raise UnsupportedError(
            f"{source} is a MoE made by moemerge",
            given=str(weights.config["model_type"]),
            expected="a dense reward model",
            fix="merge it with moemerge merge, or write its experts as dense models with moemerge export",
        )
    refuse_own_class(weights.config.get("architectures"), source)
    _refuse_other_kinds(weights.config, source)
    config = load_config(weights.folder)
    if config.num_labels != 1:
        raise CheckpointError(
            f"{source} is not a reward model",
            given=f"{config.num_labels} outputs",
            expected="one output",
            fix="give a sequence classifier with num_labels = 1",
        )
    check_tensors(weights, config)
    return weights


def refuse_own_class(architectures: Sequence[str] | None, source: str | Path) -> None:
    """Raise UnsupportedError if a config names a class that is neither transformers' nor moemerge's.

    Its forward pass, and what it calls its head, are not known: mergekit takes such a model for a causal LM
    and drops the head, and transformers would load the weights into another class.
    """
    for name in architectures or []:
        if not hasattr(transformers, name) and not name.startswith("Moemerge"):
            raise UnsupportedError(
                f"{source} is of a class of its own, so that its head would be lost or misread",
                given=f"architectures: {name}",
                expected="a class of transformers, such as LlamaForSequenceClassification",
                fix="if its head is one linear layer on the last token, named score, save it again as "
                "...ForSequenceClassification",
            )


def _refuse_other_kinds(config: dict[str, Any], source: str | Path) -> None:
    named = config.get("architectures") or ["no class"]
    if len(named) != 1 or not str(named[0]).endswith("ForSequenceClassification"):
        raise UnsupportedError(
            f"{source} does not say that it is a reward model, so that mergekit would drop its head",
            given=f"architectures: {', '.join(map(str, named))}",
            expected="one class, ...ForSequenceClassification, in config.json",
            fix="load it with AutoModelForSequenceClassification and save it again; merge a LoRA adapter "
            "into the reward model first (PEFT: merge_and_unload)",
        )


def check_tensors(weights: Checkpoint, config: PretrainedConfig) -> None:
    """Raise CheckpointError unless `weights` has exactly the dense reward model's tensors in their shapes.

    A tied copy may be left out.
    """
    model = skeleton(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    faults = weights.differences(wanted, tied, lambda name: old_buffer(model, name))
    if faults:
        given = "; ".join(f"{kind}: {few(names)}" for kind, names in faults.items())
        raise CheckpointError(
            f"{weights.folder} does not fit its own config",
            given=given,
            expected=f"exactly the tensors of {type(model).__name__}",
            fix="copy the model again whole; if the head is missing, train it first",
        )


def refuse_larger(weights: Checkpoint, config: PretrainedConfig) -> None:
    """Raise CheckpointError for quantised weights, and for a config that asks for far more than there are.

    Loading would fill the memory with what is missing.
    """
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        return
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # see load_config
        expected = "the config of a model that can be built"
        raise unloadable("the model cannot be made", weights.folder, error, expected) from error
    wanted = sum(one.numel() for one in (*model.parameters(), *model.buffers()))
    weights.refuse_quantised(model.state_dict().keys() & set(weights.names))
    held = sum(math.prod(weights.shape(name)) for name in weights.names)
    if wanted > 2 * held + SPARE:
        raise CheckpointError(
            f"{weights.folder} does not hold the model that its config asks for",
            given=f"{held:,} numbers in the weights, {wanted:,} asked for",
            expected="weights that agree with config.json",
            fix="copy the model again whole",
        )


def old_buffer(model: PreTrainedModel, name: str) -> bool:
    """Whether the tensor `name` is a buffer that older versions of transformers saved: it holds nothing."""
    old = model._keys_to_ignore_on_load_unexpected or []
    return name.endswith(BUFFERS) or any(re.search(pattern, name) for pattern in old)


def check_alike(models: Sequence[Checkpoint], dtypes: bool = True) -> None:
    """Raise CheckpointError unless all have the first one's tensors, in its shapes and (`dtypes`) dtypes."""
    first = models[0]
    for other in models[1:]:
        names = set(first.names) ^ set(other.names)
        common = [name for name in first.names if name in set(other.names)]
        shapes = [name for name in common if first.shape(name) != other.shape(name)]
        kinds = [name for name in common if dtypes and first.dtype(name) != other.dtype(name)]
        for what, found in (("names", names), ("shapes", shapes), ("dtypes", kinds)):
            if found:
                raise CheckpointError(
                    f"models do not go together: their tensors differ in {what}",
                    given=f"{few(sorted(found))} of {other.folder}, beside {first.folder}",
                    expected="models of one architecture, size and dtype",
                    fix="give models made from the same one; save them in one dtype",
                )


def check_finite(weights: Checkpoint) -> None:
    """Read every tensor, one at a time; CheckpointError if one holds NaN or an infinity."""
    for name, tensor in weights.tensors():
        finite(tensor, f"{name} of {weights.folder}")


def source_names(source: Checkpoint, config: PreTrainedConfig) -> dict[str, str | None]:
    """For each tensor of the dense reward model its name in `source`; None for a head that it lacks.

    Base language models and encoders name tensors without the reward model's prefix, and have heads of their
    own, which are left out. Raises CheckpointError for tensors that are missing, left over or misshapen, and
    for a reward model that has lost its head.
    """
    model, held = skeleton(config), set(source.names)
    wanted, prefix = model.state_dict(), f"{model.base_model_prefix}."
    found = {n: next((m for m in (n, n.removeprefix(prefix)) if m in held), None) for n in wanted}
    missing = [n for n, m in found.items() if m is None and not in_head(model, n)]
    left = [n for n in sorted(held - set(found.values())) if not _needless(model, n)]
    wrong = [n for n, m in found.items() if m and source.shape(m) != tuple(wanted[n].shape)]
    reason = f" ({config.model_type}: {REFUSED[config.model_type]})" if config.model_type in REFUSED else ""
    for kind, names in (("missing", missing), ("left over", left), ("misshapen", wrong)):
        if names:
            raise CheckpointError(
                f"{source.folder} does not fit its own config",
                given=f"{kind}: {', '.join(names[:5])}" + (" ..." if len(names) > 5 else ""),
                expected=f"the tensors of {dense_class(config).__name__}",
                fix=f"use a complete checkpoint of a supported architecture{reason}",
            )
    source.refuse_quantised(held for held in found.values() if held)
    lost = [name for name, held in found.items() if held is None]
    if lost and claims_head(config):
        raise CheckpointError(
            f"{source.folder} has no reward head",
            given=f"{', '.join(config.architectures or [])} without {', '.join(lost)}",
            expected="every tensor of the reward model",
            fix="copy the model again whole; the tool that wrote it may have dropped the head",
        )
    return found


def _needless(model: PreTrainedModel, name: str) -> bool:
    """Whether a reward model may lack the tensor: a language model's head, or a buffer of older versions."""
    return spare_head(name) or old_buffer(model, name)

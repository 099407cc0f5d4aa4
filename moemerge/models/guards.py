"""What a dense reward model must be before it is merged, or loaded: its tensors against its config.

Everything but `check_finite` reads config.json and the headers of the weights only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from moemerge.errors import CheckpointError, UnsupportedError, few
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.families.dense import dense_class, skeleton
from moemerge.models.families.refused import REFUSED
from moemerge.models.finite import finite
from moemerge.models.folder import ModelFolder, misfit, opened, unloadable
from moemerge.models.head_tensors import foreign_head, in_head, refuse_lost_head, spare_head

SPARE = 10_000_000  # numbers that a config may ask for beyond twice those in the weights: buffers, a head
BUFFERS = ("position_ids", "rotary_emb.inv_freq")
# Causal masks, which are constants. transformers leaves them out when it loads one of these.
MASKED = ("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj")
MASKS = re.compile(r"(^|\.)attn(\.attention)?\.(masked_)?bias$")
# LayerNorm's parameters as TensorFlow calls them, and the first BERTs after it.
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def check_reward_model(source: ModelFolder | str | Path) -> ModelFolder:
    """The dense reward model in the folder (or under the hub name) `source`, opened.

    Its class is transformers' own ...ForSequenceClassification with one output, and it holds exactly the
    tensors of that class, head included, in their shapes (buffers that older versions saved may be there
    too). Raises UnsupportedError for other kinds of model, with the reason, and CheckpointError for one that
    is not whole.
    """
    model = opened(source)
    model.require_dense()
    model.config  # noqa: B018 (refuses classes of their own)
    model.require_stock_head("mergekit would lose or misread its head")
    _refuse_other_kinds(model)
    model.require_one_output()
    check_tensors(model)
    return model


def _refuse_other_kinds(model: ModelFolder) -> None:
    named = model.architectures or ["no class"]
    if len(named) != 1 or not named[0].endswith("ForSequenceClassification"):
        raise UnsupportedError(
            f"{model.source} does not say that it is a reward model, so that mergekit would drop its head",
            given=f"architectures: {', '.join(named)}",
            expected="one class, ...ForSequenceClassification, in config.json",
            fix="load it with AutoModelForSequenceClassification and save it again; merge a LoRA adapter "
            "into the reward model first (PEFT: merge_and_unload)",
        )


def check_tensors(source: ModelFolder) -> None:
    """Raise CheckpointError unless `source` has exactly the dense reward model's tensors in their shapes.

    A tied copy may be left out.
    """
    weights, model = source.weights, skeleton(source.config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    weights.refuse_quantised(wanted.keys() & set(weights.names))
    faults = weights.differences(wanted, tied, lambda name: old_buffer(model, name))
    lost = [name for name in faults.get("missing", []) if in_head(model, name)]
    refuse_lost_head(source, lost, faults.get("left over", []), needed=True)
    if faults:
        old = any(name.endswith(tuple(OLD_NAMES.values())) for name in weights.names)
        remedy = "load it with transformers and save_pretrained() it: mergekit does not know its old names"
        expected = f"exactly the tensors of {type(model).__name__}"
        raise misfit(weights.folder, faults, expected, remedy if old else "copy the model again whole")


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
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    weights.refuse_quantised(model.state_dict().keys() & set(weights.names))
    held = weights.num_elements
    if wanted > 2 * held + SPARE:
        raise CheckpointError(
            f"{weights.folder} does not hold the model that its config asks for",
            given=f"{held:,} numbers in the weights, {wanted:,} asked for",
            expected="weights that agree with config.json",
            fix="copy the model again whole",
        )


def old_buffer(model: PreTrainedModel, name: str) -> bool:
    """Whether the tensor `name` is a buffer that older versions of transformers saved: it holds nothing."""
    old = list(model._keys_to_ignore_on_load_unexpected or [])
    old += [MASKS.pattern] if model.config.model_type in MASKED else []
    return name.endswith(BUFFERS) or any(re.search(pattern, name) for pattern in old)


def check_alike(models: Sequence[Checkpoint], dtypes: bool = True) -> None:
    """Raise CheckpointError unless all have the first one's tensors, in its shapes and (`dtypes`) dtypes."""
    first = models[0]
    for other in models[1:]:
        names = set(first.names) ^ set(other.names)
        common = [name for name in first.names if name in set(other.names)]
        shapes = [name for name in common if first.shape(name) != other.shape(name)]
        kinds = [name for name in common if dtypes and first.dtype(name) != other.dtype(name)]
        for what, differing in (("names", names), ("shapes", shapes), ("dtypes", kinds)):
            if differing:
                raise CheckpointError(
                    f"models do not go together: their tensors differ in {what}",
                    given=f"{few(sorted(differing))} of {other.folder}, beside {first.folder}",
                    expected="models of one architecture, size and dtype",
                    fix="give models made from the same one; save them in one dtype",
                )


def check_finite(weights: Checkpoint) -> None:
    """Read every tensor, one at a time; CheckpointError if one holds NaN or an infinity."""
    for name, tensor in weights.tensors():
        finite(tensor, f"{name} of {weights.folder}")


def source_names(source: ModelFolder) -> dict[str, str | None]:
    """For each tensor of the dense reward model its name in `source`; None for a head that it lacks.

    Base language models and encoders name tensors without the reward model's prefix, and have heads of their
    own, which are left out; the names of old versions are known. Raises CheckpointError for quantised
    weights, for tensors that are missing, left over or misshapen, and for a reward model that has lost its
    head.
    """
    weights, model = source.weights, skeleton(source.config)
    on_disk, prefix = set(weights.names), f"{model.base_model_prefix}."
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names = {name: next((s for s in _spellings(name, prefix) if s in on_disk), None) for name in shapes}
    weights.refuse_quantised(held for held in names.values() if held)
    others = sorted(on_disk - set(names.values()))
    refuse_lost_head(source, [n for n, held in names.items() if held is None and in_head(model, n)], others)
    kinds = {
        "missing": [name for name, held in names.items() if held is None and not in_head(model, name)],
        "left over": [name for name in others if not needless(source, model, name)],
        "misshapen": [n for n, held in names.items() if held and weights.shape(held) != shapes[n]],
    }
    faults = {kind: wrong for kind, wrong in kinds.items() if wrong}
    if faults:
        reason = REFUSED.get(source.model_type)
        fix = "use a complete checkpoint of a supported architecture"
        fix += f" ({source.model_type}: {reason})" if reason else ""
        expected = f"the tensors of {dense_class(source.config).__name__}"
        raise misfit(source.folder, faults, expected, fix)
    return names


def _spellings(name: str, prefix: str) -> list[str]:
    """What a checkpoint may call the tensor `name`: with and without the prefix, by new names and old."""
    old = name
    for new, before in OLD_NAMES.items():
        old = old.replace(new, before)
    return [name, name.removeprefix(prefix), old, old.removeprefix(prefix)]


def needless(source: ModelFolder, model: PreTrainedModel, name: str) -> bool:
    """Whether a reward model may leave the tensor out when its head is drawn.

    A language model's head, a buffer of older versions, a head under another name that is drawn anew.
    """
    return spare_head(name) or old_buffer(model, name) or (source.fresh_head and foreign_head(name))

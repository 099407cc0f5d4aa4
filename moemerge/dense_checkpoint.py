"""A dense model's folder held against the reward model that its config names."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from moemerge.checkpoint import Checkpoint
from moemerge.errors import CheckpointError
from moemerge.families.dense import dense_class, skeleton
from moemerge.families.refused import REFUSED
from moemerge.model_guards import old_buffer
from moemerge.scoring import claims_head, in_head, spare_head


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

"""Opening what a stage is to merge."""

from __future__ import annotations

from moemerge.checkpoint import Checkpoint
from moemerge.errors import UnsupportedError
from moemerge.families.siblings import NO_SIBLING, SIBLINGS
from moemerge.options import Members
from moemerge.sources import MergeSource


def open_members(options: Members) -> MergeSource:
    """The MoE, ours or a native one, or the list of models, that `options` name.

    Raises UnsupportedError for a native MoE without a dense sibling, and whatever opening it raises.
    """
    if options.model is None:
        from moemerge.model_list import ModelList

        return ModelList(options.models, options.base, options.scope)
    kind = str(Checkpoint(options.model).config.get("model_type"))
    if kind in SIBLINGS:
        from moemerge.native_moe import NativeMoe

        return NativeMoe(options.model)
    if kind in NO_SIBLING:
        raise UnsupportedError(
            f"the experts of this MoE cannot be merged: {NO_SIBLING[kind]}",
            given=f"{options.model}, model_type {kind!r}",
            expected=f"a MoE made by upcycle, or one of: {', '.join(SIBLINGS)}",
            fix="use a MoE that has a dense sibling, or upcycle a dense reward model",
        )
    from moemerge.moe_checkpoint import MoeCheckpoint

    return MoeCheckpoint(options.model)

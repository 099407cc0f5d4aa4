"""Opening what a stage is to merge."""

from __future__ import annotations

from moemerge.errors import UnsupportedError
from moemerge.merging.sources.base import MergeSource
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.families.siblings import NO_SIBLING, SIBLINGS
from moemerge.options.base import Members


def open_source(options: Members) -> MergeSource:
    """The MoE, ours or a native one, or the list of models, that `options` name.

    Raises UnsupportedError for a native MoE without a dense sibling, and whatever opening it raises.
    """
    if options.model is None:
        from moemerge.merging.sources.models import ModelList

        return ModelList(options.models, options.base, options.scope)
    kind = str(Checkpoint(options.model).config.get("model_type"))
    if kind in SIBLINGS:
        from moemerge.merging.sources.native_moe import NativeMoe

        return NativeMoe(options.model)
    if kind in NO_SIBLING:
        raise UnsupportedError(
            f"the experts of this MoE cannot be merged: {NO_SIBLING[kind]}",
            given=f"{options.model}, model_type {kind!r}",
            expected=f"a MoE made by upcycle, or one of: {', '.join(SIBLINGS)}",
            fix="use a MoE that has a dense sibling, or upcycle a dense reward model",
        )
    from moemerge.merging.sources.moe import MoeCheckpoint

    return MoeCheckpoint(options.model)

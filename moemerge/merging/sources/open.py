"""Opening what a stage is to merge."""

from __future__ import annotations

from moemerge.errors import UnsupportedError
from moemerge.merging.sources.base import MergeSource
from moemerge.models.families.siblings import NO_SIBLING, SIBLINGS
from moemerge.models.folder import ModelFolder
from moemerge.options.base import Members


def open_source(options: Members) -> MergeSource:
    """The MoE, ours or a native one, or the list of models, that `options` name.

    Raises UnsupportedError for a native MoE without a dense sibling, and whatever opening it raises.
    """
    if options.model is None:
        from moemerge.merging.sources.models import ModelList

        return ModelList(options.models, options.base, options.scope)
    folder = ModelFolder(options.model)
    if folder.model_type in NO_SIBLING:
        raise UnsupportedError(
            f"the experts of this MoE cannot be merged: {NO_SIBLING[folder.model_type]}",
            given=f"{options.model}, model_type {folder.model_type!r}",
            expected=f"a MoE made by upcycle, or one of: {', '.join(SIBLINGS)}",
            fix="use a MoE that has a dense sibling, or upcycle a dense reward model",
        )
    if folder.kind == "native":
        from moemerge.merging.sources.native_moe import NativeMoe

        return NativeMoe(folder)
    from moemerge.merging.sources.moe import MoeCheckpoint

    return MoeCheckpoint(folder)

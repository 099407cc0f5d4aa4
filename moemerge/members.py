"""Opening what a stage is to merge."""

from __future__ import annotations

from moemerge.model_list import ModelList
from moemerge.moe_checkpoint import MoeCheckpoint
from moemerge.options import Members
from moemerge.sources import MergeSource


def open_members(options: Members) -> MergeSource:
    """The MoE, or the list of models, that `options` name. Raises what opening it raises."""
    if options.model is None:
        return ModelList(options.models, options.base, options.scope)
    return MoeCheckpoint(options.model)

"""Opening what a stage is to merge."""

from __future__ import annotations

from moemerge.errors import UnsupportedError
from moemerge.merging.calibration import Calibration
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.sources.base import MergeSource
from moemerge.models.families.siblings import NO_SIBLING, SIBLINGS
from moemerge.models.folder import ModelFolder
from moemerge.options.base import Members


def open_source(options: Members, coefficients: Coefficients | None = None) -> MergeSource:
    """The MoE, ours or a native one, or the list of models, that `options` name.

    Saved `coefficients` say themselves in which coordinates they are, and what heads are divided by. Raises
    CheckpointError for a calibration of other models, UnsupportedError for a native MoE without a dense
    sibling, and whatever opening it raises.
    """
    if options.model is None:
        from moemerge.merging.sources.models import ModelList

        if coefficients is not None:
            coordinates, scales = coefficients.coordinates, coefficients.scales
        else:
            coordinates, scales = options.coordinates, None
            if options.calibration is not None:
                scales = Calibration.load(options.calibration).scales_of(options.models)
        return ModelList(options.models, options.base, options.scope, coordinates, scales)
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

    moe = MoeCheckpoint(folder)
    moe.require_one_head()
    return moe

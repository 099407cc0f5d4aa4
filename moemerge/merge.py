"""Stage merge: a MoE and its merge coefficients become one dense reward model of the original architecture.

Shapes: L layers with experts, N routed experts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moemerge import runtime
from moemerge.artifacts import Draft, stage
from moemerge.checkpoint import Checkpoint, copy_side_files, write_checkpoint
from moemerge.coefficients.base import Coefficients
from moemerge.errors import CheckpointError
from moemerge.families.base import ExpertTensor
from moemerge.families.dense import dense_config, skeleton
from moemerge.moe_checkpoint import MoeCheckpoint
from moemerge.recipe import Merge

log = logging.getLogger(__name__)


@stage("merge", Merge)
def merge(options: Merge, draft: Draft) -> None:
    """Write the dense model: MLPs by the routing-normalised average, everything else from the MoE.

    Keeps class, config, tokenizer, chat template and, unless told otherwise, dtype. Holds one shard at once.
    What was written is read back and compared, MLPs with a sum in float64, the rest bit for bit.
    Raises CheckpointError when tensors are missing, left over or misshapen, when the coefficients belong to
    another model, or when the comparison fails. Source: XFT (arXiv 2404.15247), UMM-RM (arXiv 2512.00724).
    """
    runtime.use(options)
    source, coefficients = MoeCheckpoint(options.model), Coefficients.load(options.coefficients)
    source.check_fit(coefficients)
    kept = source.settings.dense_dtype if options.dtype == "keep" else options.dtype
    dtype: torch.dtype = getattr(torch, kept)
    write_checkpoint(draft.folder, _dense_tensors(source, coefficients, dtype), options.shard_size)
    config = dense_config(source.config)
    config.dtype = dtype
    config.save_pretrained(draft.folder)
    copy_side_files(source.folder, draft.folder)
    largest = _compare(draft.folder, source, coefficients, dtype)
    log.info("merge: largest difference to the float64 sum %.2e", largest)
    draft.results |= {
        "largest_difference": largest,
        "mlp_tensors": len(source.tensors),
        "other_tensors": len(source.backbone),
        "coefficients": coefficients.meta,
    }


def _dense_tensors(
    source: MoeCheckpoint, coefficients: Coefficients, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    experts = {tensor.dense: tensor for tensor in source.tensors}
    names = [n for n in skeleton(source.config).state_dict() if n in experts or n in source.backbone]
    for name in tqdm(names, desc="merge", leave=False, disable=None):
        yield name, _dense_tensor(source, name, experts.get(name), coefficients, dtype)


def _dense_tensor(
    source: MoeCheckpoint,
    name: str,
    tensor: ExpertTensor | None,
    coefficients: Coefficients,
    dtype: torch.dtype,
) -> Tensor:
    if tensor is None:
        return _cast(source.weights.tensor(name), dtype)
    # Cast before the average, so that a wider dtype keeps what the experts' own would round away.
    wider = torch.promote_types(dtype, source.dtype)
    matrices = (matrix.to(wider) for matrix in source.matrices(tensor))
    return _cast(source.average(tensor, matrices, coefficients.alpha_LN, coefficients.shared_L), dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _compare(folder: Path, source: MoeCheckpoint, coefficients: Coefficients, dtype: torch.dtype) -> float:
    """Read every written tensor back. Largest difference between an MLP and its float64 sum."""
    written = Checkpoint(folder)
    wanted = {*source.backbone, *(tensor.dense for tensor in source.tensors)}
    if set(written.names) != wanted:
        raise _not_as_meant(f"names {sorted(wanted ^ set(written.names))[:5]} are missing or left over")
    for name in source.backbone:
        if not _same_bits(written.tensor(name), _cast(source.weights.tensor(name), dtype)):
            raise _not_as_meant(f"{name} differs from the MoE's")
    bar = tqdm(source.tensors, desc="read back", leave=False, disable=None)
    return max(_difference(written.tensor(t.dense), source, t, coefficients) for t in bar)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))


def _difference(
    written: Tensor, source: MoeCheckpoint, tensor: ExpertTensor, coefficients: Coefficients
) -> float:
    """Largest |written - float64 sum|. Raises CheckpointError if it exceeds what rounding can do."""
    row = coefficients.layers.index(tensor.layer)
    shared = float(coefficients.shared_L[row])
    weights = ((1 - shared) * coefficients.alpha_LN[row]).tolist()
    weights = [shared, *weights] if source.settings.shared_expert else weights
    total, size = torch.zeros(tensor.shape, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for weight, matrix in zip(weights, source.matrices(tensor), strict=True):
        total.add_(matrix.double(), alpha=weight)
        size = torch.maximum(size, matrix.abs().max().double())
    difference = float((written.double() - total).abs().max())
    precision = max(torch.finfo(written.dtype).eps, torch.finfo(torch.float32).eps)
    if written.shape == total.shape and difference <= float(size) * precision * (2 + len(weights)):
        return difference
    raise _not_as_meant(f"{tensor.dense} is off by {difference:.2e}")


def _not_as_meant(given: str) -> CheckpointError:
    return CheckpointError(
        "the merged model was not written as meant",
        given=given,
        expected="the routing-normalised average in the MLPs, the MoE's tensors bit for bit elsewhere",
        fix="check the disk and merge again; with dtype float16, values may be out of its range",
    )

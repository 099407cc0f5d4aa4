"""Stage merge: a MoE and its merge coefficients become one dense reward model of the original architecture.

Shapes: L layers with experts, N routed experts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
from moemerge.host_methods import OURS, HostMethod
from moemerge.model_guards import finite
from moemerge.moe_checkpoint import MoeCheckpoint
from moemerge.recipe import Merge

log = logging.getLogger(__name__)


@stage("merge", Merge)
def merge(options: Merge, draft: Draft) -> None:
    """Write the dense model: MLPs merged from the experts by `options.method`, everything else from the MoE.

    Keeps class, config, tokenizer, chat template and, unless told otherwise, dtype. Holds one shard at once.
    What was written is read back and compared: MLPs with a sum in float64 (another method than ours: with its
    result once more), the rest bit for bit. Raises CheckpointError when tensors are missing, left over,
    misshapen or not finite, when the coefficients belong to another model, or when the comparison fails;
    OptionError for what the method does not take. Source: XFT (arXiv 2404.15247), UMM-RM (arXiv 2512.00724);
    other methods: mergekit (arXiv 2403.13257).
    """
    device = runtime.use(options)
    source = MoeCheckpoint(options.model)
    kept = source.settings.dense_dtype if options.dtype == "keep" else options.dtype
    dtype: torch.dtype = getattr(torch, kept)
    way = _way(options, source, dtype, device)
    write_checkpoint(draft.folder, _dense_tensors(source, way, dtype), options.shard_size)
    config = dense_config(source.config)
    config.dtype = dtype
    config.save_pretrained(draft.folder)
    copy_side_files(source.folder, draft.folder)
    largest = _compare(draft.folder, source, way, dtype)
    log.info("merge: largest difference to what was meant %.2e", largest)
    draft.results |= {
        "method": options.method,
        "largest_difference": largest,
        "mlp_tensors": len(source.tensors),
        "other_tensors": len(source.backbone),
        "coefficients": way.coefficients.meta if way.coefficients else None,
    }


class _Way(Protocol):
    """A way to merge: one dense MLP tensor, and how far a written one is from what was meant."""

    coefficients: Coefficients | None

    def merged(self, tensor: ExpertTensor) -> Tensor: ...

    def difference(self, tensor: ExpertTensor, written: Tensor) -> float: ...


def _way(options: Merge, source: MoeCheckpoint, dtype: torch.dtype, device: torch.device) -> _Way:
    found = Coefficients.load(options.coefficients) if options.coefficients else None
    if found is not None:
        source.check_fit(found)
    if options.method == OURS:
        assert found is not None, "recipe.Merge asks for them"
        return _Average(source, found, dtype)
    method = HostMethod(options.method, options.parameters, found, options.seed)
    if found is not None and not method.weighs:
        log.warning("merge: %s takes no weights, so the coefficients are not used", options.method)
    return _Hosted(source, method, found if method.weighs else None, dtype, device)


@dataclass
class _Average:
    """The routing-normalised average, checked against a sum in float64."""

    source: MoeCheckpoint
    coefficients: Coefficients | None
    dtype: torch.dtype

    def merged(self, tensor: ExpertTensor) -> Tensor:
        c = self.coefficients
        assert c is not None
        matrices = _matrices(self.source, tensor, self.dtype)
        return _cast(self.source.average(tensor, matrices, c.alpha_LN, c.shared_L), self.dtype)

    def difference(self, tensor: ExpertTensor, written: Tensor) -> float:
        assert self.coefficients is not None
        return _difference(written, self.source, tensor, self.coefficients)


@dataclass
class _Hosted:
    """A method of mergekit's, checked against its own result."""

    source: MoeCheckpoint
    method: HostMethod
    coefficients: Coefficients | None
    dtype: torch.dtype
    device: torch.device

    def merged(self, tensor: ExpertTensor) -> Tensor:
        experts = (m.to(self.device) for m in _matrices(self.source, tensor, self.dtype))
        has_shared = self.source.settings.shared_expert
        merged = self.method.merge(tensor.dense, tensor.layer, experts, has_shared)
        return _cast(merged.cpu(), self.dtype)

    def difference(self, tensor: ExpertTensor, written: Tensor) -> float:
        if _same_bits(written, self.merged(tensor)):
            return 0.0
        raise _not_as_meant(f"{tensor.dense} differs from the method's result")


def _dense_tensors(source: MoeCheckpoint, way: _Way, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    experts = {tensor.dense: tensor for tensor in source.tensors}
    names = [n for n in skeleton(source.config).state_dict() if n in experts or n in source.backbone]
    for name in tqdm(names, desc="merge", leave=False, disable=None):
        if name in experts:
            yield name, finite(way.merged(experts[name]), f"{name} as merged")
        else:
            kept = _cast(finite(source.weights.tensor(name), name), dtype)
            yield name, finite(kept, f"{name} as {dtype}")


def _matrices(source: MoeCheckpoint, tensor: ExpertTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The experts' copies, in the wider of their dtype and `dtype`: the average must not round away."""
    wider = torch.promote_types(dtype, source.dtype)
    return (finite(m, f"an expert's {tensor.dense}").to(wider) for m in source.matrices(tensor))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _compare(folder: Path, source: MoeCheckpoint, way: _Way, dtype: torch.dtype) -> float:
    """Read every written tensor back. Largest difference between an MLP and what was meant."""
    written = Checkpoint(folder)
    wanted = {*source.backbone, *(tensor.dense for tensor in source.tensors)}
    if set(written.names) != wanted:
        raise _not_as_meant(f"names {sorted(wanted ^ set(written.names))[:5]} are missing or left over")
    for name in source.backbone:
        if not _same_bits(written.tensor(name), _cast(source.weights.tensor(name), dtype)):
            raise _not_as_meant(f"{name} differs from the MoE's")
    bar = tqdm(source.tensors, desc="read back", leave=False, disable=None)
    return max(_checked(written.tensor(t.dense), t, way, dtype) for t in bar)


def _checked(written: Tensor, tensor: ExpertTensor, way: _Way, dtype: torch.dtype) -> float:
    if written.dtype == dtype and tuple(written.shape) == tensor.shape:
        return way.difference(tensor, written)
    raise _not_as_meant(f"{tensor.dense} is {tuple(written.shape)} {written.dtype}")


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
    if difference <= float(size) * precision * (2 + len(weights)):
        return difference
    raise _not_as_meant(f"{tensor.dense} is off by {difference:.2e}")


def _not_as_meant(given: str) -> CheckpointError:
    return CheckpointError(
        "the merged model was not written as meant",
        given=given,
        expected="the experts' merge in the MLPs, the MoE's tensors bit for bit elsewhere",
        fix="check the disk and merge again; with dtype float16, values may be out of its range",
    )

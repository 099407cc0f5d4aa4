"""Stage merge: the experts of a MoE, or several models, become one dense reward model of their architecture.

Shapes: L blocks, N weighted members (routed experts, or models besides the base).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moemerge import runtime
from moemerge.artifacts import Draft, stage
from moemerge.checkpoint import Checkpoint, write_checkpoint
from moemerge.coefficients.base import Coefficients
from moemerge.errors import CheckpointError
from moemerge.families.dense import skeleton
from moemerge.host_methods import OURS, HostMethod
from moemerge.members import open_members
from moemerge.model_guards import finite
from moemerge.recipe import Merge
from moemerge.sources import MergedTensor, MergeSource

log = logging.getLogger(__name__)


@stage("merge", Merge)
def merge(options: Merge, draft: Draft) -> None:
    """Write the dense model: what `options` name is merged by `options.method`, everything else is kept.

    From a MoE the MLPs are merged, from models what `scope` says. Keeps class, config, tokenizer, chat
    template and, unless told otherwise, dtype. Holds one shard at once. What was written is read back and
    compared: merged tensors with a sum in float64 (another method than ours: with its result once more), the
    rest bit for bit. Raises CheckpointError when tensors are missing, left over, misshapen or not finite,
    when the coefficients belong to another model, or when the comparison fails; UnsupportedError for models
    that do not go together; OptionError for what the method does not take. Source: XFT (arXiv 2404.15247),
    UMM-RM (arXiv 2512.00724); of models: WARM (arXiv 2401.12187), DogeRM (arXiv 2407.01470); other methods:
    mergekit (arXiv 2403.13257).
    """
    device = runtime.use(options)
    source = open_members(options)
    dtype: torch.dtype = source.dense_dtype if options.dtype == "keep" else getattr(torch, options.dtype)
    way = _way(options, source, dtype, device)
    write_checkpoint(draft.folder, _dense_tensors(source, way, dtype), options.shard_size)
    config = source.dense_config()
    config.dtype = dtype
    config.save_pretrained(draft.folder)
    source.write_side_files(draft.folder)
    largest = _compare(draft.folder, source, way, dtype)
    log.info("merge: largest difference to what was meant %.2e", largest)
    draft.results |= {
        "method": options.method,
        "largest_difference": largest,
        "merged_tensors": len(source.tensors),
        "other_tensors": len(source.backbone),
        "coefficients": way.coefficients.meta if way.coefficients else None,
        "caveats": list(source.caveats),
    }


class _Way(Protocol):
    """A way to merge: one dense tensor, and how far a written one is from what was meant."""

    @property
    def coefficients(self) -> Coefficients | None: ...

    def merged(self, tensor: MergedTensor) -> Tensor: ...

    def difference(self, tensor: MergedTensor, written: Tensor) -> float: ...


def merge_models(
    models: Sequence[str | Path],
    output: str | Path,
    base: str | Path | None = None,
    coefficients: str | Path | Sequence[float] | None = None,
    **options: Any,
) -> Path:
    """Merge whole models of one architecture: `merge(models=..., output=..., ...)`.

    `coefficients` is the folder that `fit_models` wrote, or one weight per model, the base first if there is
    one (default: equal). `options` are those of `moemerge merge`: scope, method, parameters, dtype, ...
    Returns `output`; raises as merge does.
    """
    given: dict[str, Any] = {"models": [str(model) for model in models], "base": base and str(base)}
    if isinstance(coefficients, str | Path):
        given["coefficients"] = str(coefficients)
    elif coefficients is not None:
        given["weights"] = list(coefficients)
    return merge(output=output, **given, **options)


def _coefficients(options: Merge, source: MergeSource) -> Coefficients | None:
    """Those that were given; for our average of models equal ones otherwise; None if there are none."""
    if options.coefficients:
        found = Coefficients.load(options.coefficients)
        source.check_fit(found)
        return found
    if options.weights or options.method == OURS:
        return _constant(options.weights or [1.0] * len(source.member_names), source)
    return None


def _constant(weights: Sequence[float], source: MergeSource) -> Coefficients:
    """Coefficients that are the same in every block, in proportion to `weights`."""
    blocks, values = source.blocks(), torch.tensor(weights, dtype=torch.float64)
    routed_N = values[1:] if source.has_shared else values
    shared = 1 - float(routed_N.sum() / values.sum())
    alpha_N = (
        routed_N / routed_N.sum() if float(routed_N.sum()) else torch.full_like(routed_N, 1 / len(routed_N))
    )
    shared_L = torch.full((len(blocks),), shared, dtype=torch.float64)
    return Coefficients(blocks, alpha_N.repeat(len(blocks), 1), shared_L, {"method": "given"})


def _way(options: Merge, source: MergeSource, dtype: torch.dtype, device: torch.device) -> _Way:
    found = _coefficients(options, source)
    if options.method == OURS:
        assert found is not None
        return _Average(source, found, dtype)
    method = HostMethod(options.method, options.parameters, found, options.seed)
    if found is not None and not method.weighs:
        log.warning("merge: %s takes no weights, so the coefficients are not used", options.method)
    return _Hosted(source, method, found if method.weighs else None, dtype, device)


def _rows(source: MergeSource, coefficients: Coefficients | None) -> dict[str, int]:
    return source.rows(coefficients.blocks) if coefficients else {}


@dataclass
class _Average:
    """The routing-normalised average, checked against a sum in float64."""

    source: MergeSource
    coefficients: Coefficients
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.rows = _rows(self.source, self.coefficients)

    def merged(self, tensor: MergedTensor) -> Tensor:
        c, row = self.coefficients, self.rows[tensor.dense]
        matrices = _matrices(self.source, tensor, self.dtype)
        return _cast(self.source.average(matrices, c.alpha_LN[row], float(c.shared_L[row])), self.dtype)

    def difference(self, tensor: MergedTensor, written: Tensor) -> float:
        weights = self.coefficients.weights(self.rows[tensor.dense], self.source.has_shared)
        return _difference(written, tensor, weights, self.source.matrices(tensor))


@dataclass
class _Hosted:
    """A method of mergekit's, checked against its own result."""

    source: MergeSource
    method: HostMethod
    coefficients: Coefficients | None
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self.rows = _rows(self.source, self.coefficients)

    def merged(self, tensor: MergedTensor) -> Tensor:
        copies = (m.to(self.device) for m in _matrices(self.source, tensor, self.dtype))
        row = self.rows.get(tensor.dense)
        merged = self.method.merge(tensor.dense, row, copies, self.source.has_shared)
        return _cast(merged.cpu(), self.dtype)

    def difference(self, tensor: MergedTensor, written: Tensor) -> float:
        if _same_bits(written, self.merged(tensor)):
            return 0.0
        raise _not_as_meant(f"{tensor.dense} differs from the method's result")


def _dense_tensors(source: MergeSource, way: _Way, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    merged, kept = {tensor.dense: tensor for tensor in source.tensors}, set(source.backbone)
    names = [n for n in skeleton(source.dense_config()).state_dict() if n in merged or n in kept]
    for name in tqdm(names, desc="merge", leave=False, disable=None):
        if name in merged:
            yield name, finite(way.merged(merged[name]), f"{name} as merged")
        else:
            yield name, finite(_cast(finite(source.kept(name), name), dtype), f"{name} as {dtype}")


def _matrices(source: MergeSource, tensor: MergedTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The members' copies, in the wider of their dtype and `dtype`: the average must not round away."""
    wider = torch.promote_types(dtype, source.dtype)
    named = zip(source.member_names, source.matrices(tensor), strict=True)
    return (finite(matrix, f"{tensor.dense} of {name}").to(wider) for name, matrix in named)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _compare(folder: Path, source: MergeSource, way: _Way, dtype: torch.dtype) -> float:
    """Read every written tensor back. Largest difference between a merged one and what was meant."""
    written = Checkpoint(folder)
    wanted = {*source.backbone, *(tensor.dense for tensor in source.tensors)}
    if set(written.names) != wanted:
        raise _not_as_meant(f"names {sorted(wanted ^ set(written.names))[:5]} are missing or left over")
    for name in source.backbone:
        if not _same_bits(written.tensor(name), _cast(source.kept(name), dtype)):
            raise _not_as_meant(f"{name} differs from the source's")
    bar = tqdm(source.tensors, desc="read back", leave=False, disable=None)
    return max(_checked(written.tensor(t.dense), t, way, dtype) for t in bar)


def _checked(written: Tensor, tensor: MergedTensor, way: _Way, dtype: torch.dtype) -> float:
    if written.dtype == dtype and tuple(written.shape) == tensor.shape:
        return way.difference(tensor, written)
    raise _not_as_meant(f"{tensor.dense} is {tuple(written.shape)} {written.dtype}")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))


def _difference(
    written: Tensor, tensor: MergedTensor, weights: Sequence[float], matrices: Iterator[Tensor]
) -> float:
    """Largest |written - float64 sum|. Raises CheckpointError if it exceeds what rounding can do."""
    total, size = torch.zeros(tensor.shape, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for weight, matrix in zip(weights, matrices, strict=True):
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
        expected="the members' merge, and bit for bit what is kept",
        fix="check the disk and merge again; with dtype float16, values may be out of its range",
    )

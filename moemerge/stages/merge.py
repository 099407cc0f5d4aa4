"""Stage merge: the experts of a MoE, or several models, become one dense reward model of their architecture.

Shapes: L blocks, N weighted members (routed experts, or models besides the base).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moemerge.artifacts.origin import with_base
from moemerge.artifacts.progress import hidden
from moemerge.artifacts.result import Result
from moemerge.artifacts.stage import Draft, stage
from moemerge.errors import CheckpointError
from moemerge.merging.average import as_average, as_changes, row_chunks, shared_of_sum
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.sources.base import MergedTensor, MergeSource
from moemerge.merging.sources.open import open_source
from moemerge.models.checkpoint import Checkpoint, write_checkpoint
from moemerge.models.device import one_thread, use_device
from moemerge.models.finite import finite, magnitude
from moemerge.models.heads.saved import head_result
from moemerge.models.portable import make_portable
from moemerge.options.base import OURS, SCALE_OF_SUM
from moemerge.options.merge import Merge
from moemerge.options.signature import with_options_of

if TYPE_CHECKING:
    from moemerge.merging.mergekit.methods import HostMethod

log = logging.getLogger(__name__)


@stage("merge", Merge, complete=with_base)
def merge(options: Merge, draft: Draft) -> None:
    """Write the dense model: what `options` name is merged by `options.method`, everything else is kept.

    From a MoE the MLPs are merged, from models what `scope` says. Keeps class, config, tokenizer, chat
    template and, unless another is asked for, dtype. Holds one shard at once. Our average is compared with a
    plain sum before it is written, in float64, or in float32 where the result has two bytes a number;
    everything is read back and compared with it, bit for bit.
    Raises CheckpointError when tensors are missing, left over, misshapen or not finite, when the coefficients
    belong to another model, or when a comparison fails; UnsupportedError for models that do not go together;
    OptionError for what the method does not take. Source: XFT (arXiv 2404.15247), UMM-RM (arXiv 2512.00724);
    of models: WARM (arXiv 2401.12187), DogeRM (arXiv 2407.01470); other methods: mergekit (arXiv 2403.13257).
    """
    device = use_device(options)
    saved = Coefficients.load(options.coefficients) if options.coefficients else None
    source = open_source(options, saved)
    dtype: torch.dtype = source.dense_dtype if options.dtype == "keep" else getattr(torch, options.dtype)
    if options.models and options.dtype == "keep":
        _tell_of_rounding(source, dtype)
    way = _way(options, source, _coefficients(options, source, saved), dtype, device)
    draft.reserve(source.size(dtype))
    write_checkpoint(draft.folder, _dense_tensors(source, way, dtype), options.shard_size)
    source.write_config(draft.folder, dtype)
    source.write_side_files(draft.folder)
    make_portable(draft.folder)
    _require_all(draft.folder, source)
    log.debug("merge: largest rounding error %.2e", way.largest_difference)
    draft.results |= {
        "method": options.method,
        "largest_difference": way.largest_difference,
        "merged_tensors": len(source.tensors),
        "other_tensors": len(source.backbone),
        "coefficients": way.coefficients.meta if way.coefficients else None,
        "table": list(way.coefficients.table()) if way.coefficients else None,
        "coordinates": way.coefficients.coordinates if way.coefficients else None,
        "scales": way.coefficients.scales if way.coefficients else None,
        "caveats": list(source.caveats),
        **head_result(draft.folder),
    }


class _Way(Protocol):
    """A way to merge: one dense tensor, and how far any so far was from an independent computation."""

    largest_difference: float

    @property
    def coefficients(self) -> Coefficients | None: ...

    def merged(self, tensor: MergedTensor) -> Tensor: ...


@with_options_of(Merge, without=("model", "weights"))
def merge_models(
    models: Sequence[str | PathLike],
    output: str | PathLike,
    base: str | PathLike | None = None,
    coefficients: str | PathLike | Sequence[float] | None = None,
    **options: Any,
) -> Result:
    """Merge whole models of one architecture: `merge(models=..., output=..., ...)`.

    `coefficients` is the folder that `fit_models` wrote, or one weight per model, the base first if there is
    one (default: equal). `options` are those of `moemerge merge`: scope, method, parameters, dtype, ...
    Returns `output`; raises as merge does.
    """
    members: dict[str, Any] = {"models": list(models), "base": base}
    if isinstance(coefficients, str | PathLike):
        members["coefficients"] = coefficients
    elif coefficients is not None:
        members["weights"] = list(coefficients)
    return merge(output=output, **members, **options)


def _coefficients(options: Merge, source: MergeSource, saved: Coefficients | None) -> Coefficients | None:
    """The saved ones; else equal ones for our own method, None for others."""
    if saved is not None:
        source.check_fit(saved)
        return saved
    if options.coordinates == "sum" and (options.method == OURS or options.weights or options.scale):
        count = source.num_members
        return sum_of_changes(source, options.weights or [(options.scale or SCALE_OF_SUM) / count] * count)
    if options.weights or options.method == OURS:
        _tell_shares(options.weights)
        return _constant(options.weights or [1.0] * len(source.member_names), source)
    return None


def _tell_shares(weights: Sequence[float]) -> None:
    """Warn of weights that are given and do not sum to one: an average has their shares."""
    if weights and not math.isclose(sum(weights), 1.0, rel_tol=1e-3):
        shares = ", ".join(f"{weight / sum(weights):.4g}" for weight in weights)
        log.warning(
            "merge: weights sum to %.4g, so that models count by their shares, %s; with coordinates sum "
            "changes are added with weights as they are", sum(weights), shares,
        )  # fmt: skip


def sum_of_changes(source: MergeSource, changes: Sequence[float]) -> Coefficients:
    """W = base + sum_i c_i (W_i - base) in every block, c being `changes`; heads are averaged in proportion.

    A head that had the c of the body would be as many times as large as they sum to, and so would scores.
    """
    blocks, c_N = source.blocks(), torch.tensor(changes, dtype=torch.float64)
    alpha_N, total = as_changes(c_N)
    shared_L = shared_of_sum(blocks, float(total))
    return Coefficients(
        blocks, alpha_N.repeat(len(blocks), 1), shared_L, {"method": "given"}, "sum", source.scales
    )


def _constant(weights: Sequence[float], source: MergeSource) -> Coefficients:
    """Coefficients that are the same in every block, in proportion to `weights`."""
    blocks, values = source.blocks(), torch.tensor(weights, dtype=torch.float64)
    alpha_N, shared = as_average(values, source.has_shared)
    shared_L = torch.full((len(blocks),), shared, dtype=torch.float64)
    return Coefficients(
        blocks, alpha_N.repeat(len(blocks), 1), shared_L, {"method": "given"}, scales=source.scales
    )


def _way(
    options: Merge,
    source: MergeSource,
    coefficients: Coefficients | None,
    dtype: torch.dtype,
    device: torch.device,
) -> _Way:
    if options.method == OURS:
        assert coefficients is not None
        return _Average(source, coefficients, dtype)
    from moemerge.merging.mergekit.methods import HostMethod  # imports mergekit

    method = HostMethod(options.method, options.parameters, coefficients, options.seed)
    if coefficients is not None and not method.weighs:
        log.warning("merge: %s takes no weights, so the coefficients are not used", options.method)
    if (sum_told := method.about_the_sum(len(source.member_names), source.has_shared)) is not None:
        log.warning("merge: %s", sum_told)
    return _Hosted(source, method, coefficients if method.weighs else None, dtype, device)


def _tell_of_rounding(source: MergeSource, dtype: torch.dtype) -> None:
    """A line where the result, in the first model's dtype, cannot hold what another model has in its own."""
    if torch.promote_types(source.dtype, dtype) != dtype:
        names = [str(kind).removeprefix("torch.") for kind in (source.dtype, dtype)]
        log.warning("merge: the models together need %s, and the result is %s, as the first is: "
                    "it loses bits of the others; dtype: %s keeps them", *names, names[0])  # fmt: skip


def _rows(source: MergeSource, coefficients: Coefficients | None) -> dict[str, int]:
    return source.rows(coefficients.blocks) if coefficients else {}


@dataclass
class _Average:
    """The routing-normalised average, each chunk of rows checked against a plain sum at once."""

    source: MergeSource
    coefficients: Coefficients
    dtype: torch.dtype
    largest_difference: float = 0.0

    def __post_init__(self) -> None:
        self.rows = _rows(self.source, self.coefficients)
        self.threads = torch.get_num_threads()

    def merged(self, tensor: MergedTensor) -> Tensor:
        merged = torch.empty(tensor.shape, dtype=self.dtype)
        copies = list(self.source.matrices(tensor))
        chunks = [*zip(*map(row_chunks, (merged, *copies)), strict=True)]
        # A thread for each chunk, not several for one: so a chunk stays in its core's cache.
        with one_thread(), ThreadPoolExecutor(self.threads) as pool:
            differences = pool.map(lambda parts: self._merge(parts[0], parts[1:], tensor), chunks)
            self.largest_difference = max([self.largest_difference, *differences])
        return merged

    def _merge(self, chunk: Tensor, parts: Sequence[Tensor], tensor: MergedTensor) -> float:
        """Fill `chunk`, rows of the dense tensor, from `parts`, the same rows of its copies.

        Returns the largest difference to a plain sum, which is checked.
        """
        c, row = self.coefficients, self.rows[tensor.dense]
        weights = c.weights(row, self.source.has_shared)
        again = torch.zeros(chunk.shape, dtype=_check_dtype(chunk, parts))
        chunk.copy_(self.source.merged(_added(parts, weights, again), c, row))
        difference = magnitude(again.sub_(chunk))
        # An average is no larger than the largest copy, and a sum no larger than its bound: a difference
        # within the rounding of `chunk` itself is within that of the copies, which need no look.
        if not math.isfinite(difference) or difference > _rounding(chunk, [chunk]):
            for member, part in enumerate(parts):
                finite(part, f"{tensor.dense} of {self.source.found_in(member)}")
            finite(chunk, f"{tensor.dense} as merged")
            if difference > _rounding(chunk, parts) * max(1.0, sum(map(abs, weights))):
                raise _not_as_meant(f"{tensor.dense} is off by {difference:.2e}")
        return difference


@dataclass
class _Hosted:
    """A method of mergekit's."""

    source: MergeSource
    method: HostMethod
    coefficients: Coefficients | None
    dtype: torch.dtype
    device: torch.device
    largest_difference: float = 0.0

    def __post_init__(self) -> None:
        self.rows = _rows(self.source, self.coefficients)

    def merged(self, tensor: MergedTensor) -> Tensor:
        numbered = enumerate(self.source.matrices(tensor))
        sound = (finite(matrix, f"{tensor.dense} of {self.source.found_in(n)}") for n, matrix in numbered)
        copies = (_widened(matrix, self.dtype).to(self.device) for matrix in sound)
        row = self.rows.get(tensor.dense)
        merged = self.method.merge(tensor.dense, row, copies, self.source.has_shared)
        return finite(_cast(merged.cpu(), self.dtype), f"{tensor.dense} as merged")


def _dense_tensors(source: MergeSource, way: _Way, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    merged = {tensor.dense: tensor for tensor in source.tensors}
    for name in tqdm(source.names(), desc="merge", leave=False, disable=hidden()):
        if name in merged:
            yield name, way.merged(merged[name])
        else:
            yield name, _kept(source, name, dtype)


@one_thread()
def _kept(source: MergeSource, name: str, dtype: torch.dtype) -> Tensor:
    stored = finite(source.kept(name), name)
    kept = _cast(stored, dtype)
    return kept if kept is stored else finite(kept, f"{name} as {dtype}")


def _widened(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix` in the wider of its dtype and `dtype`: the merge must not round away."""
    return matrix.to(torch.promote_types(matrix.dtype, dtype))


def _check_dtype(chunk: Tensor, parts: Sequence[Tensor]) -> torch.dtype:
    """Of a sum that judges `chunk`: its own rounding must be far below that of the result."""
    least = torch.float64 if chunk.dtype.itemsize > 2 else torch.float32
    return reduce(torch.promote_types, (part.dtype for part in parts), least)


def _added(parts: Sequence[Tensor], weights: Sequence[float], total: Tensor) -> Iterator[Tensor]:
    """`parts` one by one, at least in float32; their weighted sum, not finite if anything in them is, goes
    to `total` while they are at hand."""
    for weight, part in zip(weights, parts, strict=True):
        wide = _widened(part, torch.float32)
        total.add_(wide, alpha=weight)
        yield wide


def _rounding(chunk: Tensor, parts: Sequence[Tensor]) -> float:
    """How far rounding can take the average of `parts`, written to `chunk`, from the plain sum."""
    written, summed = torch.finfo(chunk.dtype), torch.finfo(torch.float32)
    size = max(map(magnitude, parts)) + written.tiny
    return size * max(written.eps, summed.eps) * (3 + len(parts))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _require_all(folder: Path, source: MergeSource) -> None:
    wanted, written = (
        {*source.backbone, *(tensor.dense for tensor in source.tensors)},
        set(Checkpoint(folder).names),
    )
    if written != wanted:
        raise _not_as_meant(f"names {sorted(wanted ^ written)[:5]} are missing or left over")


def _not_as_meant(given: str) -> CheckpointError:
    return CheckpointError(
        "the merged model was not written as meant",
        given=given,
        expected="the members' merge, and bit for bit what is kept",
        fix="check the disk and merge again; with dtype float16, values may be out of its range",
    )

"""The arithmetic of the merge: one dense matrix out of the copies that the experts hold of it.

Shapes: N routed experts. No model, file or device is known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from moemerge.errors import CheckpointError, OptionError
from moemerge.merging.blocks import HEAD
from moemerge.options.base import Coordinates

TOLERANCE = 1e-6
SMALLEST_SUM = 1e-6
ROUNDING = 1e-14
# Elements: a chunk of every copy stays in a core's cache, and is worth the calls that it costs.
CHUNK = 2**18


def routing_normalized_average(
    shared: Tensor | None,
    experts_N: Iterable[Tensor],
    alpha_N: Tensor | Sequence[float],
    shared_weight: float,
    coordinates: Coordinates = "average",
) -> Tensor:
    """W = shared_weight * shared + (1 - shared_weight) * sum_i alpha_i expert_i.

    With `coordinates` sum this is shared + sum_i c_i (expert_i - shared), c_i = (1 - shared_weight) alpha_i:
    any finite weights, `alpha_N` still summing to one. `experts_N` may be a generator: one matrix is held at
    a time. Sums run in float32 (float64 for float64 experts), the result has the experts' dtype; nothing
    given is changed. `shared` may be None if its weight is 0. Exact, bit for bit: equal matrices give that
    matrix for any weights, one-hot `alpha_N` with `shared_weight` 0 gives that expert, `shared_weight` 1
    gives `shared`.

    Raises OptionError for weights that do not form an average, CheckpointError for matrices that do not fit.
    Source: XFT (arXiv 2404.15247), step 4; its shared-expert rate in UMM-RM (arXiv 2512.00724); sums of
    changes: task arithmetic (arXiv 2212.04089).
    """
    alpha = check_weights(alpha_N, shared_weight, shared is not None, coordinates)
    total: Tensor | None = None
    reference = away = torch.empty(0)
    dtype = torch.float32
    # R - sum_i w_i (R - W_i), R being the first matrix of non-zero weight. The weights sum to one, so this
    # is the average, and the sum of changes as well; and x - (+0) is x for every float, -0.0 included, which
    # makes the identities exact.
    for weight, matrix in _terms(shared, experts_N, alpha, shared_weight):
        if total is None:
            dtype, reference = matrix.dtype, _wide(matrix)
            total, away = reference.clone(), torch.empty_like(reference)
        else:
            _check_alike(matrix, reference)
            # One buffer for all differences: no matrix is allocated per expert.
            total.sub_(torch.sub(reference, _wide(matrix), out=away), alpha=weight)
    assert total is not None
    return total.to(dtype)


def as_average(weights_M: Tensor, has_shared: bool) -> tuple[Tensor, float]:
    """alpha_N and the shared weight of members weighted in proportion to `weights_M`, the shared one first.

    If the shared one has all the weight, the others have equal alpha.
    """
    routed_N = weights_M[1:] if has_shared else weights_M
    # Not 1 - routed / all: that would make 0.30000000000000004 of weights 0.3 and 0.7.
    shared = float(weights_M[0] / weights_M.sum()) if has_shared else 0.0
    if not float(routed_N.sum()):
        return torch.full_like(routed_N, 1 / len(routed_N)), shared
    return routed_N / routed_N.sum(), shared


def as_changes(c_XN: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_XN and 1 - shared_X of W = shared + sum_i c_i (W_i - shared): c over its sum, and that sum.

    Gradients pass. No change at all is all weight on the shared one, exactly. Any other row that sums to zero
    has no such form: it is moved by 1e-6.
    """
    near_X = c_XN.detach().sum(-1).abs() < SMALLEST_SUM / 2
    moved_XN = c_XN + near_X[..., None] * (SMALLEST_SUM / c_XN.shape[-1])
    total_X = moved_XN.sum(-1)
    return moved_XN / total_X[..., None], total_X.where((c_XN != 0).any(-1), 0.0)


def changes(alpha_LN: Tensor, shared_L: Tensor) -> Tensor:
    """c of W = shared + sum_i c_i (W_i - shared), the way back from `as_changes`: (1 - shared) alpha."""
    return (1 - shared_L)[:, None] * alpha_LN


def shared_of_sum(blocks: Sequence[str], total: float) -> Tensor:
    """shared_L of a sum whose c add up to `total` in every block; the head's add up to one.

    A head that had the c of the body would be `total` times as large, and so would scores.
    """
    shared = [0.0 if block == HEAD else 1 - total for block in blocks]
    return torch.tensor(shared, dtype=torch.float64)


def row_chunks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of `matrix`, runs of its rows, of about 2**18 elements; equal shapes are cut at equal rows.

    A merge that goes chunk by chunk reads every copy from memory once, whatever it does with it.
    """
    if not matrix.ndim:
        return (matrix,)
    return matrix.split(max(1, CHUNK * len(matrix) // max(1, matrix.numel())))


def check_weights(
    alpha_N: Tensor | Sequence[float],
    shared_weight: float,
    has_shared: bool,
    coordinates: Coordinates = "average",
) -> list[float]:
    """`alpha_N` as numbers; OptionError unless they and `shared_weight` are weights in `coordinates`."""
    values = torch.as_tensor(alpha_N, dtype=torch.float64)
    if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()):
        raise _bad_weights("alpha is not a list of finite numbers", str(values.tolist()))
    bounded = coordinates == "average"
    if bool((values < 0).any()) and bounded or not sums_to_one(values, TOLERANCE):
        raise _bad_weights("alpha does not form an average", f"{values.tolist()}, sum {float(values.sum())}")
    if not (0 <= shared_weight <= 1 if bounded else math.isfinite(shared_weight)):
        raise _bad_weights("shared weight is out of range", str(shared_weight))
    if shared_weight and not has_shared:
        raise _bad_weights("weight for a shared expert that is not there", str(shared_weight))
    return [float(v) for v in values.tolist()]


def sums_to_one(values_XN: Tensor, tolerance: float) -> bool:
    """Whether each row does, within `tolerance` and what large numbers of both signs round."""
    away_X, size_X = (values_XN.sum(-1) - 1).abs(), values_XN.abs().sum(-1)
    return bool((size_X.isfinite() & (away_X <= tolerance + ROUNDING * size_X)).all())


def _bad_weights(what: str, given: str) -> OptionError:
    return OptionError(
        what,
        given=given,
        expected="alpha >= 0 with sum 1; shared weight in [0, 1], and 0 without a shared expert",
        fix="correct the weights, or fit them again",
    )


def _terms(
    shared: Tensor | None, experts_N: Iterable[Tensor], alpha: list[float], shared_weight: float
) -> Iterator[tuple[float, Tensor]]:
    """Weights and matrices of the average, without those of weight zero."""
    if shared is not None and shared_weight:
        yield shared_weight, shared
    count = 0
    for count, matrix in enumerate(experts_N, start=1):
        weight = (1 - shared_weight) * alpha[count - 1] if count <= len(alpha) else 0.0
        if weight:
            yield weight, matrix
    if count != len(alpha):
        raise CheckpointError(
            "number of experts and number of weights differ",
            given=f"{count} experts, {len(alpha)} weights",
            expected="one weight per routed expert",
            fix="use coefficients that were fitted for this model",
        )


def _wide(matrix: Tensor) -> Tensor:
    """In float32, or in float64 if it is that: sums in bfloat16 would lose what little experts differ in."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _check_alike(matrix: Tensor, reference: Tensor) -> None:
    if matrix.shape != reference.shape or _wide(matrix[:0]).dtype != reference.dtype:
        raise CheckpointError(
            "experts do not have one shape",
            given=f"{tuple(matrix.shape)} {matrix.dtype} beside {tuple(reference.shape)}",
            expected="matrices of one shape and precision",
            fix="check that the folder holds one whole MoE checkpoint",
        )

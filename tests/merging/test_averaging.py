"""The average of experts: identities bit for bit, values against a float64 sum. N = 4 experts of 5 x 7."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moemerge.errors import CheckpointError, OptionError
from moemerge.merging.average import as_average, routing_normalized_average

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def matrices(count: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 7, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes: unlike ==, they tell -0.0 from 0.0."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@given(raw=st.lists(st.floats(0, 10), min_size=4, max_size=4).filter(any), shared_weight=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_identical_experts_give_that_matrix(dtype: torch.dtype, raw: list[float], shared_weight: float):
    dense = matrices(1, dtype)[0]
    dense[0, 0], dense[0, 1] = -0.0, 0.0
    alpha_N = torch.tensor(raw, dtype=torch.float64) / sum(raw)
    merged = routing_normalized_average(dense.clone(), [dense.clone() for _ in raw], alpha_N, shared_weight)
    assert merged.dtype == dtype
    assert torch.equal(bits(merged), bits(dense))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(4))
def test_one_hot_is_that_expert(dtype: torch.dtype, index: int) -> None:
    shared, *experts = matrices(5, dtype)
    one_hot = [float(i == index) for i in range(4)]
    assert torch.equal(bits(routing_normalized_average(shared, experts, one_hot, 0.0)), bits(experts[index]))
    assert torch.equal(bits(routing_normalized_average(None, experts, one_hot, 0.0)), bits(experts[index]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_weight_one_is_the_shared_expert(dtype: torch.dtype) -> None:
    shared, *experts = matrices(5, dtype)
    assert torch.equal(bits(routing_normalized_average(shared, experts, [0.25] * 4, 1.0)), bits(shared))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared_weight", [0.0, 0.3, 0.9])
def test_equals_the_sum_in_float64(dtype: torch.dtype, shared_weight: float) -> None:
    shared, *experts = matrices(5, dtype)
    alpha = [0.1, 0.0, 0.6, 0.3]
    expected = shared_weight * shared.double() + (1 - shared_weight) * sum(
        a * w.double() for a, w in zip(alpha, experts, strict=True)
    )
    merged = routing_normalized_average(shared, iter(experts), alpha, shared_weight)
    bound = 2 * torch.finfo(dtype).eps * expected.abs().clamp(min=1.0) if dtype != torch.float64 else 1e-14
    assert bool(((merged.double() - expected).abs() <= bound).all())


def test_low_precision_is_rounded_once() -> None:
    """Weights 1/256 are below bfloat16's resolution at 1: a sum kept in bfloat16 would lose all of them."""
    one, two = torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 3.0, dtype=torch.bfloat16)
    experts = [one, *itertools.repeat(two, 128)]
    merged = routing_normalized_average(None, experts, [0.5, *[1 / 256] * 128], 0.0)
    assert merged.tolist() == [2.0, 2.0, 2.0]


def test_inputs_are_left_alone_and_experts_stream() -> None:
    shared, *experts = matrices(5, torch.float32)
    copies = [w.clone() for w in (shared, *experts)]
    alive = []

    def stream():
        for matrix in experts:
            alive.append(matrix)
            yield matrix

    routing_normalized_average(shared, stream(), [0.25] * 4, 0.5)
    assert len(alive) == 4
    assert all(torch.equal(a, b) for a, b in zip(copies, (shared, *experts), strict=True))


@pytest.mark.parametrize(
    ("alpha", "shared_weight", "word"),
    [
        ([0.5, 0.6, 0.0, 0.0], 0.5, "average"),
        ([1.5, -0.5, 0.0, 0.0], 0.5, "average"),
        ([float("nan"), 1.0, 0.0, 0.0], 0.5, "finite"),
        ([0.25] * 4, 1.5, "range"),
        ([0.25] * 4, -0.1, "range"),
        ([0.25] * 4, float("nan"), "range"),
    ],
)
def test_weights_that_are_no_average_are_refused(alpha: list[float], shared_weight: float, word: str) -> None:
    shared, *experts = matrices(5, torch.float32)
    with pytest.raises(OptionError, match=word):
        routing_normalized_average(shared, experts, alpha, shared_weight)


def test_matrices_that_do_not_fit_are_refused() -> None:
    shared, *experts = matrices(5, torch.float32)
    with pytest.raises(OptionError, match="not there"):
        routing_normalized_average(None, experts, [0.25] * 4, 0.5)
    for count in (3, 5):
        with pytest.raises(CheckpointError, match="number of experts"):
            routing_normalized_average(shared, matrices(count, torch.float32), [0.25] * 4, 0.5)
    with pytest.raises(CheckpointError, match="one shape"):
        routing_normalized_average(shared, [*experts[:3], experts[3][:1]], [0.25] * 4, 0.5)


def test_proportions_that_sum_to_one_stay_as_they_are() -> None:
    """Weights 0.3 and 0.7 are not 0.30000000000000004 and 0.7; none at all is 0, and all is 1, exactly."""
    for shared in (0.3, 0.1, 0.7, 0.0, 1.0, 1e-17):
        alpha_N, found = as_average(torch.tensor([shared, 1 - shared], dtype=torch.float64), has_shared=True)
        assert found == shared and alpha_N.tolist() == [1.0]
    alpha_N, found = as_average(torch.tensor([0.25, 0.75], dtype=torch.float64), has_shared=False)
    assert found == 0 and alpha_N.tolist() == [0.25, 0.75]

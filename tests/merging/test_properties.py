"""Properties that hold for any coefficients, sizes and dtypes, on examples that hypothesis draws.

Shapes: L blocks, N routed experts. Examples are the same in every run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
from mergekit.merge_methods import registry
from mergekit.parameter_resolver import resolve_parameters
from tiny_models import save_dense
from torch import Tensor

from moemerge.merging.average import routing_normalized_average
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.mergekit.methods import HostMethod
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.stages.export import linear_config
from moemerge.stages.upcycle import upcycle

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
fewer = settings(few, max_examples=12)
dtypes = st.sampled_from(DTYPES)
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=2).map(tuple)
counts = st.integers(1, 6)
seeds = st.integers(0, 2**31)


@st.composite
def shares(draw: Any, count: int) -> Tensor:
    """Weights >= 0 with sum one, float64; zeros and very small ones among them."""
    raw = draw(
        st.lists(st.sampled_from([0.0, 1e-12, 1e-3]) | st.floats(0, 1), min_size=count, max_size=count)
    )
    raw[draw(st.integers(0, count - 1))] += 0.5
    values = torch.tensor(raw, dtype=torch.float64)
    return values / values.sum()


shared_weights = st.sampled_from([0.0, 1.0, 1e-9]) | st.floats(0, 1)


def matrices(count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Numbers of very different sizes, exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        sizes = 10.0 ** torch.randint(-3, 3, shape, generator=generator)
        return (sizes * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    return [drawn() for _ in range(count)]


def by_hand(shared: Tensor, experts: list[Tensor], alpha_N: Tensor, weight: float) -> Tensor:
    total = weight * shared.double()
    for alpha, expert in zip(alpha_N.tolist(), experts, strict=True):
        total = total + (1 - weight) * alpha * expert.double()
    return total


def bound(tensors: list[Tensor], terms: int, result: Tensor) -> Tensor:
    """What rounding can do to `result`, element by element, M being the largest |W| of any copy there.

    R - sum_i w_i (R - W_i) in float32 (or float64): per term, R - W_i, the weight, the product and the sum
    are rounded once each, all at most 3 M in size; then the result is rounded, once, to its dtype.
    """
    wide, kept = torch.finfo(torch.promote_types(result.dtype, torch.float32)), torch.finfo(result.dtype)
    largest = torch.stack([tensor.double().abs() for tensor in tensors]).amax(0)
    last = 0.5 * kept.eps * result.double().abs() + kept.smallest_normal * kept.eps
    return (3 + 2 * terms) * wide.eps * largest + last


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes: unlike ==, they tell -0.0 from 0.0."""
    return tensor.contiguous().view(torch.uint8)


# The average


@few
@given(data=st.data(), count=counts, shape=shapes, dtype=dtypes, seed=seeds, weight=shared_weights)
def test_the_average_is_the_sum_by_hand(
    data: st.DataObject, count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int, weight: float
) -> None:
    shared, *experts = matrices(count + 1, shape, dtype, seed)
    alpha_N = data.draw(shares(count))
    merged = routing_normalized_average(shared, iter(experts), alpha_N, weight)
    error = (merged.double() - by_hand(shared, experts, alpha_N, weight)).abs()
    assert merged.dtype == dtype and merged.shape == shape
    assert bool((error <= bound([shared, *experts], count + 1, merged)).all())


@few
@given(data=st.data(), count=counts, shape=shapes, dtype=dtypes, seed=seeds, weight=shared_weights)
def test_its_identities_are_exact(
    data: st.DataObject, count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int, weight: float
) -> None:
    """Equal experts give that expert; one-hot weights that one; shared weight one the shared expert."""
    shared, *experts = matrices(count + 1, shape, dtype, seed)
    shared.flatten()[0] = -0.0
    alpha_N = data.draw(shares(count))
    equal = routing_normalized_average(shared.clone(), [shared.clone()] * count, alpha_N, weight)
    assert torch.equal(bits(equal), bits(shared))
    chosen = data.draw(st.integers(0, count - 1))
    one_hot = [float(place == chosen) for place in range(count)]
    assert torch.equal(bits(routing_normalized_average(shared, experts, one_hot, 0.0)), bits(experts[chosen]))
    assert torch.equal(bits(routing_normalized_average(shared, experts, alpha_N, 1.0)), bits(shared))


@few
@given(data=st.data(), count=counts, shape=shapes, dtype=dtypes, seed=seeds, weight=shared_weights)
def test_the_order_of_experts_does_not_matter(
    data: st.DataObject, count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int, weight: float
) -> None:
    shared, *experts = matrices(count + 1, shape, dtype, seed)
    alpha_N = data.draw(shares(count))
    order = data.draw(st.permutations(range(count)))
    merged = routing_normalized_average(shared, experts, alpha_N, weight)
    other = routing_normalized_average(shared, [experts[i] for i in order], alpha_N[order], weight)
    error = (merged.double() - other.double()).abs()
    assert bool((error <= 2 * bound([shared, *experts], count + 1, merged)).all())


@few
@given(data=st.data(), count=counts, shape=shapes, seed=seeds, weight=shared_weights)
def test_the_average_is_linear(
    data: st.DataObject, count: int, shape: tuple[int, ...], seed: int, weight: float
) -> None:
    """In the experts (a power of two as a factor changes no digit), and in the coefficients."""
    shared, *experts = matrices(count + 1, shape, torch.float32, seed)
    more, *others = matrices(count + 1, shape, torch.float32, seed + 1)
    alpha_N, beta_N = data.draw(shares(count)), data.draw(shares(count))
    merged = routing_normalized_average(shared, experts, alpha_N, weight)
    scaled = routing_normalized_average(-4 * shared, [-4 * expert for expert in experts], alpha_N, weight)
    assert torch.equal(scaled, -4 * merged)
    largest = [t.abs() + u.abs() for t, u in zip((shared, *experts), (more, *others), strict=True)]
    allowed = 4 * bound(largest, count + 1, merged)
    both = routing_normalized_average(
        shared + more, [a + b for a, b in zip(experts, others, strict=True)], alpha_N, weight
    )
    parts = merged.double() + routing_normalized_average(more, others, alpha_N, weight)
    assert bool(((both - parts).abs() <= allowed).all())
    middle = routing_normalized_average(shared, experts, (alpha_N + beta_N) / 2, weight)
    ends = merged.double() + routing_normalized_average(shared, experts, beta_N, weight)
    assert bool(((middle - ends / 2).abs() <= allowed).all())


# Coefficients on disk


@st.composite
def coefficients(draw: Any, layers: list[int] | None = None, count: int | None = None) -> Coefficients:
    """Of `layers` and `count` experts, or any."""
    layers = layers or sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=5)))
    count = count or draw(counts)
    alpha_LN = torch.stack([draw(shares(count)) for _ in layers])
    shared_L = torch.tensor([draw(shared_weights) for _ in layers], dtype=torch.float64)
    return Coefficients.of_layers(
        layers, alpha_LN, shared_L, {"method": draw(st.text("aé \n\"'", max_size=5))}
    )


@few
@given(made=coefficients())
def test_coefficients_come_back_bit_for_bit(made: Coefficients) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for source in (made.save(folder), folder):
            back = Coefficients.load(source)
            assert torch.equal(bits(back.alpha_LN), bits(made.alpha_LN))
            assert torch.equal(bits(back.shared_L), bits(made.shared_L))
            assert back.blocks == made.blocks and back.meta["method"] == made.meta["method"]


# mergekit


@fewer
@given(data=st.data(), made=coefficients(), shape=shapes, dtype=dtypes, seed=seeds)
def test_mergekits_linear_is_the_sum_by_hand(
    data: st.DataObject, made: Coefficients, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    row = data.draw(st.integers(0, len(made.blocks) - 1))
    tensors = matrices(made.num_experts + 1, shape, dtype, seed)
    weight = float(made.shared_L[row])
    merged = HostMethod("linear", {"normalize": False}, made).merge("some.weight", row, tensors, True)
    expected = by_hand(tensors[0], tensors[1:], made.alpha_LN[row], weight)
    assert merged.dtype == dtype
    assert bool(((merged.double() - expected).abs() <= bound(tensors, len(tensors), merged)).all())


CASES = [
    ("llama", 40, "all", True),
    ("llama", 12, "1,10-11", False),
    ("bert", 21, "last:20", True),
    ("gpt2", 11, "0,1,10", False),
    ("phi3", 2, "all", True),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    """A MoE of so many layers, experts in some of them."""
    family, count, layers, shared = request.param
    folder = tmp_path_factory.mktemp("moe")
    dense = save_dense(folder / "dense", family, num_hidden_layers=count)
    fields = {"num_routed_experts": 2, "num_experts_per_tok": 1, "layers": layers, "shared_expert": shared}
    return MoeCheckpoint(upcycle(model=str(dense), output=folder / "moe", **fields))


def resolved(config: MergeConfiguration, tensor: str) -> list[float]:
    """The weight of each model for a tensor, by mergekit's own resolution, as its planner calls it."""
    models = config.models or []
    sources = [InputSliceDefinition(layer_range=(0, 1), **dict(one)) for one in models]
    reader = ConfigReader(config=config, t=0).for_out_slice(OutputSliceDefinition(sources=sources))
    _, found = resolve_parameters(
        registry.get("linear").spec,
        tensor_name=tensor,
        inputs={one.model: tensor for one in models},
        sources=reader.parameter_sources,
        base_model=reader.base_model,
    )
    return [found[one.model]["weight"] for one in models]


@settings(few, max_examples=3)
@given(data=st.data())
def test_the_exported_yaml_gives_each_tensor_its_own_weights(
    data: st.DataObject, source: MoeCheckpoint
) -> None:
    """Layer 1 is not layer 10, and what is not merged comes whole from the first model."""
    layers, has_shared = source.settings.layers, source.settings.shared_expert
    made = data.draw(coefficients(layers, 2))
    distinct_L = torch.linspace(0.1, 0.9, len(layers), dtype=torch.float64)
    shared_L = distinct_L if has_shared else torch.zeros_like(distinct_L)
    alpha_LN = 0.5 * made.alpha_LN + 0.5 * torch.stack([distinct_L, 1 - distinct_L], 1)
    made = Coefficients.of_layers(layers, alpha_LN, shared_L)
    config = MergeConfiguration.model_validate(linear_config(source, made, Path("/nowhere")))
    for name in source.backbone:
        assert resolved(config, name) == [1.0] + [0.0] * (len(source.member_names) - 1), name
    for tensor in source.tensors:
        row = layers.index(tensor.layer)
        routed = ((1 - shared_L[row]) * alpha_LN[row]).tolist()
        assert resolved(config, tensor.dense) == [float(shared_L[row])] * has_shared + routed, tensor.dense

"""The gradient of a linear layer that is put off: against autograd's, and never larger than it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moemerge.merging.weight_gradients import WeightGradient

WIDTHS = (5, 7)


def make_layer(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*WIDTHS, bias=bias).double()


def batch(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, WIDTHS[0], generator=generator, dtype=torch.float64)


def loss_of(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x).tanh().sum()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1, 1), (1, 40, 2), (40, 1)])
def test_equals_autograd_over_batches_of_any_size(bias: bool, sizes: tuple[int, ...]) -> None:
    plain, layer = make_layer(bias), make_layer(bias)
    inputs = [batch(tokens, seed).requires_grad_() for seed, tokens in enumerate(sizes)]
    expected = torch.autograd.grad(sum(loss_of(plain, x) for x in inputs), [*plain.parameters(), *inputs])  # type: ignore[arg-type]

    found: list[Tensor] = []
    last = [False]
    kept = WeightGradient(layer, found.append, lambda: last[0])
    mine = [batch(tokens, seed).requires_grad_() for seed, tokens in enumerate(sizes)]
    for number, x in enumerate(mine, start=1):
        last[0] = number == len(mine)
        loss_of(layer, x).backward()
        assert kept.held <= 2 * layer.weight.numel(), "no more than the gradient, and what becomes of it"
    assert len(found) == 1 and kept.held == 0
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.bias.grad, expected[1], rtol=1e-12, atol=1e-12)
    for x, theirs in zip(mine, expected[-len(sizes) :], strict=True):
        torch.testing.assert_close(x.grad, theirs, rtol=1e-12, atol=1e-12)


def test_short_batches_are_multiplied_at_once_and_long_ones_not_kept() -> None:
    layer = nn.Linear(50, 70, bias=False)
    kept = WeightGradient(layer, lambda _: None, lambda: False)
    loss_of(layer, torch.randn(2, 50)).backward()
    assert kept.held == 2 * (50 + 70), "inputs and output gradients of two tokens"
    loss_of(layer, torch.randn(80, 50)).backward()
    assert kept.held == 50 * 70, "they outgrew two fifths of the gradient"


def test_used_twice_in_a_pass_the_parts_add_up() -> None:
    plain, layer, x = make_layer(False), make_layer(False), batch(3, 0)
    expected = torch.autograd.grad(loss_of(plain, x) + loss_of(plain, 2 * x), plain.weight)[0]
    found: list[Tensor] = []
    WeightGradient(layer, found.append, lambda: True)
    (loss_of(layer, x) + loss_of(layer, 2 * x)).backward()
    torch.testing.assert_close(torch.stack(found).sum(0), expected, rtol=1e-12, atol=1e-12)


def test_the_layer_computes_what_it_did_and_autograd_may_still_ask() -> None:
    plain, layer, x = make_layer(True), make_layer(True), batch(3, 0)
    found: list[Tensor] = []
    WeightGradient(layer, found.append, lambda: True)
    with torch.inference_mode():
        assert torch.equal(layer(x), plain(x))
    weight = layer.weight.detach().clone().requires_grad_()
    loss = torch.func.functional_call(layer, {"weight": weight}, (x,)).tanh().sum()
    mine, theirs = (
        torch.autograd.grad(loss, weight)[0],
        torch.autograd.grad(loss_of(plain, x), plain.weight)[0],
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert not found

"""Gradients of linear layers' weights, put off until enough tokens are there.

Few tokens make dW = dY^T X a slow product that writes all of dW; the tokens of several batches at once make
one product that takes little longer. Until then inputs and output gradients are kept, as long as they take
less than two fifths of what dW does.

Shapes: T tokens, D inputs and F outputs of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightGradient:
    """Takes over a linear layer, and gives `reduce` its weight's gradient, [F, D], when `is_last` says so.

    The weight itself asks for no gradient then. `is_last()` is asked in every backward pass: whether this is
    the last one of those that add up. Several uses of the layer in it call `reduce` once each, with parts of
    the gradient that add up too.
    """

    def __init__(
        self, layer: nn.Linear, reduce: Callable[[Tensor], None], is_last: Callable[[], bool]
    ) -> None:
        self.reduce, self.is_last = reduce, is_last
        # In numbers. T kept tokens take T (D + F) of them, dW takes D F: what waits must cost less memory
        # than dW.
        self._limit = 2 * layer.weight.numel() // 5
        self._inputs_TD: list[Tensor] = []
        self._outputs_TF: list[Tensor] = []
        self._sum_FD: Tensor | None = None
        # With a weight that asks for no gradient, and an input that needs none either, autograd would leave
        # the layer out of the backward pass. The anchor asks for one, and gets None.
        anchor = torch.zeros((), requires_grad=True)
        layer.weight.requires_grad_(False)
        run = cast(Callable[..., Tensor], _Linear.apply)
        layer.forward = lambda x: run(x, layer.weight, layer.bias, anchor, self)  # type: ignore

    @property
    def held(self) -> int:
        """How many numbers are kept at the moment."""
        parts = [*self._inputs_TD, *self._outputs_TF]
        return sum(part.numel() for part in parts + ([] if self._sum_FD is None else [self._sum_FD]))

    def add(self, x: Tensor, dy: Tensor) -> None:
        """Take the layer's inputs, [..., D], and the gradients of its outputs, [..., F], of one batch."""
        self._inputs_TD.append(x.reshape(-1, x.shape[-1]))
        self._outputs_TF.append(dy.reshape(-1, dy.shape[-1]))
        # One product as soon as enough tokens wait, or no more will come.
        last = self.is_last()
        if last or sum(kept.numel() for kept in self._inputs_TD + self._outputs_TF) > self._limit:
            self._multiply()
        if last:
            assert self._sum_FD is not None
            gradient_FD, self._sum_FD = self._sum_FD, None
            self.reduce(gradient_FD)

    def _multiply(self) -> None:
        """Add dY^T X of all that waits to the sum, and let it go."""
        both = (self._inputs_TD, self._outputs_TF)
        x_TD, dy_TF = (torch.cat(kept) if len(kept) > 1 else kept[0] for kept in both)
        self._inputs_TD, self._outputs_TF = [], []
        if self._sum_FD is None:
            self._sum_FD = dy_TF.T @ x_TD
        else:
            self._sum_FD.addmm_(dy_TF.T, x_TD)


class _Linear(torch.autograd.Function):
    """nn.Linear's function, with what the weight's gradient is made of kept, unless autograd asks for it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None, anchor: Tensor, kept: WeightGradient
    ) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        ctx.kept = kept
        return functional.linear(x, weight_FD, bias_F)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_FD = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        # Somebody who switches the weight's gradient on again gets it from autograd as usual.
        if not wants_weight:
            ctx.kept.add(x, dy)
        dx = dy @ weight_FD if wants_x else None
        dweight_FD = dy.flatten(0, -2).T @ x.flatten(0, -2) if wants_weight else None
        dbias_F = dy.flatten(0, -2).sum(0) if wants_bias else None
        return dx, dweight_FD, dbias_F, None, None

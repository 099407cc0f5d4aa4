"""A head with factors: two layers and a sum of K factors with weights; with Weibull noise, if asked for.

D width of the last state, K factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, softplus

from moemerge.models.heads.base import Head, WideLinear
from moemerge.models.heads.weibull import draw_weibull, relative_variance

if TYPE_CHECKING:
    from moemerge.models.heads.saved import SavedHead

LEAST, MOST = 1e-6, 1e4  # of a factor's mean, and of its shape less one: the bounds of BNRM's code


class MlpHead(Head):
    """score = sum_k m_k(h) w_k, m = relu of two layers, K = width; no bias, which no difference would show.

    With noise, training draws each factor from Weibull(mean m_k, shape 1 + softplus of two more layers), and
    each weight, once a batch, as w_k times a draw of mean 1 whose shape is a function of w_k; eval mode takes
    the means. Dropout is of h. Source: the head of BNRM (arXiv 2602.10623), here with weights of any sign
    and without its prior: the control that shows what non-negativity is worth.

    pessimism: how many standard deviations eval mode takes off a score.
    """

    outputs = ("weights",)
    pessimism = 0.0

    def __init__(self, in_features: int, settings: SavedHead) -> None:
        super().__init__(in_features, settings)
        width = settings.width
        self.mean_in, self.mean_out = WideLinear(in_features, width), WideLinear(width, width)
        if settings.noise:
            self.shape_in, self.shape_out = WideLinear(in_features, width), WideLinear(width, width)
            self.weight_shape_in, self.weight_shape_out = WideLinear(1, width), WideLinear(width, 1)
        self.weights = nn.Parameter(torch.zeros(width))

    def score(self, states: Tensor) -> Tensor:
        """[..., D] -> [...]: a draw in training, else the posterior mean less `pessimism` deviations."""
        if self.training:
            states = dropout(states, self.settings.dropout)
        factors, weights_K = self.means(states), self.weight_means(states.dtype)
        if self.training and self.settings.noise:
            factors = draw_weibull(factors, self.shapes(states))
            weights_K = draw_weibull(weights_K, self.weight_shapes(weights_K))
        scores = factors @ weights_K
        if self.training or not self.pessimism:
            return scores
        # Rounding can take a variance of almost 0 below it.
        return scores - self.pessimism * self.variance(states).clamp(min=0).sqrt()

    def means(self, states: Tensor) -> Tensor:
        """Means of the factors, [..., D] -> [..., K]."""
        inner = self.mean_in(states).relu()
        means: Tensor = self.mean_out(inner).relu().clamp(LEAST, MOST)
        return means

    def shapes(self, states: Tensor) -> Tensor:
        """Shapes of the factors' distributions, above 1, [..., D] -> [..., K]."""
        inner = self.shape_in(states).relu()
        return 1 + softplus(self.shape_out(inner)).clamp(LEAST, MOST)

    def weight_means(self, dtype: torch.dtype) -> Tensor:
        """The weights [K]."""
        return self.weights.to(dtype)

    def weight_shapes(self, weights_K: Tensor) -> Tensor:
        """Shapes of the weights' distributions, above 1, [K]: one function of each weight."""
        inner = self.weight_shape_in(weights_K[:, None]).relu()
        return 1 + softplus(self.weight_shape_out(inner)).clamp(LEAST, MOST)[:, 0]

    def variance(self, states: Tensor) -> Tensor:
        """Variance of the score under the noise of training, dropout left out, [..., D] -> [...]; else 0.

        With independent factors of mean m and variance m^2 c, weights likewise:
        sum_k m^2 (1 + c) w^2 (1 + c_w) - m^2 w^2.
        """
        means, weights_K = self.means(states), self.weight_means(states.dtype)
        if not self.settings.noise:
            return torch.zeros_like(means[..., 0])
        square, square_K = means**2, weights_K**2
        noisy = square * (1 + relative_variance(self.shapes(states)))
        return noisy @ (square_K * (1 + relative_variance(self.weight_shapes(weights_K)))) - square @ square_K

    def difference_variance(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Variance of score(chosen) - score(rejected) with one draw of weights for both, [..., D] -> [...].

        sum_k E[w^2] (v_c + v_r + (m_c - m_r)^2) - w^2 (m_c - m_r)^2, v = m^2 c.
        """
        weights_K = self.weight_means(chosen.dtype)
        gap = (self.means(chosen) - self.means(rejected)) ** 2
        if not self.settings.noise:
            return torch.zeros_like(gap[..., 0])
        spread = sum(self.means(x) ** 2 * relative_variance(self.shapes(x)) for x in (chosen, rejected))
        square_K = weights_K**2
        drawn_K = square_K * (1 + relative_variance(self.weight_shapes(weights_K)))
        return (spread + gap) @ drawn_K - gap @ square_K

    def draw(self, generator: torch.Generator, start: str) -> None:
        """Layers as torch draws them; weights N(0, 1/K), or with `start` uniform within 1 / sqrt(K)."""
        for module in self.modules():
            if isinstance(module, WideLinear):
                module.draw(generator)
        bound = len(self.weights) ** -0.5
        with torch.no_grad():
            if start == "uniform":
                self.weights.uniform_(-bound, bound, generator=generator)
            else:
                self.weights.normal_(0.0, bound, generator=generator)

"""BNRM's head: factors and weights that cannot be negative, noisy in training, under a prior."""

from __future__ import annotations

import torch
from torch import Tensor

from moemerge.models.heads.base import wide
from moemerge.models.heads.mlp import LEAST, MlpHead
from moemerge.models.heads.weibull import kl_from_gamma


class NonnegativeHead(MlpHead):
    """As MlpHead, with weights relu(w); with noise, factors and weights have a Gamma(1, 1) prior.

    Source: Bayesian Non-negative Reward Modeling (arXiv 2602.10623). Readings: the divergence is that of the
    factors of the token that scores are read at, without dropout, a sum over factors; that of the weights,
    which are there once for all data, counts once per pass over them. The paper's relu(b) falls out of every
    difference, and is left out.
    """

    def weight_means(self, dtype: torch.dtype) -> Tensor:
        """The weights [K], where they are above 0."""
        return super().weight_means(dtype).relu()

    @property
    def has_prior(self) -> bool:
        """Where nothing is drawn there is no posterior."""
        return self.settings.noise

    def prior_loss(self, states_ND: Tensor, num_pairs: int) -> Tensor:
        """KL divergences in nats: a pair's two texts' (mean over pairs), and the weights' / `num_pairs`."""
        with torch.autocast(states_ND.device.type, enabled=False):
            states_ND = wide(states_ND)
            weights_K = self.weight_means(states_ND.dtype).clamp(min=LEAST)
            of_texts_N = kl_from_gamma(self.means(states_ND), self.shapes(states_ND)).sum(-1)
            of_weights = kl_from_gamma(weights_K, self.weight_shapes(weights_K)).sum()
            return 2 * of_texts_N.mean() + of_weights / num_pairs

    def draw(self, generator: torch.Generator, start: str) -> None:
        """As MlpHead; `positive`: all weights above 0, where a negative one would have no gradient ever."""
        super().draw(generator, start)
        if start == "positive":
            with torch.no_grad():
                self.weights.abs_()

    def facts(self) -> dict[str, float]:
        """live: share of the weights that are above 0."""
        return {"live": (self.weights > 0).float().mean().item()}

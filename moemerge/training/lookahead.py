"""MetaRM's step: the gradient is taken a little ahead, where the policy's own answers are told further apart.

Shapes: K answers of a set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moemerge.data.rows import listed
from moemerge.data.tokenise import EncodedCandidates
from moemerge.errors import DataError
from moemerge.models.scoring import collate, gates_by_prompt

LEAST_ANSWERS = 3
SMALLEST = 1e-12


class Lookahead:
    """theta' = theta + eta grad J, J being the mean of 2 / K^2 sum_i<j sigmoid |z_i - z_j| over sets.

    z are the scores of a set's K answers, standardised within the set: J of the scores themselves would grow
    by their scale alone. eta is such that |eta grad J| = `rate` |theta|, both of what trains. The sets of an
    update are drawn from the seed and its number, so a resumed run draws the same.
    The loss's gradient at theta' is applied to theta as it is, in first order. That, the step's size and the
    standardising are choices made here. Source: MetaRM (arXiv 2405.00438).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        candidates: Sequence[EncodedCandidates],
        pad: int,
        rate: float,
        num_sets: int,
        seed: int,
    ) -> None:
        self.model, self.candidates, self.pad = model, candidates, pad
        self.rate, self.num_sets, self.seed = rate, min(num_sets, len(candidates)), seed
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def drawn(self, step: int) -> list[EncodedCandidates]:
        """The sets of the update after `step` updates."""
        generator = np.random.default_rng((self.seed, step))
        rows = generator.choice(len(self.candidates), self.num_sets, replace=False)
        return [self.candidates[row] for row in rows]

    def difference(self, step: int) -> Tensor:
        """J on the sets of that update, at the model's present weights."""
        sets = self.drawn(step)
        texts = [answer for candidates in sets for answer in candidates.answers]
        inputs = collate(texts, self.pad, gates_by_prompt(self.model), self.model.device)
        scores = self.model(**inputs, use_cache=False).logits[:, 0]
        parts = scores.split([len(candidates.answers) for candidates in sets])
        return torch.stack([spread(scores_K) for scores_K in parts]).mean()

    def step(self, difference: Tensor) -> list[Tensor]:
        """eta grad J for each parameter that trains; zeros where J does not depend on any."""
        found = torch.autograd.grad(difference, self.trained, allow_unused=True)
        pairs = zip(found, self.trained, strict=True)
        gradients = [torch.zeros_like(p) if gradient is None else gradient for gradient, p in pairs]
        length, size = _norm(gradients), _norm(self.trained)
        eta = self.rate * size / length if length else 0.0
        return [eta * gradient for gradient in gradients]

    @contextmanager
    def moved(self, step: Sequence[Tensor]) -> Iterator[None]:
        """While open, the weights are theta'; then they are theta again, to the last bit."""
        kept = [parameter.detach().clone() for parameter in self.trained]
        try:
            _set(self.trained, [old + change for old, change in zip(kept, step, strict=True)])
            yield
        finally:
            _set(self.trained, kept)


def spread(scores_K: Tensor) -> Tensor:
    """2 / K^2 sum_i<j sigmoid |z_i - z_j|, z being the scores standardised: as large as they lie apart."""
    centred_K = scores_K - scores_K.mean()
    z_K = centred_K / (centred_K.square().mean() + SMALLEST).sqrt()
    upper = torch.triu_indices(len(z_K), len(z_K), 1, device=z_K.device)
    return 2 / len(z_K) ** 2 * torch.sigmoid((z_K[upper[0]] - z_K[upper[1]]).abs()).sum()


def check_candidates(candidates: Sequence[EncodedCandidates]) -> None:
    """Raise DataError for sets whose standardised scores say nothing: two are always as far apart."""
    small = [c.candidates.row for c in candidates if len(c.answers) < LEAST_ANSWERS]
    if small:
        raise DataError(
            f"{len(small)} of {len(candidates)} sets for the lookahead have too few answers",
            given=f"fewer than {LEAST_ANSWERS} in rows {listed(small)}",
            expected=f"{LEAST_ANSWERS} answers or more, whose scores are standardised within the set",
            fix="sample more answers per prompt (moemerge sample --per-prompt), or leave these sets out",
        )


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(tensor.detach().double().square().sum().item() for tensor in tensors))

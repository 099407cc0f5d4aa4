"""The contrastive loss on state differences. Shapes: B pairs in a batch, D width of the pooled state."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from moemerge.errors import OptionError
from moemerge.training.losses.base import Batch, Course, Loss


def contrast(course: Course) -> Loss:
    """SimCSE on h = state(chosen) - state(rejected): each pair's two views are to be told from the others'.

    -log(exp(cos(u_i, v_i) / t) / sum_j exp(cos(u_i, v_j) / t)), u and v being two dropout views of h and t
    options.contrast_temperature. Dropout is of h itself, as TRL switches the model's own off and decoders of
    today have none; it is drawn from the seed, the step and the pair's place, so a resumed run draws the
    same. Raises OptionError for batches of one pair, in which there is no other.
    Source: the SimCSE variant of the contrastive term, Secrets of RLHF II (arXiv 2401.06080); SimCSE
    (arXiv 2104.08821), equation 4.
    """
    options = course.options
    if options.batch_size < 2:
        raise OptionError(
            "objective contrast needs several pairs in a batch",
            given=f"batch_size {options.batch_size}",
            expected="2 pairs or more, each of which is told from the others",
            fix="raise batch_size (gradient_accumulation does not help), or take contrast out of objectives",
        )

    def of(batch: Batch) -> Tensor:
        assert batch.pooled_2BD is not None
        chosen_BD, rejected_BD = batch.pooled_2BD.chunk(2)
        h_BD = chosen_BD - rejected_BD
        masks_2BD = masks(options.seed, batch.step, batch.places_B, h_BD, options.contrast_dropout)
        u_BD, v_BD = (normalize(h_BD * mask_BD, dim=-1) for mask_BD in masks_2BD)
        cosines_BB = u_BD @ v_BD.T / options.contrast_temperature
        return cross_entropy(cosines_BB, torch.arange(len(h_BD), device=h_BD.device), reduction="none")

    return Loss(of, pooled=True)


def masks(seed: int, step: int, places_B: Tensor, like_BD: Tensor, chance: float) -> Tensor:
    """What each view keeps of a state, [2, B, D]: 0 with the `chance` of dropout, else 1."""
    width = like_BD.shape[1]
    # A generator of its own for each pair and step: a resumed run draws the same, in any order of pairs.
    draws = [np.random.default_rng((seed, step, place)).random((2, width)) for place in places_B.tolist()]
    return torch.tensor(np.stack(draws, 1) >= chance, device=like_BD.device).to(like_BD.dtype)

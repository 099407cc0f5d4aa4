"""The weighted sum of objectives that a trainer minimises, and how strongly each pulls at the trunk.

Shapes: B pairs of a batch, 2B texts with the chosen ones first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from moemerge.models.head_tensors import in_head
from moemerge.models.heads.base import Head, head_of
from moemerge.models.pooling import last_states, pooled_positions, pooled_states
from moemerge.models.scoring import gates_by_prompt
from moemerge.training.losses import CENTER, LOSSES, PRIOR
from moemerge.training.losses.base import Batch, Course, Loss


class Mixture:
    """The objectives of a training with their weights; `center` is one more term, of options.center.

    So is `prior`, of options.head_kl, if the model's head has one.

    Raises OptionError for an unknown objective, and whatever making one raises.
    """

    def __init__(self, course: Course) -> None:
        options = course.options
        self.model, self.pad = course.model, course.pad
        self.losses: dict[str, Loss] = {name: LOSSES.get(name)(course) for name in options.minimised}
        self.weights = options.minimised | ({CENTER: options.center} if options.center else {})
        self.num_pairs = len(course.pairs)
        self.head = head_with_prior(course.model) if options.head_kl else None
        self.weights |= {PRIOR: options.head_kl} if self.head is not None else {}

    def answer(self, model: nn.Module, inputs: dict[str, Any], places_B: Tensor, step: int) -> Batch:
        """One forward pass of `model`, which may wrap the one that was given before."""
        prompts_2B, gated = inputs["prompt_lengths"], gates_by_prompt(self.model)
        given = {name: value for name, value in inputs.items() if gated or name != "prompt_lengths"}
        ids_2BT = inputs["input_ids"]
        with ExitStack() as stack:
            pooled: list[Tensor] = []
            states: list[Tensor] = []
            if self.head is not None or any(loss.pooled for loss in self.losses.values()):
                positions_2B = pooled_positions(ids_2BT, self.pad)
                pooled = stack.enter_context(pooled_states(self.model, positions_2B))
            if any(loss.states for loss in self.losses.values()):
                states = stack.enter_context(last_states(self.model))
            scores_2B = model(**given, use_cache=False).logits[:, 0]
        mask_2BT = inputs["attention_mask"]
        kept = [tensors[0] if tensors else None for tensors in (pooled, states)]
        return Batch(scores_2B, ids_2BT, mask_2BT, prompts_2B, places_B, step, *kept)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Mean of each objective over the batch's pairs, without its weight."""
        terms = {name: loss.of(batch).mean() for name, loss in self.losses.items()}
        if CENTER in self.weights:
            chosen_B, rejected_B = batch.scores_2B.chunk(2)
            # TRL's center_rewards_coefficient (Helping or Herding?, arXiv 2312.09244, equation 2).
            terms[CENTER] = torch.mean((chosen_B + rejected_B) ** 2)
        if self.head is not None:
            assert batch.pooled_2BD is not None
            terms[PRIOR] = self.head.prior_loss(batch.pooled_2BD, self.num_pairs)
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """What is minimised: the weighted sum of the terms."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def gradient_ratios(self, batch: Batch) -> dict[str, float]:
        """Norm of each weighted term's gradient over that of plain Bradley-Terry's, both of the trunk.

        The trunk is what trains outside the head. NaN where nothing of it trains, or Bradley-Terry's is 0.
        """
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        trunk = [parameter for name, parameter in trained if not in_head(self.model, name)]
        plain = _norm(-logsigmoid(batch.differences_B).mean(), trunk)
        norms = {name: _norm(self.weights[name] * term, trunk) for name, term in self.terms(batch).items()}
        return {name: norm / plain if plain else math.nan for name, norm in norms.items()}


def head_with_prior(model: nn.Module) -> Head | None:
    """The model's head, if training adds to the loss what its prior asks for."""
    head = head_of(model)
    return head if head is not None and head.has_prior else None


def _norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    if not parameters or not loss.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return math.sqrt(sum(square.item() for square in squares))

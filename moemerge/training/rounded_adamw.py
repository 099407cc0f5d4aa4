"""AdamW on bfloat16 weights: it computes in float32, and each new weight is rounded up or down at random.

A bfloat16 has 8 significant bits, so that an update below 1/512 of its weight is lost by rounding to the
nearest. Rounded up with a chance that is its distance from the lower neighbour, it comes through on average
(stochastic rounding; e.g. Zamirai et al. 2020, Revisiting BFloat16 Training, arXiv 2010.06192).
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moemerge.models import processes

DROPPED = 16  # bits of a float32 that a bfloat16 lacks


class RoundedAdamW(torch.optim.AdamW):
    """AdamW whose moments are float32 whatever its weights are; of weights in parts, the own parts.

    Draws come from `seed`, the weight's number and the step alone: they are the same after a resume, and in
    every process that holds the weight.
    """

    def __init__(self, groups: list[dict[str, Any]], seed: int, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient; there is no closure."""
        weights = [(group, weight) for group in self.param_groups for weight in group["params"]]
        for number, (group, weight) in enumerate(weights):
            if weight.grad is not None:
                self._update(number, weight, processes.own_part(weight.grad), group)

    def _update(self, number: int, weight: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        held = processes.own_part(weight)
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state |= {name: torch.zeros_like(held, dtype=torch.float32) for name in MOMENTS}
        mean, square = (processes.own_part(state[name]) for name in MOMENTS)
        whole, (beta1, beta2) = held.float(), group["betas"]
        adamw(
            [whole], [gradient.float()], [mean], [square], [], [state["step"]], foreach=False, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip
        draws = torch.Generator(held.device)
        draws.manual_seed(Random(f"{self._seed} {number} {int(state['step'])}").getrandbits(63))
        held.copy_(rounded(whole, draws) if held.dtype == torch.bfloat16 else whole)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As AdamW's, but moments stay float32: there they become what the weights are."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, moments in state_dict["state"].items():
            for name in MOMENTS:
                self.state[weights[number]][name] = moments[name].to(weights[number].device)


MOMENTS = ("exp_avg", "exp_avg_sq")


def rounded(values: Tensor, draws: torch.Generator) -> Tensor:
    """float32 values as bfloat16: each one of its two neighbours, by chance, such that the mean is the value.

    A value that bfloat16 has stays as it is, and so does one that is not finite.
    """
    noise = torch.randint(2**DROPPED, values.shape, dtype=torch.int32, device=values.device, generator=draws)
    # Bits of a float32 count up in size, whatever its sign: adding below the cut carries into it by chance.
    cut = (values.view(torch.int32) + noise) & -(2**DROPPED)
    return torch.where(values.isfinite(), cut.view(torch.float32), values).bfloat16()

"""Which attention heads are replaced: chosen by REINFORCE, or greedily.

M masks, C candidates, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from moemerge.artifacts.progress import hidden
from moemerge.artifacts.workspace import once
from moemerge.options.few_shot import FewShotSettings

START = -1.0  # logit of each head's chance at the start
LEAST = 1e-3  # chance of a head, and of its absence
STEPS_KEPT = 25  # steps after which a killed choice need not be made again
BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's


class Losses(Protocol):
    """Examples, and what a mask of heads does to the loss of one."""

    def __len__(self) -> int:
        """How many examples."""

    def of(self, number: int, masks_MLH: Tensor) -> Tensor:
        """The loss of one example under each mask, [M]."""


class Candidates(NamedTuple):
    """Sets of heads, [C, L, H]; and the mean loss at each step of the choice, if it has steps."""

    masks_CLH: Tensor
    losses: list[float]


ChooseHeads: TypeAlias = Callable[[Losses, tuple[int, int], FewShotSettings, int, Path], Candidates]


def reinforce(
    losses: Losses, shape: tuple[int, int], settings: FewShotSettings, seed: int, folder: Path
) -> Candidates:
    """Masks drawn from chances that Adam has learned by REINFORCE.

    After multimodal task vectors (arXiv 2406.15334), as Activation RM does it: each step draws one example
    and `masks` masks; what a mask does better than the others of its step is its advantage. What has been
    learned is kept in `folder` every few steps.
    """
    size = shape[0] * shape[1]
    state: dict[str, Any] = {"b": [START] * size, "m": [0.0] * size, "v": [0.0] * size, "losses": []}
    with tqdm(total=settings.steps, desc="heads", unit="step", leave=False, disable=hidden()) as bar:
        for start in range(0, settings.steps, STEPS_KEPT):
            steps = range(start, min(start + STEPS_KEPT, settings.steps))
            state = once(
                folder / f"steps-{start}.json", partial(_steps, losses, shape, settings, seed, state, steps)
            )
            bar.update(len(steps))
    chances_LH = _chances(torch.tensor(state["b"], dtype=torch.float64).view(shape))
    return Candidates(_draw(chances_LH, settings.draws, seed, settings.steps), state["losses"])


def _steps(
    losses: Losses,
    shape: tuple[int, int],
    settings: FewShotSettings,
    seed: int,
    state: dict[str, Any],
    steps: range,
) -> dict[str, Any]:
    """The state of the choice after these steps."""
    b, m, v = (torch.tensor(state[name], dtype=torch.float64).view(shape) for name in "bmv")
    told = list(state["losses"])
    for step in steps:
        number = int(np.random.default_rng([seed, step]).integers(len(losses)))
        masks_MLH = _draw(_chances(b), settings.masks, seed, step)
        losses_M = losses.of(number, masks_MLH)
        told.append(float(losses_M.mean()))
        gradient = score_gradient(advantages(losses_M), masks_MLH, _chances(b))
        m = BETAS[0] * m + (1 - BETAS[0]) * gradient
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
        unbiased = (m / (1 - BETAS[0] ** (step + 1)), v / (1 - BETAS[1] ** (step + 1)))
        b = b - settings.learning_rate * unbiased[0] / (unbiased[1].sqrt() + EPS)
    return {"b": b.flatten().tolist(), "m": m.flatten().tolist(), "v": v.flatten().tolist(), "losses": told}


def advantages(losses_M: Tensor) -> Tensor:
    """How much worse each mask is than the mean of its step, in standard deviations."""
    return (losses_M - losses_M.mean()) / (losses_M.std(correction=0) + LEAST)


def score_gradient(advantage_M: Tensor, masks_MLH: Tensor, chances_LH: Tensor) -> Tensor:
    """Gradient of the mean of advantage x log chance of the mask, by the logits of the chances, [L, H]."""
    return (advantage_M[:, None, None] * (masks_MLH.double() - chances_LH)).mean(0)


def _chances(logits_LH: Tensor) -> Tensor:
    return logits_LH.sigmoid().clamp(LEAST, 1 - LEAST)


def _draw(chances_LH: Tensor, count: int, seed: int, step: int) -> Tensor:
    drawn_MLH = np.random.default_rng([seed, step, 1]).random((count, *chances_LH.shape))
    return torch.from_numpy(drawn_MLH) < chances_LH


def greedy(
    losses: Losses, shape: tuple[int, int], settings: FewShotSettings, seed: int, folder: Path
) -> Candidates:
    """The one, two, four, ... heads that lower the loss most when each is replaced alone."""
    alone_MLH = torch.eye(shape[0] * shape[1], dtype=torch.bool).view(-1, *shape)
    masks_MLH = torch.cat([torch.zeros(1, *shape, dtype=torch.bool), alone_MLH])
    total_M = torch.zeros(len(masks_MLH), dtype=torch.float64)
    for number in tqdm(range(len(losses)), desc="heads", unit="example", leave=False, disable=hidden()):
        tried = once(folder / f"example-{number}.json", partial(_tried, losses, number, masks_MLH))
        total_M += torch.tensor(tried, dtype=torch.float64)
    effect_X = (total_M[1:] - total_M[0]) / len(losses)
    order, helpful = effect_X.argsort(stable=True), max(1, int((effect_X < 0).sum()))
    counts = sorted({min(2**power, helpful) for power in range(len(effect_X).bit_length() + 1)})
    return Candidates(torch.stack([_with(order[:count], shape) for count in counts]), [])


def _tried(losses: Losses, number: int, masks_MLH: Tensor) -> list[float]:
    found: list[float] = losses.of(number, masks_MLH).tolist()
    return found


def _with(heads_S: Tensor, shape: tuple[int, int]) -> Tensor:
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    mask[heads_S] = True
    return mask.view(shape)


CHOICES: dict[str, ChooseHeads] = {"reinforce": reinforce, "greedy": greedy}

"""Adam (Kingma and Ba 2015) on random batches, for pairs too many to pass over often."""

from __future__ import annotations

import math

import torch

from moemerge.fitting.optimisers.base import Task


def adam(task: Task) -> None:
    """Steps of learning_rate on batches of batch_size; a visit every 1 / evals_per_epoch, and at the end."""
    settings = task.settings
    v_V = task.v_V.clone().requires_grad_()
    optimiser = torch.optim.Adam([v_V], lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(task.seed)
    per_epoch = math.ceil(task.num_pairs / settings.batch_size)
    every, total = math.ceil(per_epoch / settings.evals_per_epoch), per_epoch * settings.max_epochs
    order: list[list[int]] = []
    for step in range(1, total + 1):
        # A new random order whenever all batches are used up: every pair once per epoch.
        order = order or [
            rows.tolist()
            for rows in torch.randperm(task.num_pairs, generator=generator).split(settings.batch_size)
        ]
        _, v_V.grad = task.gradient(v_V.detach(), order.pop(0))
        optimiser.step()
        with torch.no_grad():
            # Adam knows no bounds: a step beyond them is cut off.
            v_V.clamp_(task.low_V, task.high_V)
        if (step % every == 0 or step == total) and task.visit(v_V.detach().clone()):
            return

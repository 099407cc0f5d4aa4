"""CMA-ES (Hansen and Ostermeier 2001) from the library cma: no gradient, so a check on those that use one."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch

from moemerge.fitting.optimisers.base import Task

STEP = 0.5


def cma(task: Task) -> None:
    """Generations of whole passes, max_epochs of them at most; the mean of each generation is visited.

    Deterministic for task.seed; numpy's global random state is left alone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cma warns when matplotlib is not there
        from cma import CMAEvolutionStrategy
    generator = np.random.default_rng(task.seed)
    options: dict[str, Any] = {
        # NaN: cma is not to seed numpy's global state; all its draws come from `randn`.
        "seed": math.nan,
        "randn": lambda *shape: generator.standard_normal(shape),
        "bounds": [task.low_V.tolist(), task.high_V.tolist()],
        "verbose": -9,
        "maxiter": task.settings.max_epochs,
    }
    strategy = CMAEvolutionStrategy(task.v_V.tolist(), STEP, options)
    while not strategy.stop():
        population = strategy.ask()
        strategy.tell(population, [task.loss(torch.tensor(v, dtype=torch.float64)) for v in population])
        # The mean of the distribution, within the bounds: less noisy than the best of one generation.
        if task.visit(torch.tensor(strategy.result.xfavorite, dtype=torch.float64)):
            return

"""L-BFGS-B (Byrd, Lu, Nocedal and Zhu 1995) from scipy: full passes, few of them, no learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize

from moemerge.fitting.optimisers.base import Task


def lbfgs(task: Task) -> None:
    """Minimise over all pairs at once; every accepted iterate is visited, max_epochs bounds the passes."""

    def value(v_V: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        loss, gradient_V = task.gradient(torch.from_numpy(v_V.copy()))
        return loss, gradient_V.numpy()

    def visit(intermediate_result: Any) -> None:
        # A copy: scipy may write the next iterate into the same memory.
        if task.visit(torch.from_numpy(intermediate_result.x.copy())):
            raise StopIteration

    # maxfun and not maxiter: a line search may take several passes for one iterate.
    limits = Bounds(task.low_V.numpy(), task.high_V.numpy())
    options = {"maxfun": task.settings.max_epochs, "ftol": 1e-10, "gtol": 1e-8}
    start = task.v_V.numpy()
    solve: Any = minimize
    solve(value, start, jac=True, method="L-BFGS-B", bounds=limits, callback=visit, options=options)

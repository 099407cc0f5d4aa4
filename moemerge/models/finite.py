"""Whether weights are numbers: a look at whatever a merge reads or writes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moemerge.errors import CheckpointError


def magnitude(tensor: Tensor) -> float:
    """The largest magnitude in `tensor`; NaN if it holds one, 0 if it is empty."""
    low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(()), torch.zeros(()))
    return float(torch.maximum(-low, high))


def finite(tensor: Tensor, what: str) -> Tensor:
    """`tensor` itself. Raises CheckpointError, naming `what`, if it holds NaN or an infinity."""
    if not tensor.is_floating_point() or math.isfinite(magnitude(tensor)):
        return tensor
    raise CheckpointError(
        "weights are not finite",
        given=f"NaN or infinity in {what}",
        expected="finite numbers",
        fix="use an earlier checkpoint of this model; if only dtype float16 does this, choose another dtype",
    )

"""Several processes that fit together, as torchrun starts them: each takes its share of the pairs."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    """Join the other processes, if torchrun's variables name any. Only small sums are exchanged."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def share(count: int) -> list[int]:
    """This process's part of the numbers below `count`."""
    if not dist.is_initialized():
        return list(range(count))
    # Every world_size-th one: pairs of a subset lie together in a file, and may be longer than others.
    return list(range(dist.get_rank(), count, dist.get_world_size()))


def summed(values: Tensor) -> Tensor:
    """`values` (float64 on the CPU) summed over the processes: the same bits in each of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(mine: Tensor, rows: list[int], count: int) -> Tensor:
    """The values of all `count` rows, of which this process has those number `rows`."""
    # Zeros elsewhere: the sum over processes puts the parts together, and changes no bit of them.
    whole = torch.zeros(count, dtype=torch.float64)
    whole[rows] = mine
    return summed(whole)

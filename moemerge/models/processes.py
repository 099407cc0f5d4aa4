"""Several processes that do one stage together, as torchrun and accelerate launch start them.

Each has the whole model and a share of the texts. What they found is put together in all of them, so that all
go the same way; the first one writes. Ranks, devices and what they talk through are accelerate's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moemerge.artifacts.ranks import several
from moemerge.errors import OptionError


def own_device(name: str) -> torch.device:
    """Join the other processes; the device that this one is to use, where the user asks for `name`."""
    from accelerate import PartialState

    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(
            "each of several processes takes the GPU of its own number",
            given=f"device {name}",
            expected="auto, cuda or cpu",
            fix="leave device out, and choose GPUs by the environment variable CUDA_VISIBLE_DEVICES",
        )
    return PartialState(cpu=name == "cpu" or not torch.cuda.is_available()).device


def wait() -> None:
    """Go on when all processes have come here."""
    summed(torch.zeros(1))


def share(count: int) -> list[int]:
    """This process's part of the numbers below `count`."""
    if not several():
        return list(range(count))
    # Every n-th one: texts of one kind or length lie together.
    return list(range(dist.get_rank(), count, dist.get_world_size()))


def summed(values: Tensor) -> Tensor:
    """`values` summed over the processes: the same bits in each of them, on the CPU."""
    if not several():
        return values
    from accelerate import PartialState

    moved = values.to(PartialState().device, copy=True)
    dist.all_reduce(moved)
    return moved.cpu()


def gathered(mine: Tensor, rows: list[int], count: int) -> Tensor:
    """The values of all `count` rows, of which this process has those number `rows`.

    mine: [len(rows), ...], and of that form in every process.
    """
    # Zeros elsewhere: the sum over processes puts the parts together, and changes no bit of them.
    whole = mine.new_zeros((count, *mine.shape[1:]))
    whole[rows] = mine
    return summed(whole)

"""Several processes that do one stage together, as torchrun and accelerate launch start them.

Each has the whole model and a share of the texts. What they found is put together in all of them, so that all
go the same way; the first one writes. Ranks, devices and what they talk through are accelerate's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moemerge.artifacts import ranks
from moemerge.artifacts.ranks import count, several
from moemerge.artifacts.workspace import once
from moemerge.errors import OptionError

if TYPE_CHECKING:
    from transformers.distributed.configuration_utils import DistributedConfig

ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # what accelerate can be told to wrap models in


def own_device(name: str) -> torch.device:
    """Join the other processes; the device that this one is to use, where the user asks for `name`."""
    from accelerate import PartialState

    for engine in ENGINES:
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("1", "true", "yes"):
            raise OptionError(
                "accelerate cannot wrap moemerge's models",
                given=f"ACCELERATE_USE_{engine}, which accelerate launch sets by its configuration",
                expected="plain processes; train puts weights into parts by its own option sharded (FSDP2)",
                fix="set distributed_type to MULTI_GPU in that configuration, and give train --sharded",
            )
    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(
            "each of several processes takes the GPU of its own number",
            given=f"device {name}",
            expected="auto, cuda or cpu",
            fix="leave device out, and choose GPUs by the environment variable CUDA_VISIBLE_DEVICES",
        )
    return PartialState(cpu=name == "cpu" or not torch.cuda.is_available()).device


def sharding(layers: str) -> DistributedConfig:
    """How transformers is to spread a model over all processes (FSDP2), `layers` being its layers' path."""
    from transformers.distributed.configuration_utils import DistributedConfig

    return DistributedConfig(fsdp_size=count(), fsdp_plan={f"{layers}.*": "free_full_weight"})


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of each weight only: all have to run the model as often."""
    return several() and any(map(in_parts, model.parameters()))


def in_parts(weight: Tensor) -> bool:
    """Whether this process holds a part of the weight only."""
    if not several():
        return False
    from torch.distributed.tensor import DTensor  # seconds to import

    return isinstance(weight, DTensor)


def part_again(model: nn.Module) -> None:
    """Have a sharded model in parts again: after a forward pass alone its last weights are still whole."""
    if is_sharded(model):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def placed_like(weight: Tensor, values: Tensor) -> Tensor:
    """`values`, the same in every process, as `weight` lies: of a weight in parts, this process's part."""
    if not in_parts(weight):
        return values
    from torch.distributed.tensor import distribute_tensor

    parts: Any = weight
    return distribute_tensor(values.to(weight.device), parts.device_mesh, parts.placements)


def own_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight; all of it, if it is not in parts."""
    parts: Any = weight
    part: Tensor = parts.to_local() if in_parts(weight) else weight
    return part


def whole(weight: Tensor) -> Tensor:
    """A weight put together, which all processes that hold a part of it have to ask for; else as it is."""
    parts: Any = weight
    found: Tensor = parts.full_tensor() if in_parts(weight) else weight
    return found


def wait() -> None:
    """Go on when all processes have come here."""
    summed(torch.zeros(1))


def share(count: int) -> list[int]:
    """This process's part of the numbers below `count`."""
    if not several():
        return list(range(count))
    # Every n-th one: texts of one kind or length lie together.
    return list(range(dist.get_rank(), count, dist.get_world_size()))


def once_each(folder: Path, parts: int, make: Callable[[int], Any]) -> list[Any]:
    """What `make` gives for each number below `parts`, as JSON values: made once, and kept in `folder`.

    Several processes each make some, and read the others' when all are made.
    """

    def kept(number: int) -> Any:
        return once(folder / f"{number}.json", partial(make, number), alone=True)

    for number in share(parts):
        kept(number)
    wait()
    made = [kept(number) for number in range(parts)]
    wait()  # until all have read: the first one removes the folder
    return made


def steps_behind(steps: int) -> int:
    """How many steps more another process has, which those that run a model in parts all have to make."""
    every = gathered(torch.tensor([float(steps)]), [ranks.number()], ranks.count())
    return int(every.max()) - steps


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

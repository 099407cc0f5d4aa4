"""A trainer's checkpoints: the weights that train and their moments, of a sharded model in parts.

Each process writes and reads its own part; the whole is put together tensor by tensor where it is asked for.
A weight lies in parts along its first dimension, as torch.chunk cuts it: FSDP2's own way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moemerge.artifacts import ranks
from moemerge.models import processes

WHOLE_WEIGHTS = "model.safetensors"


def save_parts(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write what this process holds of the weights; whole ones into a file of the usual name."""
    sharded = any(map(processes.in_parts, weights.values()))
    parts = {name: processes.own_part(weight).contiguous() for name, weight in weights.items()}
    save_file(parts, folder / (_part("model", "safetensors") if sharded else WHOLE_WEIGHTS))


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Copy the weights of a checkpoint into the parameters of the same names, whole or sharded."""
    with torch.no_grad():
        if processes.is_sharded(model):
            for name, part in load_file(checkpoint / _part("model", "safetensors")).items():
                processes.own_part(model.get_parameter(name)).copy_(part)
            return
        for name, weight in _whole(checkpoint):
            model.get_parameter(name).copy_(weight)


def save_moments(optimizer: Any, folder: Path) -> None:
    """Write this process's part of the optimiser's state."""
    torch.save(_mapped(optimizer.state_dict(), processes.own_part), folder / _part("optimizer", "pt"))


def load_moments(optimizer: Any, folder: Path) -> None:
    """Read this process's part of the optimiser's state, and lay it as the weights lie."""
    kept = torch.load(folder / _part("optimizer", "pt"), map_location="cpu", weights_only=True)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, moments in kept["state"].items():
        for name, part in moments.items():
            if isinstance(part, Tensor) and part.ndim:
                moments[name] = _as_part(weights[number], part)
    optimizer.load_state_dict(kept)


def _as_part(weight: Any, part: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part.to(weight.device), weight.device_mesh, weight.placements, run_check=False,
        shape=weight.shape, stride=weight.stride(),
    )  # fmt: skip


def _mapped(state: Any, change: Any) -> Any:
    """The optimiser's state with every tensor changed."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: _mapped(value, change) for key, value in state.items()}
    return [_mapped(value, change) for value in state] if isinstance(state, list) else state


def _part(name: str, ending: str, number: int | None = None) -> str:
    """The file of this process's part, or of that of another number."""
    mine = ranks.number() if number is None else number
    return f"{name}-{mine + 1:05d}-of-{ranks.count():05d}.{ending}"


def _whole(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint, one at a time."""
    if (checkpoint / WHOLE_WEIGHTS).exists():
        yield from load_file(checkpoint / WHOLE_WEIGHTS).items()
        return
    parts = [
        safe_open(checkpoint / _part("model", "safetensors", number), "pt") for number in range(ranks.count())
    ]
    for name in parts[0].keys():  # noqa: SIM118 (no mapping)
        yield name, torch.cat([part.get_tensor(name) for part in parts])

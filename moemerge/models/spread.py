"""A model that is too large for one device: layers on all GPUs, then in memory, the rest read from its files.

Placing layers, and moving weights and states while the model runs, is accelerate's (its device_map).
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from moemerge.artifacts import ranks
from moemerge.artifacts.disk import in_words
from moemerge.errors import OptionError
from moemerge.models.device import memory_at_hand
from moemerge.options.placement import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Limits: TypeAlias = Mapping[int | str, int]  # bytes of weights on a GPU, by its number, and on "cpu"
SHARE = 0.9  # of the memory that is free: activations need the rest
NAMES = {"cpu": "in memory", "disk": "in its files"}


def room_for_weights(placement: Placement, device: torch.device) -> Limits | None:
    """How many bytes of weights each device may have, the GPUs first; None if `device` takes the whole model.

    `device` is the one that was asked for: a GPU without a number stands for all. OptionError in one of
    several processes, and for limits of devices that are not used.
    """
    if placement.device_map == "one":
        return None
    if ranks.several():
        raise OptionError(
            "device_map auto is for one process",
            given=f"{ranks.count()} processes, each of which would spread the model over all devices",
            expected="one process; several share the weights by sharded",
            fix="start it without torchrun, or give sharded in place of device_map",
        )
    places: list[int | str] = [*_gpus(device), "cpu"]
    asked = {int(name) if name != "cpu" else name: limit for name, limit in placement.max_memory.items()}
    if unused := asked.keys() - set(places):
        raise OptionError(
            "max_memory names a device that is not used",
            given=f"{unused.pop()}, device {device}",
            expected=" or ".join(map(str, places)),
            fix="correct max_memory, or device",
        )
    return {name: int(asked[name] * 1e9) if name in asked else _free(name) for name in places}


def _gpus(device: torch.device) -> list[int]:
    if device.type != "cuda":
        return []
    return [*range(torch.cuda.device_count())] if device.index is None else [device.index]


def _free(place: int | str) -> int:
    return int(
        SHARE * memory_at_hand(torch.device("cuda", place) if isinstance(place, int) else torch.device("cpu"))
    )


@contextmanager
def spreading(limits: Limits) -> Iterator[dict[str, Any]]:
    """The arguments of from_pretrained that spread a model over devices; while open, accelerate is silent.

    Weights that transformers changes as it reads them, and that have no room, are written to a folder of
    their own among the temporary files, which goes with the model (`settle`).
    """
    logger = logging.getLogger("accelerate.big_modeling")
    level, folder = logger.level, tempfile.mkdtemp(prefix="moemerge-")
    logger.setLevel(logging.ERROR)
    try:
        yield {"device_map": "auto", "max_memory": dict(limits), "offload_folder": folder}
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        logger.setLevel(level)


def settle(model: PreTrainedModel, folder: str) -> None:
    """Have `folder` removed with the model, and tell where its weights lie."""
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    if not places:
        return  # one device has room for all of it
    sizes: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        place = next(at for path, at in places.items() if not path or f"{name}.".startswith(f"{path}."))
        sizes[NAMES.get(place, f"on GPU {place}")] += weight.nbytes
    shares = ", ".join(f"{in_words(size)} {place}" for place, size in sizes.items())
    log.info("%s: %s", model.name_or_path, shares)

"""Threads, devices and dtypes: the few process-wide choices, made in one place."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moemerge.artifacts.ranks import several
from moemerge.errors import OptionError
from moemerge.models.processes import own_device
from moemerge.options.base import Run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def use_device(options: Run) -> torch.device:
    """Set the CPU threads that `options` ask for and return its device; OptionError if it is not there.

    Several processes that do a stage together join here, and each takes the GPU of its number.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return own_device(options.device) if several() else pick_device(options.device)


def use_training_device(options: Run) -> torch.device:
    """As `use_device`; OptionError for any but the first GPU, because TRL's trainers take that.

    Several processes take the GPU of their number.
    """
    device = use_device(options)
    if device.type == "cuda" and device.index and not several():
        raise OptionError(
            "training uses the first GPU that it sees",
            given=options.device,
            expected="auto, cpu, cuda or cuda:0",
            fix=f"set the environment variable CUDA_VISIBLE_DEVICES={device.index} and device to cuda",
        )
    return device


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for torch: more of them only wait for each other, where memory is what takes time."""
    with torch_threads(1):
        yield


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many CPU threads for torch while it is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_memory() -> None:
    """Give back what models that are not used any more have held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pick_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" takes a GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            "device cannot be used",
            given=repr(name),
            expected="auto, cpu, cuda or cuda:N of a GPU that this torch sees",
            fix=f"choose another device ({str(error).splitlines()[0]})",
        ) from error


def memory_at_hand(device: torch.device) -> int:
    """Bytes that are free for models and batches: on a GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return next(1024 * int(line.split()[1]) for line in text.splitlines() if "MemAvailable" in line)
    except (OSError, ValueError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

"""Threads, devices and dtypes: the few process-wide choices, made in one place."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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

"""What a result was made with: versions of packages, and the machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from moemerge.registry import USED

PACKAGES = ("moemerge", "torch", "transformers", "trl", "mergekit", "peft", "safetensors", "tokenizers")


def versions(also: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python and of the packages that results depend on: those that added what is used, too."""
    by_package = {"python": platform.python_version()}
    for package in dict.fromkeys((*PACKAGES, *sorted(USED), *also)):
        if version := _version(package):
            by_package[package] = version
    return by_package


@cache
def _version(package: str) -> str | None:
    """Of what is installed, if it is: each look reads a file, and every stage asks for a dozen."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def hardware() -> dict[str, Any]:
    """Processor, system, memory in bytes, threads of torch and the GPUs that it uses, if it was imported."""
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()}",
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_initialized():
            devices = range(torch.cuda.device_count())
            facts["gpus"] = [torch.cuda.get_device_name(device) for device in devices]
    return facts


def _processor() -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory() -> int | None:
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def package_version() -> str:
    """The installed version of moemerge, or "unknown" when it runs from a source tree."""
    try:
        return metadata.version("moemerge")
    except metadata.PackageNotFoundError:
        return "unknown"

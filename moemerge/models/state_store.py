"""Tensors that are kept for later: in memory up to a bound, then in a file that goes with the process."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moemerge.artifacts.disk import free_space, in_words

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """A tensor's bytes, in memory or from a place in the file on."""

    shape: torch.Size
    dtype: torch.dtype
    data: NDArray[np.uint8] | None
    offset: int = 0


class StateStore:
    """Tensors by key: up to `memory` bytes in memory, the others in a file in `folder`.

    The file has no name there, so that it goes with the process, however that ends. It takes half of the free
    disk at most. What finds no place is not kept: nobody may rely on getting anything back. What comes back
    has the very bits that were put in.
    """

    def __init__(self, folder: Path, memory: float) -> None:
        self._folder, self._memory = folder, memory
        self._kept: dict[bytes, _Kept] = {}
        self._in_memory = self._in_file = 0
        self._file: FileIO | None = None
        self._full = False

    def __len__(self) -> int:
        return len(self._kept)

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, key: bytes, tensor: Tensor) -> None:
        """Keep a copy of `tensor`, which is contiguous, if there is room."""
        size = tensor.numel() * tensor.element_size()
        if key in self._kept:
            return
        data = tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy()
        if self._in_memory + size <= self._memory:
            self._kept[key] = _Kept(tensor.shape, tensor.dtype, data.copy())
            self._in_memory += size
        elif self._append(data):
            self._kept[key] = _Kept(tensor.shape, tensor.dtype, None, self._in_file)
            self._in_file += size

    def get(self, key: bytes, device: torch.device) -> Tensor | None:
        """A new copy of what was put in under `key`, on `device`; None if nothing is kept."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        # Torch's own memory, whose alignment products of matrices may depend on in the last bits.
        copy = torch.empty(kept.shape, dtype=kept.dtype)
        view: NDArray[np.uint8] = copy.view(-1).view(torch.uint8).numpy()
        if kept.data is not None:
            view[:] = kept.data
        else:
            self._read(kept.offset, view)
        return copy.to(device)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._in_memory = self._in_file = 0
        self._full = False
        if self._file is not None:
            self._file.truncate(0)

    def close(self) -> None:
        """Forget everything, and let the file go."""
        self._kept.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, data: NDArray[np.uint8]) -> bool:
        """Write to the end of the file; False if that cannot be, for good."""
        # The other half is left to whoever else writes there, the stage's own output first of all.
        self._full = self._full or self._in_file + 2 * len(data) > free_space(self._folder)
        if self._full:
            return False
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
                log.info("states of lower layers no longer fit into %s of memory: a file takes the others",
                         in_words(int(self._memory)))  # fmt: skip
            self._file.seek(self._in_file)
            rest: Any = data.data
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:  # without the cache all is computed again: no reason to end
            log.warning("states of lower layers cannot be kept in a file in %s: %s", self._folder, error)
            self._full = True
        return not self._full

    def _read(self, offset: int, view: NDArray[np.uint8]) -> None:
        assert self._file is not None
        self._file.seek(offset)
        rest: Any = view.data
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise OSError(f"the file with states of lower layers in {self._folder} was cut short")
            rest = rest[count:]

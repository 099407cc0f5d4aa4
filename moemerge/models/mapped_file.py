"""Tensors of a safetensors file where they lie, mapped to be read only.

safetensors maps a file for torch as private and writable. Nothing is ever written there, yet limits on memory
(ulimit -d, strict overcommit) count such a mapping whole, so a fit that kept its views was refused a model
larger than its limit. One that can only be read costs nothing.
"""

from __future__ import annotations

import json
import mmap
import warnings
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MappedFile:
    """A whole safetensors file, which safetensors has opened before and so found sound. Keeps a file open."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as handle:
            self._start = 8 + int.from_bytes(handle.read(8), "little")
            self._header = json.loads(handle.read(self._start - 8))
            self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the tensor `name`, which is of one of DTYPES; whoever writes to it ends the process."""
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        if begin == end:
            return torch.empty(entry["shape"], dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            numbers_X = torch.frombuffer(
                self._bytes, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=self._start + begin
            )
        return numbers_X.view(entry["shape"])

"""Safetensors model folders: read tensor by tensor, written shard by shard.

By hand, though mergekit and huggingface_hub have lazy readers and sharded writers: slices of stacked experts,
guards against hostile headers and indexes, and the read-back of what was written are not there.

Letters: N routed experts.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moemerge.artifacts.disk import flush_and_forget, link_or_copy, usual_mode
from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.read_back import require_as_meant, tensor_digest
from moemerge.errors import CheckpointError, few
from moemerge.models.mapped_file import DTYPES, MappedFile

if TYPE_CHECKING:
    from moemerge.models.families.base import ExpertTensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# An open file is mapped whole, which counts against a limit on memory (ulimit -d) though none is used.
OPEN_FILES = 2
MAX_HEADER = 25_000_000
WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".gguf", ".h5")
NOT_COPIED = {
    "config.json",
    "manifest.json",
    "README.md",
    "training_args.bin",
    "moemerge_shim.py",
    "moemerge_layout.json",
}
MORE_TEMPLATES = "additional_chat_templates"


# What bitsandbytes, GPTQ, AWQ, FP8 and compressed-tensors store in place of a weight, or beside it.
PACKED = (
    ".qweight", ".qzeros", ".g_idx", ".SCB", ".absmax", ".quant_map",
    ".weight_packed", ".weight_scale", ".weight_scale_inv",
)  # fmt: skip


class Checkpoint:
    """A local folder with model.safetensors or its shards; tensors are read when asked for.

    Only the tensors: what is to be known of a model besides, and whether its folder is its own, asks
    ModelFolder.

    Raises CheckpointError when weights are missing, damaged, outside the folder, or only there as pickle.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = self._weight_files()
        self._open: dict[str, Any] = {}
        self._mapped: dict[str, MappedFile] = {}

    @property
    def names(self) -> list[str]:
        """All tensor names, in the order of the shards."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`, from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """dtype of the tensor `name`, from the header. CheckpointError for kinds that no merge can use."""
        kind = self._slice(name).get_dtype()
        if kind not in DTYPES:
            raise self._quantised(f"{name} in {kind}", ", ".join(DTYPES))
        return DTYPES[kind]

    @property
    def quantised(self) -> str | None:
        """The first tensor that a quantiser wrote: by its name, or a weight of whole numbers or of 8 bits."""
        floats = {kind for kind, dtype in DTYPES.items() if dtype.is_floating_point}
        kinds = ((name, self._slice(name).get_dtype()) for name in self.names)
        return next(
            (n for n, k in kinds if n.endswith(PACKED) or (n.endswith(".weight") and k not in floats)), None
        )

    def refuse_quantised(self, names: Iterable[str]) -> None:
        """Raise CheckpointError for quantised weights, or if one of these tensors is not floating point."""
        for name in names:
            if not self.dtype(name).is_floating_point:
                raise self._quantised(f"{name} in {self.dtype(name)}", "floating point")
        if self.quantised is not None:
            raise self._quantised(self.quantised, "weights in floating point")

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors together, from the headers."""
        return sum(math.prod(self.shape(name)) for name in self.names)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU, as stored."""
        return self._handle(name).get_tensor(name)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, one at a time."""
        return ((name, self.tensor(name)) for name in self.names)

    def differences(
        self,
        wanted: Mapping[str, tuple[int, ...]],
        may_lack: Set[str] = frozenset(),
        may_add: Callable[[str], bool] = lambda name: False,
    ) -> dict[str, list[str]]:
        """Names that are missing, left over or misshapen against `wanted` shapes, by kind; no empty lists.

        Those in `may_lack` may be missing, those for which `may_add` holds may be there besides.
        """
        held = set(self.names)
        by_kind = {
            "missing": sorted(wanted.keys() - held - may_lack),
            "left over": sorted(name for name in held - wanted.keys() if not may_add(name)),
            "misshapen": sorted(name for name in held & wanted.keys() if self.shape(name) != wanted[name]),
        }
        return {kind: names for kind, names in by_kind.items() if names}

    def expert(self, tensor: ExpertTensor, index: int) -> torch.Tensor:
        """Routed expert number `index`'s copy of a dense MLP tensor, in the dense layout: a view."""
        rows: torch.Tensor = self._slice(tensor.stacked)[index, tensor.rows]
        return rows.T if tensor.transposed else rows

    def mapped(self, name: str) -> torch.Tensor:
        """The tensor `name` as stored, a view that can only be read and costs no memory while it is kept."""
        file = self._files[name]
        if file not in self._mapped:
            self._open.pop(file, None)  # whose mapping does cost
            self._mapped[file] = MappedFile(self.folder / file)
        return self._mapped[file].tensor(name)

    def release(self) -> None:
        """Let go of open files; they are opened again when asked for."""
        self._open.clear()
        self._mapped.clear()

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)

    def _handle(self, name: str) -> Any:
        if name not in self._files:
            raise self._fault("a tensor is missing", name, "a checkpoint that holds it")
        file = self._files[name]
        handle = self._open.pop(file, None)
        while handle is None and len(self._open) >= OPEN_FILES:
            self._open.pop(next(iter(self._open)))
        self._open[file] = handle or _open_file(self.folder / file)
        return self._open[file]

    def _weight_files(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            files = self._indexed_files()
            self._refuse_leftovers(set(files.values()))
            return files
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(_open_file(self.folder / SINGLE).keys(), SINGLE)
        raise self._no_safetensors()

    def _refuse_leftovers(self, shards: set[str]) -> None:
        """Tools disagree on which is read first, so the weights of one model would pass for the other's."""
        if SINGLE not in shards and (self.folder / SINGLE).exists():
            raise CheckpointError(
                f"{self.folder} holds two models' weights",
                given=f"{SINGLE} and {INDEX} with {len(shards)} other file(s)",
                expected="one or the other",
                fix="remove what is left of the older model",
            )

    def _no_safetensors(self) -> CheckpointError:
        other = sorted(path.name for path in self.folder.iterdir() if path.name.endswith(WEIGHTS))
        pickled = [name for name in other if name.startswith("pytorch_model") and name.endswith(".bin")]
        if not pickled:
            return self._fault("no safetensors weights", few(other) or "no weights", f"{SINGLE} or {INDEX}")
        return CheckpointError(
            f"{self.folder} holds pickled weights",
            given=few(pickled),
            expected="safetensors: pickle files can run code when they are opened",
            fix="if you trust it, load it with transformers and save_pretrained it to another folder",
        )

    def _indexed_files(self) -> dict[str, str]:
        try:
            index = read_object(self.folder / INDEX)
            files = {str(name): str(file) for name, file in index["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._fault("the index of shards cannot be read", str(error), "a weight_map") from error
        shards = set(files.values())
        listed = {path.name for path in self.folder.iterdir() if path.is_file()}
        for file in shards:
            if file not in listed:
                raise self._fault("a shard named in the index is not there", file, "a file in this folder")
        held = {(name, file) for file in shards for name in _open_file(self.folder / file).keys()}
        if held != set(files.items()):
            names = sorted(name for name, _ in held ^ set(files.items()))
            raise self._fault("index and shards disagree", ", ".join(names[:5]), "the same tensors in both")
        return files

    def _quantised(self, given: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: a tensor is quantised",
            given=given,
            expected=expected,
            fix="give the model as it was before, or load it with transformers, dequantize() and "
            "save_pretrained() it",
        )

    def _fault(self, what: str, given: str, expected: str) -> CheckpointError:
        fix = "copy or download the model again, as safetensors"
        return CheckpointError(f"{self.folder}: {what}", given=given, expected=expected, fix=fix)


def _open_file(path: Path) -> Any:
    try:
        _refuse_long_header(path)
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read",
            given=str(error),
            expected="a whole safetensors file",
            fix="copy or download it again",
        ) from error
    except RuntimeError as error:  # torch's, which maps the file: "...: Too many open files (24)"
        number = re.search(r"\((\d+)\)\s*$", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


def _refuse_long_header(path: Path) -> None:
    """ValueError if the names of the tensors alone would fill the memory."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes, more than {MAX_HEADER}")


def write_checkpoint(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_size: int) -> None:
    """Write `tensors` as safetensors shards of at most `shard_size` bytes, holding one shard at a time.

    A finished shard goes to the disk while the next one is made. Tensors may be views, also of each other.
    In the end all are read back from the disk; CheckpointError unless names, shapes, dtypes and bits are
    those that were meant.
    """
    paths: list[Path] = []
    meant: dict[str, str] = {}
    with ThreadPoolExecutor(1) as disk, ThreadPoolExecutor() as pool:
        flushed = []
        for shard in _shards(tensors, shard_size):
            paths.append(folder / f"model-{len(paths) + 1}.safetensors")
            digests = pool.map(tensor_digest, shard.values())  # hashing leaves the interpreter free
            save_file(shard, paths[-1], metadata={"format": "pt"})
            paths[-1].chmod(usual_mode(folder))
            flushed.append(disk.submit(flush_and_forget, paths[-1]))
            meant |= zip(shard, digests, strict=True)
            shard.clear()
        for flush in flushed:
            flush.result()  # raises what went wrong on the disk's thread
    if len(paths) == 1:
        paths[0].rename(folder / SINGLE)
    elif paths:
        _number(folder, paths, Path.rename)
    if paths:
        require_as_meant(folder, meant, Checkpoint(folder).tensors())


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], shard_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """`tensors` in groups of at most `shard_size` bytes or one tensor. Whoever takes a group clears it."""
    shard: dict[str, torch.Tensor] = {}
    size, storages = 0, set[int]()
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_size:
            yield shard
            shard, size, storages = {}, 0, set()
        own = tensor.contiguous()
        # safetensors refuses tensors that share memory, and views of one storage may come in one shard.
        if own.untyped_storage().data_ptr() in storages:
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        shard[name] = own
        size += tensor.nbytes
    if shard:
        yield shard


def link_checkpoint(folder: Path, parts: Sequence[Path]) -> None:
    """Make `folder` one checkpoint of the tensors of all `parts`, folders that write_checkpoint wrote.

    Their files are hard-linked, or copied where the file system cannot; an index names them all.
    """
    _number(folder, [path for part in parts for path in sorted(part.glob("*.safetensors"))], link_or_copy)


def _number(folder: Path, files: Sequence[Path], put: Callable[[Path, Path], Any]) -> None:
    """Have `put` make `files` the shards of one checkpoint in `folder`, and write its index."""
    weight_map: dict[str, str] = {}
    size = 0
    for number, path in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(_open_file(path).keys(), name)
        size += _data_size(path)
        put(path, folder / name)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _data_size(path: Path) -> int:
    """Bytes of tensors in a safetensors file: all but the header and the eight bytes of its length."""
    with path.open("rb") as handle:
        return path.stat().st_size - 8 - int.from_bytes(handle.read(8), "little")


def copy_side_files(source: Path, target: Path, replace: bool = True) -> None:
    """Copy what is neither weights, config, card nor manifest: tokenizer, chat templates, licence, ...

    Without `replace`, what `target` has already stays.
    """
    for path in sorted([*source.iterdir(), *source.glob(f"{MORE_TEMPLATES}/*.jinja")]):
        skip = path.name in NOT_COPIED or path.name.endswith(WEIGHTS) or path.name.startswith(".")
        copy = target / path.relative_to(source)
        if path.is_file() and not skip and (replace or not copy.exists()):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)

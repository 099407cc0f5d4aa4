"""Whether safetensors files and their indices are whole: headers are read, tensors are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moemerge.artifacts.json_file import read_object
from moemerge.errors import first_line

WEIGHTS, INDEX_END = ".safetensors", ".safetensors.index.json"
SHOWN = 3


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in a folder: the file, what it is, what should be there, what is."""

    file: str
    what: str
    recorded: str
    found: str


def weight_faults(folder: Path, names: list[str]) -> Iterator[Fault]:
    """Faults of the safetensors files and indices among `names`, files in `folder`.

    safetensors itself checks that a header parses and that its tensors fill the file without gap or overlap.
    """
    for name in names:
        if name.endswith(WEIGHTS):
            yield from _header_faults(folder / name, name)
        elif name.endswith(INDEX_END):
            yield from _index_faults(folder / name, name)


def _header_faults(path: Path, name: str) -> Iterator[Fault]:
    try:
        tensor_names(path)
    except (SafetensorError, OSError) as error:
        yield Fault(name, "cannot be read", "a whole safetensors file", first_line(error))


def tensor_names(path: Path) -> set[str]:
    """Names in the header of a safetensors file. Raises SafetensorError or OSError."""
    with safe_open(str(path), framework="np") as opened:  # type: ignore[no-untyped-call]
        return set(opened.keys())


def _index_faults(path: Path, name: str) -> Iterator[Fault]:
    try:
        weight_map = read_object(path)["weight_map"]
        files = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield Fault(name, "cannot be read", "an index with a weight_map", first_line(error))
        return
    for file in sorted(set(files.values())):
        wanted = {tensor for tensor in files if files[tensor] == file}
        yield from _shard_faults(path.parent, file, wanted, name)


def _shard_faults(folder: Path, file: str, wanted: set[str], index: str) -> Iterator[Fault]:
    if file not in {path.name for path in folder.iterdir() if path.is_file()}:
        yield Fault(index, "names a file that is not there", "a file beside the index", file)
        return
    try:
        held = tensor_names(folder / file)
    except (SafetensorError, OSError):
        return  # a fault of the shard, which is reported under its own name
    if held != wanted:
        differing = ", ".join(sorted(held ^ wanted)[:SHOWN])
        yield Fault(index, "disagrees with its shards", f"the tensors of {file}", f"not in both: {differing}")


def order_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors header: the library writes them in an order that is drawn anew."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])

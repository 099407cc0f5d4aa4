"""Broken and hostile files, made in code, for test_hostile.py and the fuzzer."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_dense

PAIR = {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"}
CANDIDATES = {"prompt": "w1", "candidates": [{"text": "w3", "score": 1.0}, {"text": "w4", "score": 0.0}]}
RECIPE = "output: run\nmodel: dense\ndata: {train: pairs.jsonl, test_share: 0.1}\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


_SEEN: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if (
        _SEEN is not None
        and event in ("open", "os.listdir", "os.scandir")
        and isinstance(arguments[0], str | bytes)
    ):
        _SEEN.append(os.path.realpath(os.fsdecode(arguments[0])))


def opened_by(work: Callable[[], object]) -> list[str]:
    """The real paths of all files and folders that Python opens or lists in `work`, by its audit events."""
    global _SEEN
    if _note not in _HOOKED:
        sys.addaudithook(_note)
        _HOOKED.append(_note)
    _SEEN = []
    try:
        work()
        return _SEEN
    finally:
        _SEEN = None


_HOOKED: list[Any] = []


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """`rows` as JSON lines; bytes and texts are written as they are."""
    lines = [row if isinstance(row, bytes) else _line(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def _line(row: Any) -> str:
    return row if isinstance(row, str) else json.dumps(row)


def pairs(count: int) -> list[dict[str, str]]:
    """`count` good pairs, with prompts that differ."""
    words = [f"w{5 + i % 50}" for i in range(count)]
    return [
        {"prompt": f"{w} w{i % 40}", "chosen": f"{w} w1", "rejected": f"{w} w2"} for i, w in enumerate(words)
    ]


def raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header (bytes as they are), perhaps with a false length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def copy_model(source: Path, target: Path) -> Path:
    """A copy of a model folder that may be broken."""
    shutil.copytree(source, target)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file; None takes a key out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a model in one file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path, **named: str) -> dict[str, str]:
    """Split the one file of a model in two, with an index; `named` are false entries of its weight_map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {name: f"model-{1 + (i % 2):05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file(
            {n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"}
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files | named}))
    return files


def bomb(path: Path, block: bytes, blocks: int) -> Path:
    """A small gzip'd file that unpacks to `blocks` times `block`."""
    with gzip.open(path, "wb", compresslevel=1) as handle:
        for _ in range(blocks):
            handle.write(block)
    return path


def deep(depth: int, left: str = "[", right: str = "]") -> str:
    """Brackets in brackets."""
    return left * depth + right * depth


def dense_and_pairs(folder: Path) -> Path:
    """`folder`, with a model in dense and rows in pairs.jsonl."""
    save_dense(folder / "dense")
    jsonl(folder / "pairs.jsonl", pairs(5))
    return folder

"""What targets of the fuzzer are made of: broken bytes, broken JSON, and folders with one broken file."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AWKWARD = [
    b"", b"\0", b"\xff", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b"\n", b"-",
    b"&a ", b"*a", b"<<: ", b"!!", b"%", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0",
    b"9" * 5000, b"18446744073709551616", b"2147483648", b"1" + b"0" * 400, b"../", b"/etc/passwd",
    b"\\ud800", b"\\u0000",
    b"a" * 300, b"[" * 2000, b"{\"a\":" * 2000,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "x", "\0", "../x",
    "é" * 200, [], {}, [[]], {"": 0}, [1], ["a"], {"a": 1}, "layers.0", "F32", "torch", 1e308, 2, 3, "\ud800",
    "/dev/zero", ".",
]  # fmt: skip


class Dice(random.Random):
    """What all draws of one input come from; calm dice break nothing."""

    calm = False


Make = Callable[[Path, Dice], None]


@dataclass(frozen=True)
class Target:
    """Something that reads: `make` writes one broken input into an empty folder, `read` reads it.

    turns: how many inputs it gets in a round of all targets, fewer where one takes long.
    """

    make: Make
    read: Callable[[Path], object]
    turns: int = 8


def mutated(data: bytes, draw: Dice) -> bytes:
    """`data` after one to four changes."""
    for _ in range(0 if draw.calm else draw.randint(1, 4)):
        start = draw.randint(0, len(data))
        stop = min(len(data), start + draw.choice([0, 1, 1, 2, 4, 16, 200]))
        piece = data[start:stop]
        change = draw.choice(
            [
                draw.choice(AWKWARD),
                piece * draw.randint(2, 5),
                piece[::-1],
                bytes(byte ^ (1 << draw.randint(0, 7)) for byte in piece),
                data[: draw.randint(0, min(len(data), 200))],
                b"",
            ]
        )
        data = data[:start] + change + data[stop:]
        if draw.random() < 0.1:
            data = data[: draw.randint(0, len(data))]
    return data[:2_000_000]


def changed(value: Any, draw: Dice, values: Sequence[Any] = VALUES) -> Any:
    """A JSON value with one to three parts replaced (by one of `values`), removed, renamed or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(0 if draw.calm else draw.randint(1, 3)):
        value = _changed_once(value, draw, values)
    return value


def _changed_once(value: Any, draw: Dice, values: Sequence[Any]) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.95:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.7:
            return {**value, key: _changed_once(value[key], draw, values)}
        rest = {name: part for name, part in value.items() if name != key}
        return rest if kind < 0.85 else {**rest, str(draw.choice(values)): value[key]}
    if isinstance(value, list) and value and draw.random() < 0.8:
        number = draw.randrange(len(value))
        changes = [[], [_changed_once(value[number], draw, values)], [value[number]] * 2]
        return [*value[:number], *draw.choice(changes), *value[number + 1 :]]
    return draw.choice(_like(value, values) if draw.random() < 0.6 else values)


def _like(value: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Values of the same type, which get past a first look at types."""
    if isinstance(value, bool):
        return [not value]
    near = [value + 1, value - 1, 2 * value, -value] if isinstance(value, int | float) else []
    return [*near, *(other for other in values if type(other) is type(value))] or values


# --- makers


def text(file: str, *seeds: str) -> Make:
    """A file with the broken bytes of one of `seeds`."""

    def make(folder: Path, draw: Dice) -> None:
        data = mutated(draw.choice(seeds).encode(), draw)
        (folder / file).write_bytes(gzip.compress(data, mtime=0) if file.endswith(".gz") else data)

    return make


def rows(file: str, *seeds: Any) -> Make:
    """JSON lines of broken values, half of them with broken bytes too."""

    def make(folder: Path, draw: Dice) -> None:
        lines = "".join(json.dumps(changed(draw.choice(seeds), draw)) + "\n" for _ in range(3)).encode()
        (folder / file).write_bytes(mutated(lines, draw) if draw.random() < 0.5 else lines)

    return make


def spoil_json(path: Path, draw: Dice, values: Sequence[Any] = VALUES, bytes_too: float = 0.3) -> None:
    """Break the JSON file `path`, which may be a link: its values, or with this chance its bytes."""
    data = path.read_bytes()
    path.unlink()
    if draw.random() < bytes_too:
        path.write_bytes(mutated(data, draw))
    else:
        path.write_bytes(json.dumps(changed(json.loads(data), draw, values)).encode())


def linked(source: Path, target: Path) -> Path:
    """The folder `source` again, its files hard links: who changes one must put another in its place."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def damage(path: Path, draw: Dice) -> None:
    """A safetensors file with broken bytes, or with a whole header that says something else."""
    data = path.read_bytes()
    path.unlink()
    if draw.random() < 0.4:
        path.write_bytes(mutated(data, draw))
        return
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    whole = json.dumps(changed(header, draw)).encode()
    told = len(whole) if draw.random() < 0.9 else draw.choice([0, 2**62, len(whole) + 1, 10**8])
    path.write_bytes(struct.pack("<Q", told) + whole + data[8 + length :])

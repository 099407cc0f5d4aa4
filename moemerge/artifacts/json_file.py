"""JSON files: written to be read by people, and read within bounds. Imports nothing heavy."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

MAX_BYTES = 100_000_000
MAX_VALUES = 4_000_000  # each takes up to 250 bytes of memory, and may take three in the file


def read_object(
    path: Path, most: int = MAX_BYTES, once: bool = False, values: int = MAX_VALUES
) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises OSError if it cannot be read, ValueError if it is no plain file, has more than `most` bytes or
    `values` (or commas in texts), is not UTF-8, is nested too deep or holds anything but one object; with
    `once` also if an object in it has a key twice, of which another program may take the other value.
    """
    value = _read(path, most, once, values)
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, not an object")
    return value


def read_list(path: Path) -> list[Any]:
    """The JSON list in the file `path`. Raises as read_object."""
    value = _read(path, MAX_BYTES, False, MAX_VALUES)
    if not isinstance(value, list):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, not a list")
    return value


def _read(path: Path, most: int, once: bool, values: int) -> Any:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is no file")
    if status.st_size > most:
        raise ValueError(f"{path.name} has {status.st_size} bytes, more than {most}")
    try:
        text = path.read_text(encoding="utf-8")
        if text.count(",") > values:
            raise ValueError(f"{path.name} holds more than {values} values")
        return json.loads(text, object_pairs_hook=_once if once else None)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deep") from None


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(fields)
    if len(values) < len(fields):
        counts = Counter(name for name, _ in fields)
        raise ValueError(f"key {counts.most_common(1)[0][0][:100]!r} is given twice")
    return values


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, keys in given order, numbers exact."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")

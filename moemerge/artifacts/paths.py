"""Inputs that are not on this disk: whether they can be names on the hub, and what has a near name here."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def reads_like_path(source: str) -> bool:
    """Whether `source` can only be a path: it has the form of one, or more slashes than a name on the hub."""
    return (
        source.startswith(("/", "./", "../", "~")) or source.endswith(DATA_SUFFIXES) or source.count("/") > 1
    )


def near_path(source: str | Path, folders_only: bool = False) -> str:
    """Advice that begins a fix: the path beside `source` with the nearest name; empty if there is none."""
    path = Path(source)
    beside: list[str] = []
    with suppress(OSError):
        beside = [other.name for other in path.parent.iterdir() if other.is_dir() or not folders_only]
    near = difflib.get_close_matches(path.name, sorted(beside), n=1)
    return f"did you mean {str(path.with_name(near[0]))!r}? Else " if near else ""

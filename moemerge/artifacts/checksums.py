"""Checksums of files and folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
BY_TIME, BY_READING = "same size and time of change as in its own manifest", "read in full"
THREADS = 4
SMALL = 64_000_000  # bytes


def holds_more(path: Path, most: int) -> bool:
    """Whether more than `most` files and folders lie below `path`; a whole disk is not listed to find out."""
    return next(islice(path.rglob("*"), most, None), None) is not None


def fingerprint(path: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """sha256 over all files at `path` (a file or folder, without manifests and hidden files).

    A file whose size and mtime equal those in `known` is taken to have the checksum recorded there, unless
    all files together are small: reading them takes no time, and a tool may set times back.
    """
    paths = artifact_files(path)
    small = sum(file.stat().st_size for file in paths.values()) <= SMALL
    if small:
        known = None
    with ThreadPoolExecutor(THREADS) as pool:  # hashing leaves the interpreter free
        each = map if small else pool.map  # starting threads takes longer than reading what is small
        records = each(lambda name: _file_record(paths[name], (known or {}).get(name)), paths)
        files = dict(zip(paths, records, strict=True))
    digest = hashlib.sha256("".join(f"{n}\0{r['sha256']}\n" for n, r in files.items()).encode())
    return {"path": os.path.abspath(path), "sha256": digest.hexdigest(), "files": files}


def artifact_files(path: Path) -> dict[str, Path]:
    """The files at `path` that count, by name: a file, or those in a folder but manifests and hidden ones."""
    if not path.is_dir():
        return {path.name: path}
    named = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}
    return {n: p for n, p in named.items() if n != MANIFEST and not is_hidden(n)}


def added(folder: Path, recorded: Iterable[str]) -> dict[str, Path]:
    """What lies in `folder` besides the files `recorded`, by name: files, links and pipes, hidden or not."""
    entries = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    known = {MANIFEST, *recorded}
    return {name: path for path in entries if (name := str(path.relative_to(folder))) not in known}


def is_hidden(name: str) -> bool:
    """Whether a file in an output is one of those that checksums leave out."""
    return any(part.startswith(".") for part in Path(name).parts)


def _file_record(path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """Size, time of change, sha256 of a file, and whether it was read for that or trusted to be `known`."""
    status = path.stat()
    record = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if known and all(known[k] == record[k] for k in record):
        return {**record, "sha256": known["sha256"], "checked": BY_TIME}
    return {**record, "sha256": file_digest(path), "checked": BY_READING}


def sums(files: dict[str, Any]) -> dict[str, str]:
    """The sha256 of each file, by name."""
    return {name: record["sha256"] for name, record in files.items()}


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

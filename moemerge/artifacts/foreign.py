"""Whether what was given holds only what is its own. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moemerge.errors import ArtifactError


def refuse_foreign(source: Path) -> None:
    """Raise ArtifactError if `source` or something in it is neither file nor folder, or links out of it.

    Whoever made a folder could have any file of this machine read, and published, by such a link. In the
    Hugging Face cache, where files are links to the blobs of their repository, these are not outside.
    `source` itself may be a link: it was given by name.
    """
    homes = list(_homes(source.resolve()))
    for path in [source, *(source.rglob("*") if source.is_dir() else ())]:
        target = path.resolve()
        leaves = path.is_symlink() and path != source and not any(map(target.is_relative_to, homes))
        strange = target.exists() and not (target.is_file() or target.is_dir())
        if leaves or strange:
            raise ArtifactError(
                f"{source} holds what is not its own" if path != source else f"{source} is no file",
                given=f"{path.name}: {'a link out of the folder' if leaves else 'neither file nor folder'}",
                expected="files and folders, and links to such in the same folder",
                fix="put a copy of the file in its place, or remove it",
            )


def refuse_paths(values: Any, home: Path, file: str) -> None:
    """Raise ArtifactError if a text in `values`, those of the JSON `file` in `home`, names a file elsewhere.

    Who takes such values for arguments, as transformers does with those of tokenizers, would read that file,
    and write what it holds into what it saves.
    """
    queue, inside = [values], home.resolve()
    while queue:
        value = queue.pop()
        if isinstance(value, dict | list):
            queue += value.values() if isinstance(value, dict) else value
        for named in [value, os.path.join(home, value)] if isinstance(value, str) else []:
            if os.path.exists(named) and not os.path.isdir(named) and not _is_in(named, inside):
                raise ArtifactError(
                    f"{home} names a file that is not its own",
                    given=f"{value[:200]} in {file}",
                    expected="files of the same folder",
                    fix=f"take this value out of {file}",
                )


def _is_in(path: str, home: Path) -> bool:
    return any(Path(path).resolve().is_relative_to(folder) for folder in _homes(home))


def _homes(root: Path) -> Iterator[Path]:
    yield root
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            yield folder.parent.parent / "blobs"

"""Whether a folder that was given holds all that it says it holds. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moemerge.errors import CheckpointError


def refuse_links_out(folder: Path) -> None:
    """Raise CheckpointError if something in `folder` is a link to elsewhere, or neither file nor folder.

    Whoever made the folder could have any file of this machine read, and published, by such a link. In the
    Hugging Face cache, where files are links to the blobs of their repository, these are no elsewhere.
    """
    homes = list(_homes(folder.resolve()))
    for path in folder.rglob("*"):
        target = path.resolve()
        inside = not path.is_symlink() or any(target.is_relative_to(home) for home in homes)
        plain = target.is_file() or target.is_dir()
        if not inside or not (plain or path.is_symlink()):
            raise CheckpointError(
                f"{folder} holds what is not its own",
                given=f"{path.name}, {'a link to ' + str(target) if path.is_symlink() else 'no plain file'}",
                expected="files, or links to files in the same folder",
                fix="put a copy of the file in its place, or remove it",
            )


def _homes(root: Path) -> Iterator[Path]:
    yield root
    for place in (root, *root.parents):
        if place.parent.name == "snapshots":
            yield place.parent.parent / "blobs"

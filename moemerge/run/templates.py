"""The recipes that come with the package."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from moemerge.artifacts.disk import disk_faults, write_whole
from moemerge.errors import OptionError, unknown


def templates() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    installed = Path(str(importlib.resources.files("moemerge"))) / "merge_configs"
    folder = installed if installed.is_dir() else Path(__file__).parent.parent.parent / "merge_configs"
    return {path.stem: path for path in sorted(folder.glob("*.yml"))}


def write_template(path: str | Path, name: str = "quickstart") -> Path:
    """Write the commented recipe `name` to `path`. OptionError for an unknown name or an existing file."""
    known, path = templates(), Path(path)
    if name not in known:
        raise unknown("template", name, known)
    if path.exists():
        raise OptionError(
            "file exists already",
            given=str(path),
            expected="a new file",
            fix="choose another name or remove it",
        )
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, known[name].read_text(encoding="utf-8"))
    return path

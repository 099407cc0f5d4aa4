"""The recipes that come with the package."""

from __future__ import annotations

import importlib.resources
import itertools
import re
from pathlib import Path

from moemerge.artifacts.disk import disk_faults, write_whole
from moemerge.errors import OptionError, unknown

SCHEMA = "recipe.schema.json"


def folder_of_templates() -> Path:
    """Where the recipes that come with the package lie."""
    installed = Path(str(importlib.resources.files("moemerge"))) / "merge_configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent.parent / "merge_configs"


def schema_line() -> str:
    """The first line of a recipe, by which editors that speak YAML find the schema of recipes."""
    return f"# yaml-language-server: $schema={folder_of_templates() / SCHEMA}\n"


def templates() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(folder_of_templates().glob("*.yml"))}


def summary(template: Path) -> str:
    """What a template says of itself: the first sentence of its first comment."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), template.read_text("utf-8").splitlines())
    return re.split(r"[.:?]( |$)", " ".join(line.lstrip("# ") for line in lines))[0]


def write_template(path: str | Path, name: str = "quickstart") -> Path:
    """Write the commented recipe `name` to `path`. OptionError for an unknown name or an existing file."""
    known = templates()
    if name not in known:
        raise unknown("template", name, known)
    return write_new(path, schema_line() + known[name].read_text(encoding="utf-8"))


def write_new(path: str | Path, text: str) -> Path:
    """Write `text` to a file that is not there yet. OptionError for one that is."""
    path = Path(path)
    if path.exists():
        raise OptionError(
            "file exists already",
            given=str(path),
            expected="a new file",
            fix="choose another name or remove it",
        )
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return path

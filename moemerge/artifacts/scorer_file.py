"""scorer.json: a scorer that is no classifier, by its kind and the models that it is made of.

Imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import read_object
from moemerge.errors import CheckpointError
from moemerge.options.base import input_fields
from moemerge.options.parse import parse_options
from moemerge.options.scorers import options_of

FILE = "scorer.json"
MOST = 1_000_000  # bytes


def scorer_file(source: str | Path) -> Path | None:
    """The file that says what scorer `source` is: itself, if it is called so, or that in it; None of others.

    A folder with a config.json is a model, whatever else it holds.
    """
    path = Path(source)
    if path.is_dir():
        file = path / FILE
        return file if file.is_file() and not (path / "config.json").exists() else None
    return path if path.name.endswith(FILE) and path.is_file() else None


def read_scorer(file: Path) -> tuple[str, Any]:
    """Kind and options of the scorer that `file` describes; what it names beside itself is spelt out.

    Raises CheckpointError for a file that is no JSON object, OptionError for an unknown kind or options.
    """
    try:
        values = read_object(file, MOST, once=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the scorer cannot be read: {file}",
            given=str(error)[:300],
            expected='a JSON object, such as {"kind": "implicit", "policy": ..., "reference": ...}',
            fix="correct the file",
        ) from None
    kind = str(values.pop("kind", "none"))[:100]
    options = parse_options(options_of(kind), values, file.name)
    named = {name: _beside(source, file.parent) for name, source in input_fields(options).items()}
    return kind, options.model_copy(update=named)


def _beside(source: str, folder: Path) -> str:
    path = folder / source
    return str(path) if path.exists() else source

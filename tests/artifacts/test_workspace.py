"""What a stage keeps of long work: made once, and again only if the file that holds it has changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moemerge.artifacts.workspace import once

VALUE = {"texts": ["a", "é"], "loss": 0.1, "none": None, "number": float("inf")}


def edited(path: Path, **changes: Any) -> str:
    return json.dumps(json.loads(path.read_text()) | changes)


HARMS: dict[str, Callable[[Path], str]] = {
    "empty": lambda path: "",
    "cut": lambda path: path.read_text()[:-9],
    "nested": lambda path: "[" * 100_000,
    "no object": lambda path: "[1]",
    "of an older version": lambda path: json.dumps(VALUE),
    "another value": lambda path: edited(path, value={**VALUE, "loss": 0.2}),
    "another checksum": lambda path: edited(path, sha256=5),
    "no checksum": lambda path: json.dumps({"value": VALUE}),
}


def test_it_is_made_once(tmp_path: Path) -> None:
    assert once(tmp_path / "a.json", lambda: VALUE) == VALUE
    assert once(tmp_path / "a.json", lambda: 1 / 0) == VALUE
    assert once(tmp_path / "b.json", lambda: [(1, 2)]) == [[1, 2]] == once(tmp_path / "b.json", list)


@pytest.mark.parametrize("name", HARMS)
def test_what_has_changed_is_made_again(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.json"
    once(path, lambda: VALUE)
    path.write_text(HARMS[name](path))
    with caplog.at_level(logging.WARNING, "moemerge"):
        assert once(path, lambda: "again") == "again"
    assert "is not as it was written" in caplog.text
    assert once(path, lambda: 1 / 0) == "again"

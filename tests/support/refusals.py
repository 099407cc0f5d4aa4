"""The command line refusing what it was given: what it said, and that it left no trace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from moemerge.run.cli import main

SECONDS = 60  # of this process's own time, whatever else the machine does; a case takes one or two


def tree(folder: Path) -> dict[str, int]:
    """Every file, with its time of change."""
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def refused(arguments: list[Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command line; what it said, if it refused as it should and left no trace in `folder`."""
    before, clock = tree(folder), time.process_time()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert all(part in said for part in ("given:", "expected:", "to fix:")), said
    assert "Traceback" not in said
    assert tree(folder) == before
    assert time.process_time() - clock < SECONDS
    return said

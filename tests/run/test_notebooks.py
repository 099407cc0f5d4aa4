"""In a notebook bars and messages are seen, in logs neither bars nor, unless asked for, messages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moemerge
from moemerge.artifacts.progress import hidden, in_notebook
from moemerge.artifacts.stage import Draft, stage
from moemerge.options.base import Run
from moemerge.run.messages import tell_in_notebook


class Speak(Run):
    """Options of a stage that says something."""


@stage("speak", Speak)
def speak(options: Speak, draft: Draft) -> None:
    """Say something."""
    logging.getLogger("moemerge.speak").info("reading https://me:secret@hub/x\x1b[31m")


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The package's logger as it is at first."""
    package = logging.getLogger("moemerge")
    monkeypatch.setattr(package, "handlers", [])
    levels = {each: each.level for each in (package, logging.getLogger())}
    package.setLevel(logging.NOTSET)
    tell_in_notebook.cache_clear()
    yield package
    tell_in_notebook.cache_clear()
    for each, level in levels.items():
        each.setLevel(level)


@pytest.fixture
def bare_root(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes pytest's own handlers away, which come when a test begins, after its fixtures."""
    return lambda: monkeypatch.setattr(logging.getLogger(), "handlers", [])


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch, logger: logging.Logger) -> None:
    shell = SimpleNamespace(kernel="a kernel")
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]


def test_a_notebook_is_told_from_a_terminal_and_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False))
    assert not in_notebook() and hidden()
    shells: list[Any] = [None, SimpleNamespace(), SimpleNamespace(kernel=1)]
    for shell, seen in zip(shells, (False, False, True), strict=True):
        fake: Any = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", fake)
        assert in_notebook() is seen and hidden() is not seen
    half_imported: Any = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", half_imported)
    assert not in_notebook()
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    assert not hidden()


@pytest.mark.usefixtures("notebook")
def test_messages_stand_under_the_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bare_root: Callable[[], None]
) -> None:
    bare_root()
    assert moemerge.run_recipe
    speak(output=tmp_path / "out")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("reading https://") and "secret" not in shown[0] and "\x1b" not in shown[0]
    assert shown[1].startswith(f"speak: wrote {tmp_path / 'out'}")


@pytest.mark.usefixtures("notebook")
@pytest.mark.parametrize("when", ["before", "after"])
def test_who_sets_up_logging_reads_everything_once(
    when: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    logger: logging.Logger,
    bare_root: Callable[[], None],
) -> None:
    bare_root()

    def set_up() -> None:
        logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="mine: %(message)s")

    if when == "before":
        set_up()
    assert moemerge.run_recipe
    if when == "after":
        set_up()
    speak(output=tmp_path / "out")
    shown = capsys.readouterr().out.splitlines()
    assert [line.startswith("mine: ") for line in shown] == [True, True]
    assert bool(logger.handlers) is (when == "after")


def test_without_a_notebook_nothing_is_set_up(logger: logging.Logger, bare_root: Callable[[], None]) -> None:
    bare_root()
    assert moemerge.run_recipe
    assert not logger.handlers and logger.level == logging.NOTSET

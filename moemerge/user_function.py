"""Python functions that an option names."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from moemerge.errors import OptionError, suggest


def load_function(named: str) -> Callable[..., Any]:
    """The function FILE.py:NAME or MODULE:NAME. The code of its file or module is run.

    Raises OptionError if there is none, or the file or module cannot be imported.
    """
    home, colon, name = named.rpartition(":")
    if not colon or not home or not name:
        raise _no_function(named, "neither FILE.py:NAME nor MODULE:NAME", "name the file, then the function")
    try:
        module = _open(Path(home)) if home.endswith(".py") else importlib.import_module(home)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise _no_function(named, reason, "correct the name of the file or module, or mend it") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise _no_function(named, f"{home} has no function {name}", suggest(name, known))
    return function


def _open(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _no_function(named: str, given: str, fix: str) -> OptionError:
    return OptionError(
        f"there is no function {named}",
        given=given,
        expected="a function in a Python file or an installed module",
        fix=fix,
    )

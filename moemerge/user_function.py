"""Python functions that an option names."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from moemerge.errors import OptionError


def load_function(name: str) -> Callable[..., Any]:
    """The function called `name`: module:function, or path/to/file.py:function. Its module's code is run.

    Raises OptionError if there is none, or the module cannot be imported.
    """
    module, _, attribute = name.rpartition(":")
    try:
        function = getattr(_load(module), attribute)
    except (ImportError, AttributeError, ValueError, OSError, SyntaxError) as error:
        raise _unusable(name, f"{type(error).__name__}: {error}") from error
    if not callable(function):
        raise _unusable(name, f"{attribute} is a {type(function).__name__}")
    return function


def _load(module: str) -> ModuleType:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    if spec is None or spec.loader is None:
        raise ImportError(module)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def _unusable(name: str, why: str) -> OptionError:
    return OptionError(
        "a Python function cannot be loaded",
        given=f"{name} ({why})"[:300],
        expected="module:function, or path/to/file.py:function",
        fix="correct the name, or install the module",
    )

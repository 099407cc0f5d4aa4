"""Writes moemerge/__init__.pyi and merge_configs/recipe.schema.json: what editors are shown.

Both are made from the options. `make stub` runs it; tests hold the files to it.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import moemerge
from moemerge.options.signature import PATH
from moemerge.run import templates
from moemerge.run.recipe_schema import recipe_schema

STUB = Path(moemerge.__file__).with_suffix(".pyi")
SCHEMA = templates.folder_of_templates() / templates.SCHEMA
HEAD = '''"""Upcycle a reward model into a mixture of experts, train it, and merge it back."""

# Made from the options: `make stub` writes it anew. Do not edit.

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from moemerge.models import modelling as modelling
'''
TAIL = """
StrPath: TypeAlias = str | os.PathLike[str]

__version__: str
"""


def text_of(annotation: Any) -> str:
    """An annotation as Python's own words, the same under every version of Python."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return _union(arguments)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin is not None and arguments:
        given = ", ".join("..." if one is ... else _listed(one) for one in arguments)
        return f"{origin.__name__}[{given}]"
    if annotation is Callable:
        return "Callable[..., Any]"
    return "None" if annotation in (None, NoneType) else str(annotation.__name__)


def _listed(annotation: Any) -> str:
    return f"[{', '.join(map(text_of, annotation))}]" if isinstance(annotation, list) else text_of(annotation)


def _union(arguments: tuple[Any, ...]) -> str:
    """A path first, as one word, and None last."""
    path = get_args(PATH)
    words = ["StrPath"] if set(path) <= set(arguments) else []
    words += [text_of(one) for one in arguments if not words or one not in path]
    return " | ".join(sorted(words, key="None".__eq__))


def _parameters(shown: Signature) -> str:
    lines, named = [], False
    for name, option in shown.parameters.items():
        if option.kind is Parameter.KEYWORD_ONLY and not named:
            lines, named = [*lines, "*"], True
        default = "" if option.default is Parameter.empty else f" = {option.default!r}"
        lines.append(f"{name}: {text_of(option.annotation)}{default}")
    return ", ".join(lines)


def _function(name: str) -> str:
    function = getattr(moemerge, name)
    shown = inspect.signature(function)
    text = textwrap.indent(inspect.getdoc(function) or "", "    ").strip()
    # The trailing comma has each parameter stand on a line of its own.
    returns = text_of(shown.return_annotation)
    return f'def {name}({_parameters(shown)},) -> {returns}:\n    r"""{text}\n    """\n'


def stub() -> str:
    """What the file is to hold."""
    functions = {name: getattr(moemerge, name) for name in moemerge._HOMES}
    made = [name for name, it in functions.items() if inspect.isfunction(it) and "__signature__" in vars(it)]
    rest = [name for name in moemerge._HOMES if name not in made]
    imports = "".join(f"from moemerge.{moemerge._HOMES[name]} import {name} as {name}\n" for name in rest)
    text = "\n".join([HEAD + imports + TAIL, *map(_function, made)])
    for command in (["check", "--select=I", "--fix", "--quiet"], ["format", "--quiet"]):
        given = [sys.executable, "-m", "ruff", *command, f"--stdin-filename={STUB}", "-"]
        text = subprocess.run(given, input=text, capture_output=True, text=True, check=True).stdout
    return text


def schema() -> str:
    """What the schema of recipes is to hold."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")

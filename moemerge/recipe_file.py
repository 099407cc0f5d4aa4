"""Recipe files: YAML read strictly, and values set from the command line."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from moemerge.errors import OptionError

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000

Tree = dict[str, Any]


def read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file. OptionError for a file that is missing, huge, broken or ambiguous."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _unreadable(path, f"{path.stat().st_size} bytes", f"at most {MAX_BYTES} bytes of YAML")
        tree = _yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "a recipe file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(path, " ".join(str(error).split()), "valid YAML") from error
    if not isinstance(tree, dict):
        raise _unreadable(path, type(tree).__name__, "a mapping of options to values")
    return tree


def _unreadable(path: Path, given: str, expected: str) -> OptionError:
    fix = "correct the file, or write a fresh one with `moemerge init`"
    return OptionError(f"recipe {path} cannot be read", given=given, expected=expected, fix=fix)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses keys that are given twice or are no texts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for number, key in enumerate(keys):
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is no text", problem_mark=key.start_mark
                )
            if key.value in [earlier.value for earlier in keys[:number]]:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    """The value of a YAML text; yaml.YAMLError if it is broken, or too large with its aliases unfolded."""
    value = yaml.load(text, _StrictLoader)
    queue, count = [value], 0
    while queue:
        item, count = queue.pop(), count + 1
        queue += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
        if count > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values")
    return value


def apply_overrides(tree: Tree, overrides: Iterable[str]) -> None:
    """Set "section.key=value" in `tree`, the value read as YAML. Raises OptionError for any other form."""
    for override in overrides:
        path, equals, text = override.partition("=")
        *sections, key = path.strip().split(".")
        try:
            place = tree
            for section in sections:
                place[section] = dict(place.get(section) or {})
                place = place[section]
            place[key] = _yaml(text)
        except (yaml.YAMLError, TypeError, ValueError, AttributeError):
            equals = ""
        if not equals or not all([*sections, key]):
            raise OptionError(
                "override cannot be read", given=override, expected="section.key=value", fix="correct --set"
            )

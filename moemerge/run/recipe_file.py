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
        tree = _yaml(path.read_text(encoding="utf-8-sig"))
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
        seen = set()
        for key in [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]:
            fault = "is no text" if key.tag != "tag:yaml.org,2002:str" else "is given twice"
            if fault == "is no text" or key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} {fault}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    """The value of a YAML text; yaml.YAMLError if it is broken, or too large with its aliases unfolded."""
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values")
        return loader.construct_document(node)
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # PyYAML's own, from a bad scalar
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
    finally:
        loader.dispose()


def _unfolded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values `node` stands for when its aliases are written out, counted without doing so.

    sizes: counts of the nodes seen so far, by their identity: an alias is the same node once more. A few
    lines of aliases of aliases can stand for billions of values.
    """
    if id(node) not in sizes:
        sizes[id(node)] = MAX_VALUES + 1  # for a node that contains itself: infinitely many, so too many
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_unfolded(child, sizes) for child in children)
    return sizes[id(node)]


def apply_overrides(tree: Tree, overrides: Iterable[str]) -> None:
    """Set "section.key=value" in `tree`, the value read as YAML. Raises OptionError for any other form."""
    for override in overrides:
        path, equals, text = override.partition("=")
        *sections, key = path.strip().split(".")
        try:
            branch = tree
            for section in sections:
                # A copy: sections that share an anchor in the file are one dict, and only this one changes.
                branch[section] = dict(branch.get(section) or {})
                branch = branch[section]
            branch[key] = _yaml(text)
        except (yaml.YAMLError, TypeError, ValueError, AttributeError):
            equals = ""
        if not equals or not all([*sections, key]):
            raise OptionError(
                "override cannot be read", given=override, expected="section.key=value", fix="correct --set"
            )

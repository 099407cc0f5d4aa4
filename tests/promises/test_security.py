"""SECURITY.md keeps to what is tested; the package says that it is typed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 10
    assert [row for row in rows if not NAMED.search(row)] == []
    for file, name in set(NAMED.findall(text)):
        homes = list((ROOT / "tests").rglob(file))
        assert len(homes) == 1, f"{file} is to stand in one folder of tests, is in {homes}"
        tree = ast.parse(homes[0].read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, name)


def test_the_package_is_typed() -> None:
    assert (ROOT / "moemerge" / "py.typed").is_file()
    assert 'moemerge = ["py.typed", "__init__.pyi"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")

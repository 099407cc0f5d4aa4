"""The schema that editors read knows what recipes may hold, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from python_stub import SCHEMA, schema

from moemerge.run.templates import SCHEMA as FILE
from moemerge.run.templates import schema_line, templates

WHOLE = json.loads(SCHEMA.read_text(encoding="utf-8"))


def test_the_shipped_schema_is_what_the_options_say() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema(), "write it anew: make stub"
    assert schema_line().startswith("# yaml-language-server: $schema=/") and schema_line().endswith(
        FILE + "\n"
    )


def forms(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a value may be, references followed."""
    if "$ref" in part:
        yield from forms(WHOLE["$defs"][part["$ref"].rsplit("/", 1)[1]])
    for choice in part.get("anyOf", []):
        yield from forms(choice)
    yield part


def knows(part: dict[str, Any], value: Any) -> bool:
    """Whether every key of `value` is one of the schema's, down to the leaves."""
    return any(_form_knows(form, value) for form in forms(part))


def _form_knows(form: dict[str, Any], value: Any) -> bool:
    if not isinstance(value, dict):
        return form.get("type") not in (None, "object") or "enum" in form or "const" in form
    known, more = form.get("properties", {}), form.get("additionalProperties")
    if form.get("type") != "object" or not {*form.get("required", [])} <= value.keys():
        return False
    return all(knows(known[key], item) if key in known else bool(more) for key, item in value.items())


@pytest.mark.parametrize("path", templates().values(), ids=lambda path: path.stem)
def test_every_shipped_recipe_fits_and_a_wrong_key_does_not(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert knows(WHOLE, recipe)
    assert not knows(WHOLE, recipe | {"trian": {}}) and not knows(WHOLE, {"seed": 0})
    section = next(key for key, value in recipe.items() if isinstance(value, dict))
    assert not knows(WHOLE, recipe | {section: recipe[section] | {"nonsense": 1}})

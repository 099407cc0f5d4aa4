"""The JSON schema of recipes, made from the options: editors complete keys by it, and show what they mean.

merge_configs/recipe.schema.json holds it (`make stub` writes it), and recipes that init writes name it in
their first line.
"""

from __future__ import annotations

from typing import Any

from moemerge.options.base import Run
from moemerge.options.recipe import Recipe
from moemerge.run import commands


def recipe_schema() -> dict[str, Any]:
    """The schema of every form that a recipe has: a whole run, or the one section of a command."""
    whole = Recipe.model_json_schema()
    definitions = whole.pop("$defs")
    forms = [whole]
    for row in commands.ROWS:
        section = commands.OPTIONS.get(row.name).model_json_schema()
        definitions |= section.pop("$defs", {})
        forms.append(_alone(row.section, section))
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "moemerge recipe",
        "anyOf": forms,
        "$defs": definitions,
    }


def _alone(name: str, section: dict[str, Any]) -> dict[str, Any]:
    """A recipe with one section: what every step has stands beside it, not in it."""
    common = [key for key in Run.model_fields if key != "overwrite"]
    beside = {key: section["properties"].pop(key) for key in common}
    section["properties"].pop("overwrite")
    section["required"] = [key for key in section["required"] if key != "output"]
    return {
        "type": "object",
        "properties": {**beside, name: section},
        "required": ["output", name],
        "additionalProperties": False,
    }

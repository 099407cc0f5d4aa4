"""Recipes: read from YAML and checked, every fault in one go, without touching weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from moemerge.errors import Faults, MoemergeError, OptionError, together
from moemerge.options.base import Options, Run, input_fields
from moemerge.options.parse import parse_options
from moemerge.options.recipe import WITH_INPUTS, Recipe
from moemerge.run import commands
from moemerge.run.audit import audit_faults
from moemerge.run.combine_check import input_faults, model_faults
from moemerge.run.faults import find_faults
from moemerge.run.patch_check import patch_faults
from moemerge.run.recipe_file import Tree, apply_overrides, read_yaml

# What is wrong with the options of a section that is a recipe by itself.
FAULTS: dict[str, Callable[[Any, str], list[MoemergeError]]] = {
    "audit": audit_faults,
    "merges": lambda options, section: input_faults(options, section) or model_faults(options, section),
    "patch": patch_faults,
}
O = TypeVar("O", bound=Options)  # noqa: E741
MAX_ROUNDS = 20  # of dropping what pydantic refuses: each round may show faults that hid behind others


def load_recipe(
    path: str | Path, overrides: Iterable[str] = (), output: str | Path | None = None
) -> Recipe | Run:
    """The recipe in the YAML file `path`, with `overrides` such as "train.epochs=2" applied.

    Relative inputs are looked for beside the recipe first, then in the working directory; `output` is
    relative to the working directory. A recipe with a section merges or patch is the options of combine or
    patch. Raises
    OptionError, or Faults with everything that is wrong at once.
    """
    path = Path(path).expanduser()
    tree = read_yaml(path)
    apply_overrides(tree, [*overrides, *([f"output={json.dumps(str(output))}"] if output else [])])
    if row := next((row for row in commands.ROWS if row.section in tree), None):
        return _alone(row, tree, path)
    faults, recipe, dropped = _faults_of_form(tree)
    if recipe is not None:
        recipe = _resolve_inputs(recipe, path.parent)
        faults = [*faults, *find_faults(recipe, dropped)]
    if faults:
        raise together(f"recipe {path}", faults)
    assert recipe is not None
    return recipe


def _alone(row: commands.Row, tree: Tree, path: Path) -> Run:
    """The options in the one section of such a recipe, and output, seed, threads and device beside it."""
    section, command = row.section, row.name
    given = tree[section]
    rest = {key: value for key, value in tree.items() if key != section}
    own = [name for name in Run.model_fields if name != "overwrite"]
    foreign = [key for key in rest if key not in own]
    if not isinstance(given, dict) or foreign:
        raise OptionError(
            f"recipe {path} cannot be read",
            given=f"{section}, and {foreign[0]}" if foreign else f"{section}: {type(given).__name__}",
            expected=f"a section {section} with options of {command}; beside it only {', '.join(own)}",
            fix=f"take the other sections out: {command} does every step by the options in {section}",
        )
    options = _resolved(parse_options(commands.OPTIONS.get(command), {**given, **rest}, section), path.parent)
    if faults := FAULTS[section](options, section):
        raise together(f"recipe {path}", faults)
    return options


def check_recipe(path: str | Path, overrides: Iterable[str] = ()) -> list[MoemergeError]:
    """Every fault of the recipe at `path`; an empty list if it can run."""
    try:
        load_recipe(path, overrides)
    except Faults as several:
        return several.faults
    except MoemergeError as fault:
        return [fault]
    return []


def _faults_of_form(tree: Tree) -> tuple[list[MoemergeError], Recipe | None, set[str]]:
    """Unknown keys and wrong values; what is left of the recipe without them; and the keys dropped for that.

    The rest of the recipe can then be checked as well, so that a user sees all faults in one go. It is None
    if no recipe is left. Unknown keys are not among the dropped: nothing depends on them.
    """
    try:
        return [], parse_options(Recipe, tree, "recipe"), set()
    except MoemergeError as error:
        faults = error.faults if isinstance(error, Faults) else [error]
    tree, dropped = copy.deepcopy(tree), set[str]()
    for _ in range(MAX_ROUNDS):
        try:
            return faults, Recipe(**tree), dropped
        except ValidationError as error:
            for detail in error.errors():
                if detail["type"] != "extra_forbidden":
                    dropped.add(".".join(map(str, detail["loc"][:2])))
                _drop(tree, detail["loc"])
    return faults, None, dropped


def _drop(tree: Tree, location: tuple[str | int, ...]) -> None:
    """Take the value at pydantic's `location` out of `tree`; a missing output gets a value that will do.

    A location may go on beyond the tree, into a value or with the name of a type: the last key that is there
    is dropped then.
    """
    *parents, key = location
    node: Any = tree
    for depth, parent in enumerate(parents):
        if not isinstance(node.get(parent), dict):
            key, parents = parent, parents[:depth]
            break
        node = node[parent]
    if key in node:
        del node[key]
    elif not parents and key == "output":
        node[key] = "output"


def _resolve_inputs(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with relative inputs that exist beside it spelt out."""

    sections = {name: getattr(recipe, name) for name in WITH_INPUTS}
    update = {name: _resolved(section, folder) for name, section in sections.items() if section}
    return _resolved(recipe, folder).model_copy(update=update)


def _resolved(options: O, folder: Path) -> O:
    """The options with relative inputs that exist in `folder` spelt out."""

    def beside(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: beside(source) for name, source in value.items()}
        if isinstance(value, list):
            return [beside(source) for source in value]
        path = folder / value
        return str(path) if path.exists() and not Path(value).is_absolute() else value

    return options.model_copy(update={key: beside(value) for key, value in input_fields(options).items()})

"""The table of stages: each row finds its stage, and whatever lists stages lists the rows."""

from __future__ import annotations

from inspect import Parameter, isfunction, signature
from pathlib import Path
from typing import get_type_hints

import pytest

import moemerge
from moemerge.artifacts.environment import package_version
from moemerge.errors import ArtifactError
from moemerge.options.base import Run
from moemerge.run import cli
from moemerge.run.headlines import headline
from moemerge.stages import OPTIONS, ROWS, STAGES, Row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_finds_its_stage_and_the_options_that_the_stage_takes(row: Row) -> None:
    stage, options = STAGES.get(row.name), OPTIONS.get(row.name)
    assert isfunction(stage) and issubclass(options, Run)
    assert get_type_hints(stage.__wrapped__)["options"] is options
    assert stage.__doc__ and row.summary.endswith(".")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_help_shows_the_options_of_a_stage_with_their_defaults(row: Row) -> None:
    function, options = STAGES.get(row.name), OPTIONS.get(row.name)
    shown, fields = signature(function).parameters, options.model_fields
    assert shown.keys() == fields.keys() and shown["seed"].default == 0
    required = {name for name, option in shown.items() if option.default is Parameter.empty}
    assert required == {name for name, option in fields.items() if option.is_required()}
    unnamed = [name for name, option in shown.items() if option.kind is Parameter.POSITIONAL_OR_KEYWORD]
    assert tuple(unnamed) == options.POSITIONAL and set(shown) == set(function.__annotations__) - {"return"}
    assert all(f"    {name}: {fields[name].description[:20]}" in function.__doc__ for name in fields)


def test_commands_are_the_rows_in_order_with_their_summaries() -> None:
    names = [row.command for row in ROWS]
    assert [name for name in cli.cli.commands if name in names] == names
    assert [cli.cli.commands[row.command].help for row in ROWS] == [row.summary for row in ROWS]
    files = {path.stem for path in Path(cli.__file__).parent.with_name("stages").glob("[!_]*.py")}
    assert files == {row.name for row in ROWS}


def test_the_python_door_has_every_stage() -> None:
    stages = dict(reversed(row.function.removeprefix("moemerge.").split(":")) for row in ROWS)
    assert stages.items() <= moemerge._HOMES.items()


def manifest(stage: str, results: dict[str, object], version: str) -> dict[str, object]:
    """As much of a manifest as a headline is made of."""
    return {"stage": stage, "results": results, "versions": {"moemerge": version}}


def test_a_result_that_changed_its_name_is_not_passed_over() -> None:
    for row in ROWS:
        with pytest.raises(ArtifactError, match="cannot be shown"):
            headline(manifest(row.name, {"renamed": 1}, package_version()))


def test_results_of_another_version_are_shown_as_they_stand() -> None:
    results = {"loss": 0.12345, "long": "n" * 99, "sizes": {"train": 5}, "table": [1, 2]}
    assert headline(manifest("merge", results, "0.0.1")) == "loss 0.1235  sizes.train 5"
    assert headline(manifest("gone", results, "0.0.1")).startswith("loss 0.1235")


def test_the_headline_of_an_export_names_what_was_written() -> None:
    dense = manifest("export", {"models": ["shared", "expert-0"], "merged_tensors": 4}, package_version())
    assert headline(dense) == "2 dense models: shared, expert-0"
    stock = {"form": "qwen2_moe", "largest_difference": 1.5e-7}
    assert (
        headline(manifest("export", stock, package_version()))
        == "qwen2_moe; largest difference to the MoE 1.5e-07"
    )

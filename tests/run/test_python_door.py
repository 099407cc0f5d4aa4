"""The Python door: what calls take, what they give back, and what editors and type checkers are shown."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas
import pytest
import torch
from python_stub import STUB, stub

import moemerge
from moemerge.artifacts.result import SHOWN, Result, html_table
from moemerge.artifacts.stage import Draft, Stage, stage
from moemerge.errors import ArtifactError, OptionError, UnsupportedError
from moemerge.options.base import Run, Several, Source
from moemerge.options.fit import Fit
from moemerge.options.merge import Merge
from moemerge.run.flags import COMMANDS

# Functions that a user of steps and recipes does not need.
ELSEWHERE = {"load_moe", "load_recipe", "verify", "verify_folder"}


class Weigh(Run):
    """Options of a stage that writes numbers."""

    POSITIONAL = ("model", "others")

    model: Source
    others: Several | None = None
    scale: float = 2.0


@stage("weigh", Weigh)
def weigh(options: Weigh, draft: Draft) -> None:
    """Weigh something."""
    draft.results |= {
        "loss": 0.5,
        "after": {"accuracy": 0.75, "by": [1, 2]},
        "name": "<b>",
        "scale": options.scale,
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("w")
    return folder


# What is shown


def test_type_checkers_see_what_the_options_say() -> None:
    assert STUB.read_text(encoding="utf-8") == stub(), "write it anew: make stub"


@pytest.mark.parametrize("name", [name for name in moemerge._HOMES if name[0].islower()])
def test_every_function_shows_its_parameters_with_types(name: str) -> None:
    shown = inspect.signature(getattr(moemerge, name))
    assert shown.parameters and shown.return_annotation is not inspect.Signature.empty
    assert all(option.annotation is not inspect.Parameter.empty for option in shown.parameters.values())
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert not any(option.kind in stars for option in shown.parameters.values())


def test_functions_over_whole_models_show_the_options_that_they_pass_on() -> None:
    fitted, merged = (inspect.signature(f).parameters for f in (moemerge.fit_models, moemerge.merge_models))
    assert list(fitted)[:4] == ["models", "pairs", "output", "base"]
    assert list(merged)[:4] == ["models", "output", "base", "coefficients"]
    assert fitted.keys() == Fit.model_fields.keys() - {"model"}
    assert merged.keys() == Merge.model_fields.keys() - {"model", "weights"}
    combined = inspect.signature(moemerge.combine).parameters
    assert combined.keys() == COMMANDS.get("combine").model_fields.keys() | {"tell"}


def test_annotations_say_what_may_be_given_and_not_what_is_kept() -> None:
    shown = inspect.signature(weigh)
    types = {name: option.annotation for name, option in shown.parameters.items()}
    path = str | os.PathLike
    assert types["model"] == types["output"] == path and types["scale"] is float
    assert types["others"] == path | Sequence[path] | Mapping[str, path] | None
    assert shown.return_annotation is Result


def test_the_page_on_python_names_every_function() -> None:
    text = (Path(__file__).parent.parent.parent / "docs/python.md").read_text(encoding="utf-8")
    functions = {name for name in moemerge._HOMES if name[0].islower()} - ELSEWHERE
    assert {name for name in functions if not re.search(rf"`(moemerge\.)?{name}[`(.]", text)} == set()


# What is taken


def test_inputs_go_by_place_and_paths_are_of_any_kind(model: Path, tmp_path: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(model)

    for number, given in enumerate((model, str(model), Place())):
        others = (Place(), str(tmp_path))
        folder = weigh(given, others, output=str(tmp_path.parent / f"{tmp_path.name}-{number}"))
        assert folder.manifest["options"]["model"] == str(model)
        assert folder.manifest["options"]["others"] == {"model": str(model), tmp_path.name: str(tmp_path)}
    chained = weigh(weigh(model, output=tmp_path / "first"), output=tmp_path / "second")
    assert chained.manifest["inputs"]["model"]["path"] == str(tmp_path / "first")
    assert weigh(Weigh(model=str(model), output=tmp_path / "ready")).numbers["scale"] == 2.0


@pytest.mark.parametrize(
    ("inputs", "named", "given"),
    [
        (("m", "o", "out"), {}, "3 values without names"),
        (("m",), {"model": "n", "output": "out"}, "model twice"),
    ],
)
def test_calls_that_cannot_be_told_apart_are_refused(
    inputs: tuple[str, ...], named: dict[str, str], given: str
) -> None:
    with pytest.raises(OptionError) as caught:
        weigh(*inputs, **named)
    assert caught.value.given == given
    assert caught.value.expected.startswith("weigh(model, others, output=...)")


# What is given back


def test_a_result_is_its_folder(model: Path, tmp_path: Path) -> None:
    result = weigh(model, output=tmp_path / "out")
    assert isinstance(result, Path) and result == tmp_path / "out" and str(result) == str(tmp_path / "out")
    assert os.fspath(result) == str(tmp_path / "out") and type(result.path) is type(tmp_path)
    assert json.loads((result / "manifest.json").read_text())["stage"] == "weigh"
    assert result.exists() and result.parent == tmp_path and {result: 1}[tmp_path / "out"] == 1
    for other in (result / "manifest.json", result.parent, *result.iterdir()):
        assert type(other) is type(tmp_path)
    assert pickle.loads(pickle.dumps(result)).numbers == result.numbers


def test_numbers_and_rows_are_those_of_the_manifest(model: Path, tmp_path: Path) -> None:
    result = weigh(model, output=tmp_path / "out", scale=3)
    assert result.numbers["after"] == {"accuracy": 0.75, "by": [1, 2]}
    values = {row["name"]: row["value"] for row in result.rows()}
    assert values == {"loss": 0.5, "after.accuracy": 0.75, "name": "<b>", "scale": 3.0}
    table = result.table()
    assert isinstance(table, pandas.DataFrame) and table.to_dict("records") == result.rows()


def test_a_notebook_shows_the_rows_and_no_markup_of_names(model: Path, tmp_path: Path) -> None:
    result = weigh(model, output=tmp_path / "out")
    shown = str(result._repr_html_())
    assert "<td>loss</td><td>0.5</td>" in shown and "&lt;b&gt;" in shown and "<b><b>" not in shown
    assert Result(tmp_path)._repr_html_() is None
    assert "and 2 rows more" in html_table([{"a": 1}] * (SHOWN + 2))


def test_folders_of_nobody_have_no_numbers(tmp_path: Path) -> None:
    for read in (lambda: Result(tmp_path).numbers, lambda: moemerge.open_result(tmp_path)):
        with pytest.raises(ArtifactError, match="is not a moemerge artifact"):
            read()


def test_a_table_without_pandas_says_what_to_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = weigh(model, output=tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnsupportedError, match="a table needs pandas") as caught:
        result.table()
    assert ".rows()" in caught.value.fix and result.rows()


def test_results_that_a_stage_would_not_write_are_told(model: Path, tmp_path: Path) -> None:
    def rows(folder: Path) -> list[dict[str, object]]:
        return [{"n": json.loads((folder / "none.json").read_text())}]

    odd: Stage = stage("odd", Weigh, rows=rows)(lambda options, draft: None)
    with pytest.raises(ArtifactError, match="cannot be shown"):
        odd(model, output=tmp_path / "odd").rows()


def test_tensors_have_plain_names_at_the_door() -> None:
    alpha, shared = (
        torch.tensor([[0.25, 0.75]], dtype=torch.float64),
        torch.tensor([0.5], dtype=torch.float64),
    )
    made = moemerge.Coefficients.of_layers([3], alpha, shared)
    assert made.alpha is made.alpha_LN and made.shared is made.shared_L
    assert made.changes.tolist() == [[0.125, 0.375]]

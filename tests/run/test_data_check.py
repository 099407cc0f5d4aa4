"""What check finds in the rows that a run would read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_training import rows, write
from tiny_models import save_dense

from moemerge.errors import DataError
from moemerge.run import cli
from moemerge.run.check import load_recipe
from moemerge.run.forecast import forecast


def recipe(folder: Path, prompts: int, **changes: Any) -> Path:
    """A recipe that splits off its own validation pairs, on 40 pairs of so many prompts."""
    save_dense(folder / "rm")
    made = [row | {"prompt": f"w{3 + number % prompts} "} for number, row in enumerate(rows(40, 1))]
    write(folder / "pairs.jsonl", made)
    tree: dict[str, Any] = {"output": str(folder / "run"), "model": "rm", "device": "cpu", "threads": 1}
    write(folder / "test.jsonl", rows(10, 2))
    data = {
        "train": "pairs.jsonl",
        "tests": {"other": "test.jsonl"},
        "validation_share": 0.1,
        **changes.pop("data", {}),
    }
    (folder / "my.yml").write_text(yaml.safe_dump(tree | {"data": data} | changes))
    return folder / "my.yml"


def test_a_validation_part_of_one_prompt_is_foreseen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By check, with a remedy that works; coefficients that are not fitted to pairs need none held out."""
    path = recipe(tmp_path, 8)
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", str(path)])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "no pairs can be held out" in told
    assert "data.validation: pairs of 1 prompt\n" in told and "raise data.validation_share" in told
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(path)])
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert not isinstance(forecast(load_recipe(path, ["data.validation_share=0.3"])), str)
    assert not isinstance(forecast(load_recipe(path, ["data.fit=pairs.jsonl"])), str)
    assert not isinstance(forecast(load_recipe(path, ["fit.method=usage"])), str)


def test_folds_of_fewer_prompts_are_foreseen(tmp_path: Path) -> None:
    path = recipe(tmp_path, 8, data={"validation_share": 0.4}, fit={"folds": 4})
    with pytest.raises(DataError, match="fit-learned: no pairs can be held out|fit: no pairs") as caught:
        forecast(path)
    assert caught.value.expected.startswith("pairs of 4 prompts") and "fit.folds to 3" in caught.value.fix
    assert not isinstance(forecast(load_recipe(path, ["fit.folds=3"])), str)


@pytest.mark.parametrize(
    ("prompts", "data", "told"),
    [
        (2, {"test_share": 0.1}, "train cannot be split into 3 parts"),
        (8, {"split_by": "topic"}, "rows have no field 'topic'"),
    ],
)
def test_pairs_that_cannot_be_split_are_foreseen(
    prompts: int, data: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=told):
        forecast(recipe(tmp_path, prompts, data=data))

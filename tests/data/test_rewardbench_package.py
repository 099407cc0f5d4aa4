"""RewardBench against its own package, on rows drawn at random; skipped where that cannot be had.

Of the package only two files are run, which need nothing else of it: as a whole it does not go with
transformers 5 (tests/promises/test_peers.py runs it in an environment of its own). It is put into a folder
of its own, without what it depends on.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from small_reports import choice_scores

from moemerge.evaluation.probes.rewardbench import ROWS_1, SECTIONS, aggregate, results
from moemerge.evaluation.probes.rewardbench_ties import ties_scores

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's files."""
    folder = tmp_path_factory.mktemp("rewardbench")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(folder), "rewardbench==0.1.4"], capture_output=True)
    if done.returncode:
        pytest.skip("rewardbench cannot be installed here")
    return folder / "rewardbench"


@pytest.fixture
def package(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Its files utils.py and constants.py, with what they import of models and templates left empty."""
    for name, holds in (
        ("fastchat", ()), ("fastchat.conversation", ("Conversation",)), ("rewardbench", ()),
        ("rewardbench.models", ("REWARD_MODEL_CONFIG",)),
    ):  # fmt: skip
        empty: Any = ModuleType(name)
        for attribute in holds:
            setattr(empty, attribute, {})
        monkeypatch.setitem(sys.modules, name, empty)
    return {name: module_in(home / f"{name}.py", monkeypatch) for name in ("constants", "utils")}


def module_in(file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"rewardbench.{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_sections_of_version_1(package: dict[str, Any]) -> None:
    draw = np.random.default_rng(0)
    for left_out in ([], ["hep-go", "donotanswer"], ["math-prm"]):
        scores = {name: float(draw.random()) for name in ROWS_1 if name not in left_out}
        constants = package["constants"]
        theirs = package["utils"].calculate_scores_per_section(
            constants.EXAMPLE_COUNTS, constants.SUBSET_MAPPING, scores
        )
        assert aggregate(scores, 1)[0] == pytest.approx(theirs) and set(theirs) == set(SECTIONS)


def test_rows_of_version_2(package: dict[str, Any]) -> None:
    """Scores of one digit, so that many are equal."""
    from datasets import Dataset

    draw = np.random.default_rng(1)
    rows = [{"scores": draw.integers(0, 4, draw.integers(2, 6)).astype(float).tolist()} for _ in range(60)]
    flat = [score for row in rows for score in row["scores"]]
    sizes = [len(row["scores"]) for row in rows]
    theirs = package["utils"].reroll_and_score_dataset(
        Dataset.from_dict({"scores": flat}), sizes, cols_to_combine=["scores"]
    )
    mine = choice_scores(rows)
    assert results(mine.scores["m"], mine)[0].tolist() == pytest.approx(theirs["results"])


def test_ties(package: dict[str, Any]) -> None:
    draw = np.random.default_rng(2)
    for _ in range(20):
        rows = []
        for number in range(12):
            for kind, correct in (("ref", 1), ("tied", int(draw.integers(1, 5)))):
                scores = draw.normal(size=correct + int(draw.integers(1, 4))).round(1)
                scores[:correct] += 1.0
                rows.append(
                    {
                        "id": f"{kind}:{number}",
                        "scores": scores.tolist(),
                        "correct": correct,
                        "subset": "Ties",
                    }
                )
        given = [{"id": row["id"], "scores": row["scores"], "num_correct": row["correct"]} for row in rows]
        theirs = package["utils"].process_single_model(_Rows(given))[1]
        mine = choice_scores(rows)
        assert ties_scores([mine.scores["m"]], mine, 10, 0)[0, 0] == pytest.approx(theirs)


class _Rows(list[Any]):
    """What the package asks of a data set: to be read, and to take a further column."""

    def add_column(self, *_: Any) -> _Rows:
        return self

    def remove_columns(self, *_: Any) -> _Rows:
        return self

    column_names: tuple[str, ...] = ()

"""Attacks compared: shares and paired differences against brute force, planted models, attacks unlike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_moe import random_pairs, rewrite, write_rows
from tiny_models import save_dense

from moemerge.artifacts.json_file import read_object
from moemerge.errors import ArtifactError, OptionError
from moemerge.evaluation.robustness import Attacked, sentence, tables
from moemerge.stages.attack import attack
from moemerge.stages.robustness import robustness

PROMPTS = np.array([0, 0, 1, 2, 3, 3, 3, 4])
RIGHT = {"before": [1, 1, 1, 1, 0, 1, 1, 0], "after": [1, 0, 1, 1, 1, 1, 1, 0]}
FELL = {"before": [1, 1, 0, 1, 0, 1, 0, 0], "after": [0, 0, 0, 1, 0, 0, 0, 0]}


@pytest.fixture
def planted() -> dict[str, Any]:
    right_MP, fell_MP = (np.array([values[name] for name in RIGHT], dtype=bool) for values in (RIGHT, FELL))
    return Attacked([*RIGHT], right_MP, right_MP & ~fell_MP, PROMPTS).numbers("before", 4000, 0.9, 1)


def test_shares_and_paired_differences_by_hand(planted: dict[str, Any]) -> None:
    before, after = planted["models"].values()
    assert (before["accuracy"]["value"], after["accuracy"]["value"]) == (6 / 8, 6 / 8)
    assert (before["robust_accuracy"]["value"], after["robust_accuracy"]["value"]) == (2 / 8, 5 / 8)
    assert (before["overturned"]["value"], after["overturned"]["value"]) == (4 / 6, 1 / 6)
    lead = after["minus"]["before"]
    assert lead["accuracy"]["value"] == 0 and lead["robust_accuracy"]["value"] == 3 / 8
    # Pairs 0, 2, 3, 5 and 6 are right for both: three fell before, one of these after.
    assert lead["overturned"]["value"] == pytest.approx(1 / 5 - 3 / 5) and lead["overturned"]["pairs"] == 5


def test_each_is_compared_with_each() -> None:
    right_MP = np.array([RIGHT["before"], RIGHT["after"], RIGHT["after"]], dtype=bool)
    numbers = Attacked(["a", "b", "c"], right_MP, right_MP, PROMPTS).numbers("a", 100, 0.9, 1)
    for one in numbers["models"]:
        for other in numbers["models"].keys() - {one}:
            lead, back = (
                numbers["models"][x]["minus"][y]["robust_accuracy"] for x, y in ((one, other), (other, one))
            )
            assert lead["value"] == -back["value"] and lead["low"] == pytest.approx(-back["high"])
    # b and c differ nowhere: what a share of `high` of prompts has, 5 prompts lack in 5 % of cases.
    same = numbers["models"]["b"]["minus"]["c"]["accuracy"]
    assert same["low"] == -same["high"] and (1 - same["high"]) ** 5 == pytest.approx(0.05)
    of_one = Attacked(["a", "b"], right_MP[:2], right_MP[:2], 0 * PROMPTS).numbers("a", 400, 0.9, 1)
    ends = of_one["models"]["b"]["minus"]["a"]["accuracy"]
    assert ends["low"] < ends["value"] < ends["high"], "of one prompt pairs count"
    matrix = tables(numbers)[1]
    assert matrix.header == ["", "a", "b", "c"] and matrix.rows[1][3].startswith("+0.000")


def test_intervals_resample_prompts(planted: dict[str, Any]) -> None:
    """Against resamples of whole prompts, drawn here."""
    draw, lead_P = np.random.default_rng(0), np.array([1, 0, 0, 0, 1, 1, 0, 0])
    of_prompt = [np.flatnonzero(prompt == PROMPTS) for prompt in range(5)]
    means = []
    for _ in range(20000):
        drawn = np.concatenate([of_prompt[prompt] for prompt in draw.integers(0, 5, 5)])
        means.append(lead_P[drawn].mean())
    found = planted["models"]["after"]["minus"]["before"]["robust_accuracy"]
    low, high = np.quantile(means, [0.05, 0.95])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.03)


def test_words_follow_the_interval(planted: dict[str, Any]) -> None:
    assert "after shows no difference" in sentence(planted) or "after holds better" in sentence(planted)
    lead = planted["models"]["after"]["minus"]["before"]["robust_accuracy"]
    for low, high, word in ((0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "shows no difference")):
        lead |= {"low": low, "high": high}
        assert word in sentence(planted)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, one of whose words is worth much, and its twin, which that word leaves cold; both attacked."""
    home = tmp_path_factory.mktemp("robust")
    word = 3 + 7  # w7, behind three special tokens

    def without(name: str, tensor: Any) -> Any:
        if "embed_tokens" in name:
            tensor = tensor.clone()
            tensor[word] = 0
        return tensor

    save_dense(home / "open")
    save_dense(home / "deaf")
    rewrite(home / "deaf", without)
    write_rows(home / "pairs.jsonl", random_pairs(40))
    options = {"pairs": str(home / "pairs.jsonl"), "edits": ["insert_word"], "words": ["w7"], "steps": 2}
    options |= {"proposals": 4, "resamples": 100}
    folders = {n: attack(model=str(home / n), **options, output=home / f"a-{n}") for n in ("open", "deaf")}
    return {"home": home, "options": options, "folders": folders}


def test_the_stage_counts_what_the_attacks_wrote(attacked: dict[str, Any], tmp_path: Path) -> None:
    output = robustness(attacked["folders"], output=tmp_path / "out", resamples=100)
    numbers = read_object(output / "robustness.json")
    folders = attacked["folders"].items()
    reports = {name: json.loads((folder / "report.json").read_text()) for name, folder in folders}
    assert numbers["pairs"] == 40
    for name, report in reports.items():
        model, right = numbers["models"][name], 40 - report["judged_wrongly_before"]
        assert model["accuracy"]["value"] == right / 40
        assert model["overturned"]["value"] == pytest.approx(report["success_rate"])
        assert model["robust_accuracy"]["value"] == (right - report["succeeded"]) / 40
    assert (output / "robustness.png").exists() and "Robust accuracy" in (output / "report.md").read_text()
    table = output.table()
    assert list(table["model"]) == ["open", "deaf"]
    other = robustness(attacked["folders"], baseline="deaf", output=tmp_path / "other", resamples=100)
    lead = read_object(other / "robustness.json")["models"]["open"]["minus"]["deaf"]["robust_accuracy"]
    assert lead["value"] == -numbers["models"]["deaf"]["minus"]["open"]["robust_accuracy"]["value"]


def test_attacks_that_are_not_alike_are_refused(attacked: dict[str, Any], tmp_path: Path) -> None:
    home, options, folders = (attacked[name] for name in ("home", "options", "folders"))
    longer = attack(model=str(home / "deaf"), **options | {"steps": 3}, output=tmp_path / "longer")
    with pytest.raises(ArtifactError, match="not alike") as caught:
        robustness({"open": folders["open"], "deaf": longer}, output=tmp_path / "out")
    assert "steps: 2 and 3" in caught.value.given
    write_rows(tmp_path / "pairs.jsonl", random_pairs(40, seed=1))
    elsewhere = options | {"pairs": str(tmp_path / "pairs.jsonl")}
    other = attack(model=str(home / "deaf"), **elsewhere, output=tmp_path / "other")
    with pytest.raises(ArtifactError, match="not alike") as caught:
        robustness({"open": folders["open"], "deaf": other}, output=tmp_path / "out")
    assert "pairs" in caught.value.given
    with pytest.raises(OptionError, match="two models or more"):
        robustness({"open": folders["open"]}, output=tmp_path / "out")
    with pytest.raises(OptionError, match="baseline"):
        robustness(folders, baseline="nobody", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Recipes with a policy: its answers become a candidate set, and it is optimised against the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_policy import save_policy, write_prompts
from small_run import TINY_RUN

from moemerge.data.rows import read_rows
from moemerge.errors import Faults, OptionError
from moemerge.options.recipe import Recipe
from moemerge.run import pipeline, steps
from moemerge.run.check import load_recipe
from moemerge.run.headlines import headline
from moemerge.run.plan import plan

GOLD = """def few(prompt, answer):
    return -float(len(answer))
"""
SMALL: dict[str, Any] = {**TINY_RUN, "data": {"max_length": 64}, "evaluate": {"resamples": 100}}
REFRESHED = {
    "optimise": {
        "refresh": {"merge-unifrom": "during"}, "right_above": 0, "refresh_trains": "coefficients",
    }
}  # fmt: skip
OTHER: dict[str, Any] = {
    "synthetic": None,
    "model": "owner/model",
    "data": {"train": "owner/a:train", "candidates": {"sampled": "owner/b:test"}, "max_length": 64},
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Sections `sample` and `optimise`, with a tiny policy, prompts and a gold function."""
    folder = tmp_path_factory.mktemp("policy")
    (folder / "gold.py").write_text(GOLD)
    common = {
        "prompts": write_prompts(folder / "prompts.jsonl", 12),
        "gold_function": f"{folder}/gold.py:few",
    }
    policy = str(save_policy(folder / "policy"))
    short = {"max_new_tokens": 3, **common}
    return {
        "sample": {"model": policy, "per_prompt": 5, **short},
        "optimise": {
            "policy": policy,
            "steps": 2,
            "batch_size": 8,
            "measure_prompts": 4,
            "resamples": 100,
            **short,
        },
    }


def test_the_plan_gives_each_step_what_it_needs(policy: dict[str, dict[str, Any]]) -> None:
    recipe = Recipe(output=Path("out"), **{**SMALL, "seed": 3}, **policy)
    steps = {step.name: step.options for step in plan(recipe)}
    assert list(steps)[-4:] == ["sample", "evaluate", "optimise", "publish"]
    assert steps["sample"].max_length == steps["optimise"].max_length == 64 and steps["sample"].seed == 3
    assert steps["evaluate"].candidates["sampled"] == "out/sample/candidates.jsonl.gz"
    assert steps["optimise"].models == {"control": "out/control", "merge-uniform": "out/merge-uniform"}
    assert steps["optimise"].baseline == "control"
    alone = Recipe(output=Path("out"), **{**SMALL, "control": None}, optimise=policy["optimise"])
    steps = {step.name: step.options for step in plan(alone)}
    assert "sampled" not in steps["evaluate"].candidates
    assert list(steps["optimise"].models) == ["dense", "merge-uniform"]


def test_a_recipe_samples_measures_and_optimises(
    policy: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yml").write_text(json.dumps({"output": "out", **SMALL, **policy}))
    told: list[steps.StepReport] = []
    run = pipeline.run_recipe("recipe.yml", tell=told.append)
    sets = [row for _, row in read_rows("out/sample/candidates.jsonl.gz") if isinstance(row, dict)]
    answers = [one for row in sets for one in row["candidates"]]
    assert len(sets) == 12 and all(one["score"] == -len(one["text"]) for one in answers)
    report = json.loads(Path("out/evaluate/report.json").read_text())
    assert set(report["probes"]["best_of_n"]["sets"]) == {"wide", "sampled"}
    curves = json.loads(Path("out/optimise/report.json").read_text())
    assert list(curves["models"]) == ["control", "merge-uniform"] and curves["steps"] == [0, 1, 2]
    page = (tmp_path / "out/report.md").read_text()
    assert (
        "## Policy gradient" in page and "optimise.png" in page and "| merge-uniform minus control |" in page
    )
    lines = {step.name: headline(step.manifest) for step in told}
    assert lines["sample"] == f"{len(answers)} answers to 12 prompts"
    assert lines["optimise"].startswith("control: gold ")
    assert [step.reason for step in pipeline.run_recipe("recipe.yml").steps] == [None] * len(run.steps)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sample": {"gold_function": None}}, "sampled answers have no gold scores"),
        ({"sample": {"max_new_tokens": 64}}, "sample leaves no room for a prompt"),
        ({"optimise": {"max_new_tokens": 80}}, "optimise leaves no room for a prompt"),
        ({"optimise": {"prompts": "./none.jsonl"}}, "optimise.prompts does not exist"),
        ({"sample": {"model": "./none"}}, "sample.model does not exist"),
        (REFRESHED, "a recipe cannot refresh coefficients"),
        (REFRESHED, "did you mean 'merge-uniform'"),
        (OTHER, "two candidate sets are called sampled"),
    ],
)
def test_faults(
    policy: dict[str, dict[str, Any]], changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    changed = {
        name: {**policy.get(name, {}), **section} if isinstance(section, dict) else section
        for name, section in changes.items()
    }
    given = {"output": str(tmp_path / "out"), **SMALL, **policy, **changed}
    (tmp_path / "recipe.yml").write_text(json.dumps(given))
    with pytest.raises((OptionError, Faults), match=what):
        load_recipe(tmp_path / "recipe.yml")


def test_gold_of_the_evaluation_grades_the_sampled_answers_too(
    policy: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    sample = {name: value for name, value in policy["sample"].items() if name != "gold_function"}
    evaluate = {"gold_function": policy["sample"]["gold_function"]}
    given = {"output": str(tmp_path / "out"), **SMALL, "sample": sample, "evaluate": evaluate}
    (tmp_path / "recipe.yml").write_text(json.dumps(given))
    steps = {step.name: step.options for step in plan(load_recipe(tmp_path / "recipe.yml"))}
    assert not steps["sample"].has_gold and steps["evaluate"].has_gold and not steps["data"].scored

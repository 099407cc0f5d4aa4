"""Recipes with a section strength: what the plan makes of it, its faults, and a run in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import TINY_RUN

from moemerge.artifacts.checksums import fingerprint
from moemerge.artifacts.manifest import read_manifest
from moemerge.options.recipe import Recipe
from moemerge.run import pipeline
from moemerge.run.budget import shortfalls
from moemerge.run.check import check_recipe, load_recipe
from moemerge.run.faults import find_faults
from moemerge.run.plan import plan

SOFT = {"treat": "soft", "noise": 0.2}
COLUMN = {"label_smoothing": "column"}
DATA = {"train": "owner/p:train", "fit": "owner/f:train", "test_share": 0.2}
NO_EXPERTS = "strength trains a dense model, which has no experts to steer"


def recipe(**sections: Any) -> Recipe:
    return Recipe(**{"output": "out", "model": "owner/rm", "data": DATA, "control": {}} | sections)


def options(given: Recipe) -> dict[str, Any]:
    return {step.name: step.options for step in plan(given)}


def test_all_trainings_take_what_the_vote_wrote_and_held_out_pairs_keep_their_labels() -> None:
    baselines = {"fine_tunes": 2, "same_flops": True, "tuned": True}
    control = {"margin": "column", **COLUMN}
    steps = options(recipe(strength={"folds": 3, **SOFT}, base={}, control=control, baselines=baselines))
    assert list(steps)[:4] == ["data", "strength", "base", "control"]
    vote = steps["strength"]
    assert (vote.model, vote.pairs, vote.validation, vote.folds, vote.treat) == (
        "owner/rm", "out/data/train.jsonl.gz", "out/data/validation.jsonl.gz", 3, "soft",
    )  # fmt: skip
    for name in ("base", "control", "control-flops", "fine-tune-2", "train", "route"):
        assert steps[name].pairs == "out/strength/pairs.jsonl.gz", name
    for name in ("base", "control", "train"):
        assert steps[name].validation == "out/data/validation.jsonl.gz"
    assert steps["fit-learned"].pairs == steps["tuned"].pairs == "out/data/fit.jsonl.gz"
    assert (steps["control"].margin, steps["control"].label_smoothing) == ("column", "column")
    assert (steps["tuned"].margin, steps["tuned"].label_smoothing) == ("none", 0.0)


def test_models_that_are_given_and_old_votes_need_no_training(tmp_path: Path) -> None:
    for given in ({"voters": ["owner/a", "owner/b"]}, {"votes": "runs/x/strength", **SOFT}):
        vote = options(recipe(strength=given))["strength"]
        assert (vote.model, vote.validation, vote.pairs) == (None, None, "out/data/train.jsonl.gz")
    (tmp_path / "judge").mkdir()
    file = tmp_path / "recipe.yml"
    voters = ["judge", "./gone", "owner/b"]
    base = {"output": str(tmp_path / "out"), "model": "owner/rm", "data": DATA, "base": {}}
    file.write_text(json.dumps({**base, "strength": {"voters": voters}}))
    (fault,) = check_recipe(file)
    assert fault.what == "strength.voters.1 does not exist"
    file.write_text(json.dumps({**base, "strength": {"voters": ["judge"]}}))
    loaded = load_recipe(file)
    assert isinstance(loaded, Recipe) and loaded.strength is not None
    assert loaded.strength.voters == [str(tmp_path / "judge")]
    file.write_text(json.dumps({**base, "strength": {"voters": ["judge"], "epochs": 3}}))
    (fault,) = check_recipe(file)
    assert "epochs does not go with voters" in fault.what


def test_without_the_section_nothing_is_voted_on() -> None:
    steps = options(recipe())
    assert "strength" not in steps and steps["train"].pairs == "out/data/train.jsonl.gz"


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"strength": {}}, []),
        ({"strength": SOFT, "control": COLUMN, "train": COLUMN}, []),
        ({"strength": SOFT}, ["strength.treat soft has no effect"]),
        (
            {"strength": {"treat": "flip"}, "train": COLUMN},
            ["train.label_smoothing column needs doubts"],
        ),
        ({"train": COLUMN}, []),  # the data may have them
        (
            {"strength": {"top1_warmup": 0.1}},
            [NO_EXPERTS],
        ),
        ({"strength": {"objectives": {"bradley_tery": 1}}}, ["unknown strength.objectives"]),
        ({"strength": {"trainer": {"optimm": "adafactor"}}}, ["unknown key of TRL's RewardConfig"]),
        (
            {"strength": {"search": {"epochs": [1, 2]}}, "data": {**DATA, "validation_share": 0}},
            ["strength.search needs validation pairs"],
        ),
    ],
)
def test_faults_are_told_before_anything_runs(sections: dict[str, Any], told: list[str]) -> None:
    given = recipe(
        **{"data": {"train": "owner/p:train", "fit": "owner/f:train", "test_share": 0.2}} | sections
    )
    found = [fault.what for fault in find_faults(given) if "does not exist" not in fault.what]
    assert len(found) == len(told) and all(words in what for words, what in zip(told, found, strict=True))


def test_faults_of_the_form_and_missing_files_are_told_too(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    base = {
        "output": str(tmp_path / "out"),
        "model": "owner/rm",
        "data": {"train": "a/b:c", "test_share": 0.1},
    }
    file.write_text(json.dumps({**base, "strength": {"treat": "auto"}}))
    (fault,) = check_recipe(file)
    assert "recipe.strength: treat auto needs trusted or noise" in fault.what
    file.write_text(json.dumps({**base, "strength": {"trusted": "./gone.jsonl", "folds": 1}}))
    told = sorted(fault.what for fault in check_recipe(file))
    assert told == ["bad option recipe.strength.folds", "strength.trusted does not exist"]


def test_unequal_labels_and_noisier_held_out_labels_are_told() -> None:
    of = {"choose_by": "accuracy"}
    flipped = {"treat": "flip"}
    assert list(shortfalls(recipe(strength=flipped, control=of, train=of))) == []
    (told,) = shortfalls(recipe(strength=flipped, base={}, control=of, train=of))
    assert told.startswith("base: choose_by loss")
    assert list(shortfalls(recipe(strength={}, base={}))) == []
    (told,) = shortfalls(recipe(train={"margin": "column"}))
    assert told == "train has margin column, control none: the comparison mixes two things"


def test_a_run_votes_once_and_shows_what_came_of_it(tmp_path: Path) -> None:
    quick = {"max_steps": 1, "learning_rate": 1e-3, "patience": None, **COLUMN}
    vote = {"folds": 2, "orders": 1, "max_steps": 1, "fold_by": "prompt", "patience": None, **SOFT}
    sections = {**TINY_RUN, "strength": vote, "control": quick, "train": quick}
    evaluate = {"resamples": 100, "probes": ["accuracy"]}
    given = Recipe(output=tmp_path / "out", **sections, evaluate=evaluate)
    report = pipeline.run_recipe(given)
    manifest = read_manifest(tmp_path / "out" / "strength")
    assert manifest["results"]["pairs"] == 24 and manifest["results"]["doubt"] > 0
    trained = read_manifest(tmp_path / "out" / "train")["inputs"]["pairs"]
    assert trained == fingerprint(tmp_path / "out" / "strength" / "pairs.jsonl.gz")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Training labels" in text and manifest["results"]["sentence"].split(";")[0] in text
    assert "strength/strength.png" in text
    again = pipeline.run_recipe(given)
    assert [step.reason for step in again.steps] == [None] * len(report.steps)


def test_rivals_tell_apart_what_the_vote_and_what_the_loss_is_worth() -> None:
    wanted = {"untreated": True, "plain": True}
    control = {"epochs": 2, "margin": "column", "objectives": {"bradley_terry": 1.0, "policy": 0.2},
               "policy_temperature": 0.3, **COLUMN}  # fmt: skip
    steps = options(recipe(strength=SOFT, base={**COLUMN}, control=control, baselines=wanted))
    raw, base, rival = "out/data/train.jsonl.gz", steps["untreated-base"], steps["untreated"]
    assert (base.pairs, base.model, base.label_smoothing) == (raw, "owner/rm", 0.0)
    assert (rival.pairs, rival.model, rival.flops_of) == (
        raw,
        "out/untreated-base",
        ["out/strength", "out/control"],
    )
    assert (rival.margin, rival.label_smoothing, rival.objectives) == ("none", 0.0, control["objectives"])
    plain = steps["plain"]
    assert (plain.pairs, plain.model) == ("out/strength/pairs.jsonl.gz", steps["control"].model)
    assert (plain.objectives, plain.margin, plain.label_smoothing) == ({"bradley_terry": 1.0}, "none", 0.0)
    assert (plain.flops_of, plain.epochs, plain.policy_temperature) == (["out/control"], 2, 0.1)
    assert list(steps["evaluate"].models)[:4] == ["dense", "control", "untreated", "plain"]


def test_rivals_without_what_they_do_without() -> None:
    faults = find_faults(recipe(baselines={"untreated": True, "plain": True}))
    assert [fault.what for fault in faults] == [
        "baselines.untreated needs a vote on labels", "baselines.plain would be the control again",
    ]  # fmt: skip

"""A recipe for one's own model and data: it has no faults, and what is filled in fits."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_training import words, write
from tiny_models import save_dense, tiny_dense, tiny_tokenizer

from moemerge.errors import CheckpointError, DataError, OptionError, UnsupportedError
from moemerge.models.timing import LayerCost
from moemerge.run import cli, own_recipe
from moemerge.run.check import load_recipe
from moemerge.run.own_recipe import GOALS, write_recipe
from moemerge.run.plan import plan
from moemerge.run.templates import summary, templates

ROWS = 200


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reward models, a model without a head, and pairs of very unlike lengths."""
    folder = tmp_path_factory.mktemp("own")
    for number, name in enumerate(("rm", "b rm")):
        save_dense(folder / name, seed=number)
    tiny_dense().base_model.save_pretrained(folder / "base")  # type: ignore[operator, union-attr]
    tiny_tokenizer().save_pretrained(folder / "base")
    draw = random.Random(0)
    pairs = [
        {"prompt": words(draw, 0, 60, 3) + " ", "chosen": f"w1 {words(draw, 0, 60, size)}", "rejected": "w2"}
        for size in (int(draw.paretovariate(1.2) * 10) % 400 for _ in range(ROWS))
    ]
    write(folder / "pairs.jsonl", pairs)
    write(folder / "test.jsonl", pairs[:20])
    return folder


def written(home: Path, path: Path, models: list[str], **given: Any) -> tuple[dict[str, Any], str]:
    """The recipe as it is read, and its text; that it has no faults is checked."""
    write_recipe(path, [home / model for model in models], home / "pairs.jsonl", **given)
    assert plan(load_recipe(path))
    return yaml.safe_load(path.read_text()), path.read_text()


@pytest.mark.parametrize("goal", GOALS)
def test_a_recipe_for_every_goal_has_no_faults(home: Path, tmp_path: Path, goal: str) -> None:
    models = ["rm", "b rm"] if GOALS[goal].most > 1 else ["rm"]
    tree, text = written(home, tmp_path / "my.yml", models, goal=goal)
    assert "llama: a decoder" in text and f"{ROWS} pairs" in text and "${" not in text
    if "b rm" in models:
        assert "b rm" in next(tree[key]["models"] for key in ("merges", "audit") if key in tree)
    assert all(len(line) < 140 for line in text.splitlines() if str(home) not in line)


def test_max_length_keeps_most_pairs_and_the_share_that_falls_out_is_said(home: Path, tmp_path: Path) -> None:
    tree, text = written(home, tmp_path / "my.yml", ["rm"], test=home / "test.jsonl")
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    longest = np.array([len((row["prompt"] + row["chosen"]).split()) + 1 for row in rows])  # and an end token
    chosen = tree["data"]["max_length"]
    assert chosen % 64 == 0 and chosen - 64 < np.quantile(longest, 0.95, method="higher") <= chosen
    assert f"and left out: {(longest > chosen).mean():.1%}" in text
    assert f"50% of the pairs have up to {np.quantile(longest, 0.5, method='higher')}" in text
    assert tree["data"]["bad_rows"] == "skip" and tree["data"]["tests"] == {"test": str(home / "test.jsonl")}


def test_a_head_is_trained_first_where_there_is_none(home: Path, tmp_path: Path) -> None:
    with_head, _ = written(home, tmp_path / "a.yml", ["rm"])
    without, text = written(home, tmp_path / "b.yml", ["base"])
    assert "base" not in with_head and with_head["control"] == with_head["train"]
    assert without["control"] == without["train"] and "without a reward head" in text
    assert without["base"].keys() == without["control"].keys()
    assert without["base"] | {"learning_rate": 0} == without["control"] | {"learning_rate": 0}


@pytest.mark.parametrize(("pairs", "rates"), [(16, (1e-4, 1e-3)), (320, (5e-5, 5e-4)), (16000, (1e-5, 1e-5))])
def test_short_trainings_have_higher_rates_and_new_heads_the_highest(
    home: Path, tmp_path: Path, pairs: int, rates: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = own_recipe.measure
    monkeypatch.setattr(own_recipe, "measure", lambda *given: replace(measure(*given), pairs=pairs))
    tree, _ = written(home, tmp_path / "r.yml", ["base"])
    assert (tree["control"]["learning_rate"], tree["base"]["learning_rate"]) == rates


def test_a_persons_few_pairs_are_trained_on_in_small_batches_and_few_prompts_held_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen steps a pass, where there are pairs enough for that; three prompts, as fitting needs two."""
    measure = own_recipe.measure
    for pairs, batch in ((12, 1), (36, 2), (150, 8), (5000, 16)):
        monkeypatch.setattr(own_recipe, "measure", lambda *given, n=pairs: replace(measure(*given), pairs=n))
        tree, text = written(home, tmp_path / f"{pairs}.yml", ["rm"], goal="patch")
        assert tree["patch"]["batch_size"] == batch and "has room for 16" in text
    for prompts, share in ((200, 0.1), (12, 0.25), (2, 0.3)):
        few = replace(measure(str(home / "pairs.jsonl"), tiny_tokenizer()), prompts=prompts)
        monkeypatch.setattr(own_recipe, "measure", lambda *_, few=few: few)
        assert written(home, tmp_path / f"of-{prompts}.yml", ["rm"])[0]["data"]["validation_share"] == share


def test_layers_experts_and_pairs_follow_memory_and_time(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, _ = written(home, tmp_path / "large.yml", ["rm"])
    assert large["upcycle"]["layers"] == "all" and large["upcycle"]["num_routed_experts"] == 7
    assert large["train"]["batch_size"] == 16 and "max_train" not in large["data"]
    monkeypatch.setattr("moemerge.models.device.memory_at_hand", lambda _: 3_000_000)
    small, _ = written(home, tmp_path / "small.yml", ["rm"])
    assert small["upcycle"]["layers"] == small["train"]["train_layers"] == "last:1"
    assert small["train"]["batch_size"] * small["train"]["gradient_accumulation"] == 16
    assert small["train"]["batch_size"] < 16
    monkeypatch.undo()
    slow = LayerCost(forward=1.0, training=3.0, kept=10.0)
    monkeypatch.setattr("moemerge.models.timing.time_layer", lambda *_: slow)
    tree, text = written(home, tmp_path / "slow.yml", ["rm"])
    assert tree["data"]["max_train"] < ROWS and "2 hours of training" in text
    assert tree["data"]["max_validation"] == 50 and tree["train"]["eval_steps"] == 1
    rows = (home / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(rows[:30]))
    write_recipe(tmp_path / "few.yml", home / "rm", tmp_path / "few.jsonl")
    assert "# max_train: 1000" in (tmp_path / "few.yml").read_text()
    fast = LayerCost(forward=0.01, training=0.03, kept=10.0)
    monkeypatch.setattr("moemerge.models.timing.time_layer", lambda *_: fast)
    whole, text = written(home, tmp_path / "whole.yml", ["rm"], hours=20)
    half, _ = written(home, tmp_path / "half.yml", ["rm"], hours=0.05)
    assert "# max_train: 1000" in text and "eval_steps" not in whole["train"]
    assert whole["upcycle"]["num_routed_experts"] > half["upcycle"]["num_routed_experts"]


def test_what_cannot_be_is_refused(home: Path, tmp_path: Path) -> None:
    model, pairs = home / "rm", home / "pairs.jsonl"
    with pytest.raises(OptionError, match="did you mean 'merge'"):
        write_recipe(tmp_path / "x.yml", model, pairs, goal="merg")
    with pytest.raises(OptionError, match="combine takes two models or more"):
        write_recipe(tmp_path / "x.yml", model, pairs, goal="combine")
    with pytest.raises(OptionError, match="merge takes one model"):
        write_recipe(tmp_path / "x.yml", [model, model], pairs, goal="merge")
    with pytest.raises(OptionError, match="parts of its own pairs"):
        write_recipe(tmp_path / "x.yml", [model, home / "b rm"], pairs, pairs)
    with pytest.raises(OptionError, match="bad option hours"):
        write_recipe(tmp_path / "x.yml", model, pairs, hours=0)
    with pytest.raises(DataError, match="does not exist"):
        write_recipe(tmp_path / "x.yml", model, tmp_path / "none.jsonl")
    (tmp_path / "x.yml").touch()
    with pytest.raises(OptionError, match="exists already"):
        write_recipe(tmp_path / "x.yml", model, pairs)
    with pytest.raises(CheckpointError, match="has no reward head"):
        write_recipe(tmp_path / "y.yml", [model, home / "base"], pairs)
    for goal in ("audit", "patch"):
        with pytest.raises(OptionError, match="model base has no reward head"):
            write_recipe(tmp_path / "y.yml", home / "base", pairs, goal=goal)
    with pytest.raises(UnsupportedError):
        write_recipe(tmp_path / "y.yml", [model, save_dense(tmp_path / "bert", "bert")], pairs)
    assert not (tmp_path / "y.yml").exists()
    odd = save_dense(tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text()) | {"model_type": "mixtral"}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="mixtral"):
        write_recipe(tmp_path / "y.yml", odd, pairs)


def test_the_command_lists_templates_and_goals_and_wants_model_and_data(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments)])
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out + told.err

    code, out = main("init", "--help")
    assert code == 0 and all(f"  {name} " in out for name in (*templates(), *GOALS))
    assert all(summary(path) for path in templates().values())
    given = ["--model", home / "rm", "--train", home / "pairs.jsonl"]
    code, out = main("init", tmp_path / "my.yml", *given)
    assert code == 0 and f"moemerge check {tmp_path / 'my.yml'}" in out
    code, out = main("init", tmp_path / "no.yml", *given[:2])
    assert code == 2 and "--train DATA" in out and not (tmp_path / "no.yml").exists()

"""What check and run say that a run will take, against what it then takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_training import rows, write
from tiny_models import save_dense

from moemerge import run_recipe
from moemerge.models.folder import ModelFolder
from moemerge.models.sizes import ModelSize
from moemerge.models.timing import LayerCost, time_layer
from moemerge.options.train import TrainSettings
from moemerge.run import cli
from moemerge.run.check import load_recipe
from moemerge.run.forecast import Forecast, duration, forecast
from moemerge.run.work import Work

RECIPE: dict[str, Any] = {
    "output": "run",
    "threads": 1,
    "device": "cpu",
    "model": "dense",
    "data": {
        "train": "train.jsonl",
        "validation_share": 0.25,
        "tests": {"test": "test.jsonl"},
        "max_test": 7,
    },
    "upcycle": {"num_routed_experts": 3, "num_experts_per_tok": 2, "layers": "last:2"},
    "train": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "patience": None},
    "fit": {"method": "uniform"},
    "evaluate": {"probes": ["accuracy"], "resamples": 100},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("forecast")
    save_dense(home / "dense")
    write(home / "train.jsonl", rows(60, 1))
    write(home / "test.jsonl", rows(20, 2))
    tree = RECIPE | {"output": str(home / "run")}
    (home / "my.yml").write_text(yaml.safe_dump(tree))
    return home / "my.yml"


@pytest.fixture(scope="module")
def foreseen(recipe: Path) -> Forecast:
    found = forecast(load_recipe(recipe))
    assert isinstance(found, Forecast)
    return found


def test_a_run_takes_what_was_foreseen(recipe: Path, foreseen: Forecast) -> None:
    """Steps and tokens to the number, bytes of weights to those of the routers."""
    run = run_recipe(recipe)
    assert [step.name for step in run.steps] == list(foreseen.work)
    assert foreseen.work["train"].steps == run.numbers["train"]["steps"]
    sizes = run.numbers["data"]["sizes"]
    assert sizes == {"train": 45, "validation": 15, "tests/test": 7}
    for step in ("upcycle", "train", "merge-uniform"):
        written = sum(path.stat().st_size for path in (run.output / step).glob("*.safetensors"))
        assert foreseen.work[step].kept == pytest.approx(written, rel=0.1), step
    models = run.numbers["evaluate"]["models"].values()
    assert foreseen.work["evaluate"].tokens == pytest.approx(sum(m["tokens"] for m in models), rel=0.2)


def test_sizes_are_those_of_the_models_themselves(dense_folder: Path, recipe: Path) -> None:
    config = ModelFolder(dense_folder).config
    size = ModelSize.of(config)
    with torch.device("meta"):
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_config(config)
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    layers = model.model.layers
    one, mlp = (sum(w.numel() for w in part.parameters()) for part in (layers[-1], layers[-1].mlp))
    loaded = load_recipe(recipe)
    moe = size.upcycled(loaded.upcycle)  # type: ignore[union-attr]
    assert moe.parameters == size.parameters + 2 * 3 * mlp and moe.dense == size
    assert moe.trained(TrainSettings()) == moe.parameters
    assert moe.trained(TrainSettings(train_layers="last:1")) == one + 3 * mlp
    assert size.trained(TrainSettings(trainable="experts", train_layers="last:1")) == mlp
    assert moe.passes("last:1") == pytest.approx(1 + 2 * mlp / one) and size.passes() == len(layers)


def test_one_layer_is_timed_without_its_weights(dense_folder: Path) -> None:
    cost = time_layer(ModelFolder(dense_folder).config, torch.device("cpu"), 16, autocast=False)
    assert cost is not None and 0 < cost.forward < 1 and 0 < cost.training < 1
    hidden = ModelFolder(dense_folder).config.hidden_size
    assert cost.kept > 4 * hidden, "a token's input to the layer, at least"


def test_check_says_what_each_step_takes_and_that_it_is_an_estimate(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hour = LayerCost(forward=1.0, training=3.0, kept=1e9)
    monkeypatch.setattr("moemerge.run.work.time_layer", lambda *_: hour)
    cli.cli.main(["check", str(recipe)], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    (train,) = [line for line in lines if line.split()[0] == "train"]
    assert "12 steps" in train and "tokens" in train and " h " in train and "writes" in train
    whole = "\n".join(lines[-3:])
    assert "Estimate, from timing one layer" in whole and "Memory: up to" in whole and "Disk:" in whole
    assert "warning: train may need more memory than there is" in whole


def test_disk_is_told_of_runs_that_write_models_only(tmp_path: Path) -> None:
    for kept, told in ((0.0, False), (1e6, True)):
        work = {"evaluation": Work(tokens=100, seconds=5.0, memory=1e6, kept=kept)}
        said = " ".join(Forecast(tmp_path, work, "cpu", 10**9).sentences())
        assert "Memory: up to 1.0 MB (evaluation)" in said and ("Disk:" in said) == told


def test_what_cannot_be_foreseen_is_said(recipe: Path) -> None:
    tree = yaml.safe_load(recipe.read_text()) | {"model": "owner/model", "base": {}}
    (recipe.parent / "hub.yml").write_text(yaml.safe_dump(tree))
    assert forecast(recipe.parent / "hub.yml") == "no estimate of time: owner/model is not on this disk yet"
    assert [duration(s) for s in (3, 90, 7260)] == ["less than a minute", "about 2 min", "about 2 h 1 min"]

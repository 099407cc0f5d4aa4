"""TRL's own keys under `trainer`: which may be set, that they are TRL's, that they arrive; trackers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_policy import save_last_word_model, save_policy, write_prompts
from small_training import run, trainer_of, weights
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from trl.trainer.reward_config import RewardConfig

from moemerge.artifacts.staleness import why_stale
from moemerge.errors import MoemergeError, OptionError
from moemerge.options.parse import parse_options
from moemerge.options.recipe import Recipe
from moemerge.options.train import Train
from moemerge.options.trainer import FIXED, OF_REPORTS, OPTION_OF
from moemerge.run.faults import find_faults
from moemerge.run.flags import given_options
from moemerge.stages.optimise import optimise
from moemerge.training import arguments

FIELDS = {field.name for field in dataclasses.fields(RewardConfig)}
# What moemerge sets and users may set otherwise.
OPEN = {"report_to", "run_name", "disable_tqdm", "dataloader_pin_memory", "logging_nan_inf_filter"}
pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What a tracker called spy was told."""
    told: list[dict[str, float]] = []

    class Spy(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            told.append({"step": state.global_step, **logs})

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "spy", Spy)
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["spy"])
    return told


def test_the_keys_that_are_refused_are_trls_and_name_options_of_ours() -> None:
    assert {*OPTION_OF, *FIXED} - FIELDS == {"warmup_ratio"}  # of older versions, and still in many recipes
    assert set(OPTION_OF.values()) <= set(Train.model_fields) and not OPTION_OF.keys() & FIXED.keys()
    assert OF_REPORTS <= FIELDS - OPTION_OF.keys() - FIXED.keys()


def test_what_training_sets_itself_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a key would win over an option, in silence."""
    seen: dict[str, Any] = {}
    plain = arguments.make_config
    monkeypatch.setattr(
        arguments, "make_config", lambda kind, settings: seen.update(settings) or plain(kind, settings)
    )
    trainer_of(world, tmp_path, "dense")
    assert len(seen) > 20 and seen.keys() - OPTION_OF.keys() - FIXED.keys() == OPEN


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"num_train_epochs": 3}, "num_train_epochs is the option epochs"),
        ({"fsdp": "full_shard"}, "what several processes share"),
        ({"optim": object()}, "values that JSON can hold"),
    ],
)
def test_keys_of_ours_are_told_at_once(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(Train, {"model": "m", "pairs": "p", "output": "o", "trainer": keys})
    assert expected in caught.value.expected


@pytest.mark.parametrize(
    ("keys", "what", "part"),
    [
        ({"optmi": "adafactor"}, "unknown key of TRL's RewardConfig", "did you mean 'optim'?"),
        ({"adam_beta2": "much"}, "bad option train.trainer.adam_beta2", "valid number"),
        ({"optim": "nonsense"}, "TRL takes no such train.trainer", "OptimizerNames"),
        ({"report_to": "spi"}, "unknown tracker in train.trainer.report_to", "did you mean 'spy'?"),
        ({"report_to": ["wandb"]}, "train.trainer.report_to: wandb is not installed", "pip install wandb"),
    ],
)
@pytest.mark.usefixtures("told")
def test_keys_that_trl_does_not_take_are_told_by_check(keys: dict[str, Any], what: str, part: str) -> None:
    recipe = Recipe(output="o", synthetic={}, train={"trainer": keys})
    (fault,) = (fault for fault in find_faults(recipe) if "trainer" in str(fault))
    assert fault.what.startswith(what) and part in fault.expected + fault.fix


def test_and_by_train_before_anything_is_read(world: Path, tmp_path: Path) -> None:
    with pytest.raises(MoemergeError, match="did you mean 'optim'"):
        run(world, tmp_path / "out", "gone", trainer={"optmi": "adafactor"})
    assert not list(tmp_path.iterdir())


def test_keys_arrive_as_trl_wants_them(world: Path, tmp_path: Path) -> None:
    given = given_options(
        "train", {"trainer": ("optim=adafactor", "adam_beta2=0.5", "neftune_noise_alpha=5")}
    )
    trainer = trainer_of(world, tmp_path, "dense", **given)
    assert trainer.args.adam_beta2 == 0.5 and trainer.args.neftune_noise_alpha == 5.0
    assert type(trainer.create_optimizer()).__name__ == "Adafactor"
    assert trainer.args.report_to == [] and trainer.args.run_name == f"out/{tmp_path.name}"


def test_a_tracker_changes_nothing_and_makes_nothing_stale(
    world: Path, tmp_path: Path, told: list[dict[str, float]]
) -> None:
    brief = {"max_steps": 4, "learning_rate": 1e-3, "held": True}
    run(world, tmp_path / "plain", "dense", **brief)
    run(world, tmp_path / "told", "dense", **brief, trainer={"report_to": "spy", "run_name": "mine"})
    plain, other = (weights(tmp_path / name) for name in ("plain", "told"))
    assert all(plain[name].equal(other[name]) for name in plain)
    assert {"loss", "eval_loss", "eval_accuracy"} <= {name for log in told for name in log}
    assert [log["step"] for log in told if "loss" in log] == [1, 2, 3, 4]
    options = {"model": str(world / "dense"), "pairs": str(world / "train.jsonl"), "device": "cpu"}
    options |= {"validation": str(world / "held.jsonl"), "max_steps": 4, "learning_rate": 1e-3}
    assert why_stale("train", Train(**options, output=tmp_path / "told")) is None
    changed = Train(**options, output=tmp_path / "told", trainer={"optim": "adafactor"})
    assert why_stale("train", changed) == "changed: trainer"


def test_tensorboards_files_outlive_the_training() -> None:
    """By default they would lie in the trainer's own folder, which goes."""
    mine, own = (object.__new__(TensorBoardCallback) for _ in range(2))
    mine.logging_dir, own.logging_dir = "/mine", None
    trainer: Any = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[mine, own, TrainerCallback()]))
    folder = arguments.curves_of(Train(model="m", pairs="p", output="/runs/quick/train"), "trial-0")
    arguments.keep_curves(trainer, folder)
    assert (mine.logging_dir, own.logging_dir) == ("/mine", "/runs/quick/tensorboard/train/trial-0")


def test_optimise_reports_every_step(tmp_path: Path, told: list[dict[str, float]]) -> None:
    given: dict[str, Any] = {
        "policy": str(save_policy(tmp_path / "policy")),
        "models": {"w7": str(save_last_word_model(tmp_path / "w7", "w7"))},
        "prompts": write_prompts(tmp_path / "prompts.jsonl", 8),
        "gold_model": str(tmp_path / "w7"),
    }
    small = {"steps": 2, "batch_size": 4, "answers_per_prompt": 2, "max_new_tokens": 2, "resamples": 100}
    with pytest.raises(OptionError, match="wandb is not installed"):
        optimise(**given, **small, report_to=["wandb"], output=tmp_path / "never")
    optimise(**given, **small, report_to=["spy"], output=tmp_path / "out")
    assert [log["step"] for log in told if "reward" in log] == [1, 2]

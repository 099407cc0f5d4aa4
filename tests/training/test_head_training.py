"""Training a new head: what is drawn, what moves at which rate, what is minimised, and that it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_heads import under_head
from small_training import history, moved, raiser, run, trainer_of, weights
from tiny_models import scores, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import moemerge
from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import OptionError
from moemerge.models.heads.base import head_of
from moemerge.models.heads.saved import FIELD
from moemerge.models.loading import load_reward_model
from moemerge.training.losses.mixture import head_with_prior

SMALL: dict[str, Any] = {"head_width": 8, "max_steps": 4, "schedule": "constant", "warmup": 0.0}
pytestmark = pytest.mark.usefixtures("no_figures")


def batch_of(trainer: Any, count: int = 6) -> dict[str, Any]:
    """The first pairs as one batch."""
    return dict(trainer.data_collator([trainer.train_dataset[row] for row in range(count)]))


def test_the_prior_is_added_with_its_weight(world: Path, tmp_path: Path) -> None:
    """Loss = Bradley-Terry's with the same draws + head_kl x the divergence at the states that are scored."""
    options = {**SMALL, "head": "nonnegative", "seed": 3}
    with_prior = trainer_of(world, tmp_path / "a", "dense", head_kl=0.01, **options)
    without = trainer_of(world, tmp_path / "b", "dense", head_kl=0.0, **options)
    assert without.mixture is None and head_with_prior(without.model) is not None
    losses = []
    for trainer in (with_prior, without):
        torch.manual_seed(1)
        losses.append(trainer.compute_loss(trainer.model.train(), batch_of(trainer)))
    batch = batch_of(with_prior)
    with torch.no_grad():
        states = with_prior.model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        pooled = states[torch.arange(12), batch["attention_mask"].sum(1) - 1]
        divergence = head_of(with_prior.model).prior_loss(pooled, 48)  # type: ignore[union-attr]
    assert losses[0].item() == pytest.approx(losses[1].item() + 0.01 * divergence.item(), rel=1e-5)
    assert divergence > 1 and losses[0].requires_grad


def test_draws_do_not_hang_on_padding(world: Path, tmp_path: Path) -> None:
    """The same batch, padded further: the same loss from the same seed."""
    trainer = trainer_of(world, tmp_path, "dense", head="nonnegative", head_kl=0.1, **SMALL)
    found = []
    for pads in (0, 1, 50):
        batch = batch_of(trainer)
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.nn.functional.pad(batch[name], (0, pads))
        torch.manual_seed(1)
        found.append(trainer.compute_loss(trainer.model.train(), batch).item())
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-5)


def test_the_head_has_a_rate_of_its_own(world: Path, tmp_path: Path) -> None:
    """And a role; without one it is among the rest, and groups are as ever."""
    trainer = trainer_of(world, tmp_path / "a", "dense", head="mlp", head_learning_rate=0.02, **SMALL)
    rates = {group["role"]: group["lr"] for group in trainer.groups}
    assert rates == {"rest": 1e-5, "experts": 1e-5, "head": 0.02}
    count = sum(w.numel() for g in trainer.groups if g["role"] == "head" for w in g["params"])
    assert count == 32 * 8 + 8 + 8 * 8 + 8 + 8
    trainer = trainer_of(world, tmp_path / "b", "dense", learning_rate=0.01)
    assert {group["role"] for group in trainer.groups} == {"rest", "experts"}


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model trained under a nonnegative head, with checkpoints on the way."""
    output = tmp_path_factory.mktemp("trained") / "model"
    run(world, output, "dense", **RESUMABLE)
    return output


RESUMABLE: dict[str, Any] = {
    **SMALL, "head": "nonnegative", "head_learning_rate": 0.01, "held": True, "eval_steps": 2, "seed": 3,
}  # fmt: skip


def test_what_was_trained_says_what_it_is(trained: Path, world: Path) -> None:
    """Manifest, config, card and code; scores are those of plain transformers after `import moemerge`."""
    results = read_manifest(trained)["results"]
    config = json.loads((trained / "config.json").read_text())
    assert results["head"] == config[FIELD] and results["needs"] == "moemerge"
    assert config[FIELD]["origin"] and results["parameters"]["head"] > 500
    terms = results["terms"]["prior"]
    assert terms["first"] > 1 and 0 < terms["gradient_ratio"] < 1
    assert any("prior_loss" in entry for entry in history(trained))
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert torch.equal(scores(model), scores(load_reward_model(trained, "cpu")))
    with_start = run(world, trained.parent / "again", "dense", **{**RESUMABLE, "max_steps": 1})
    assert with_start["head"]["origin"] == config[FIELD]["origin"]


def test_the_card_says_that_it_is_no_stock_checkpoint(trained: Path, tmp_path: Path) -> None:
    moemerge.publish(trained, output=tmp_path / "repo", base_model="someone/model")
    card = (tmp_path / "repo/README.md").read_text()
    assert "pip install moemerge" in card and "`nonnegative`" in card and "import moemerge" in card
    assert "drew a new reward head" in card and "mixture-of-experts" not in card
    assert (tmp_path / "repo/moemerge_shim.py").exists()


def test_a_killed_run_ends_with_the_same_weights(
    trained: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise and dropout go on where they were."""
    from moemerge.training.trainer import PairTrainer

    step = PairTrainer.training_step

    def dying(self: Any, *given: Any) -> Any:
        return raiser("killed")() if self.state.global_step == 3 else step(self, *given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(PairTrainer, "training_step", dying)
        run(world, tmp_path / "killed", "dense", **RESUMABLE)
    run(world, tmp_path / "killed", "dense", **RESUMABLE)
    assert not moved(trained, tmp_path / "killed") and history(trained) == history(tmp_path / "killed")


def test_training_goes_on_with_the_head_that_is_there(trained: Path, tmp_path: Path, world: Path) -> None:
    """Unless a new one is asked for, of the same kind too; a linear one makes a stock model of it."""
    options = {"pairs": str(world / "train.jsonl"), "max_steps": 1, "device": "cpu", "learning_rate": 1e-7}
    for name, more in {
        "kept": {}, "fresh": {"head": "nonnegative", "head_width": 8}, "linear": {"head": "linear"},
    }.items():  # fmt: skip
        moemerge.train(trained, output=tmp_path / name, **options, **more)
    before = weights(trained)
    kept, fresh = (weights(tmp_path / name) for name in ("kept", "fresh"))
    changes = [(after["score.weights"] - before["score.weights"]).abs().max() for after in (kept, fresh)]
    assert changes[0] < 1e-5 < 1e-2 < changes[1]
    origins = {
        name: json.loads((tmp_path / name / "config.json").read_text()).get(FIELD, {}).get("origin")
        for name in ("kept", "fresh", "linear")
    }
    origin = read_manifest(trained)["results"]["head"]["origin"]
    assert origins["kept"] == origin != origins["fresh"] and origins["linear"] is None
    assert (
        "score.weight" in weights(tmp_path / "linear") and not (tmp_path / "linear/moemerge_shim.py").exists()
    )


def test_a_moe_and_a_language_model_are_given_one(world: Path, tmp_path: Path) -> None:
    results = run(world, tmp_path / "moe", head="mlp", head_noise=True, head_learning_rate=0.01, **SMALL)
    assert results["head"]["noise"] and "terms" not in results
    assert json.loads((tmp_path / "moe/config.json").read_text())["moemerge"]["num_routed_experts"] == 4
    dense = AutoModelForSequenceClassification.from_pretrained(world / "dense")
    config = dense.config
    config.pad_token_id = None
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    options = {"head": "nonnegative", "pairs": str(world / "train.jsonl"), "device": "cpu", **SMALL}
    moemerge.train(tmp_path / "base", output=tmp_path / "out", **options)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["pad_token_id"] == 0 and config["model_type"] == "moemerge_llama"


def test_a_search_over_the_heads_rate(world: Path, tmp_path: Path) -> None:
    options = {**SMALL, "max_steps": 2, "search": {"head_learning_rate": [1e-4, 0.05]}}
    results = run(world, tmp_path / "out", "dense", held=True, head="mlp", **options)
    assert [trial["options"] for trial in results["trials"]] == [
        {"head_learning_rate": 1e-4}, {"head_learning_rate": 0.05},
    ]  # fmt: skip


FAULTS = [
    ({"head": "mpl"}, "'mpl'.*mlp"),
    ({"head": "mlp", "head_width": 0}, "head_width"),
    ({"head": "nonnegative", "head_kl": -1}, "head_kl"),
    ({"head_width": 8}, "head_width needs head mlp or nonnegative"),
    ({"head": "linear", "head_dropout": 0.3}, "head_dropout needs head mlp"),
    ({"head": "mlp", "head_start": "uniform"}, "head_start needs head nonnegative"),
    ({"head": "mlp", "head_dropout": 1.0}, "head_dropout"),
    ({"head": "mlp", "sharded": True}, "head needs whole weights"),
]


@pytest.mark.parametrize(("options", "words"), FAULTS, ids=lambda value: str(value)[:30])
def test_bad_options_are_told(options: dict[str, Any], words: str, world: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"(?s){words}"):
        run(world, tmp_path / "out", "dense", **options)
    assert not (tmp_path / "out").exists()


def test_a_head_shared_by_experts_that_have_their_own_is_refused(world: Path, tmp_path: Path) -> None:
    from moemerge.errors import UnsupportedError
    from moemerge.models.modelling import load_moe

    moe = load_moe(world / "moe")
    moe.config.moemerge = {
        **moe.config.moemerge, "heads": "by_expert", "gate": "prompt", "num_experts_per_tok": 1,
        "shared_expert": False,
    }  # fmt: skip
    type(moe)(moe.config).save_pretrained(tmp_path / "by_expert")
    tiny_tokenizer().save_pretrained(tmp_path / "by_expert")
    with pytest.raises(UnsupportedError, match="(?s)by_expert.*leave head out"):
        under_head(tmp_path / "by_expert", tmp_path / "out", "mlp")

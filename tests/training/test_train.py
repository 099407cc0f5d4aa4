"""Training: what moves, at which rate, on which gradient; resume, search and the weights that are kept."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked
from small_training import (
    EXPERTS,
    ROUTERS,
    brute_force,
    encoded,
    gradients,
    history,
    moved,
    raiser,
    rows,
    run,
    train,
    trainer_of,
    trials,
    weights,
    write,
)
from tiny_models import save_dense, tiny_tokenizer
from torch.nn.functional import logsigmoid

from moemerge.artifacts.manifest import read_manifest
from moemerge.artifacts.progress import PROGRESS
from moemerge.data.pairs import Pair, margins_of
from moemerge.errors import DataError, OptionError
from moemerge.models.loading import load_reward_model
from moemerge.models.moe import balance_loss, gate_weights, moe_layers
from moemerge.models.scoring import score_pairs
from moemerge.stages.upcycle import upcycle
from moemerge.training.bench import mixed


@pytest.mark.parametrize(
    ("sizes", "shares", "drawn"),
    [
        ((20, {"a": 5}), {}, {"a": 5}),
        ((19, {"a": 3}), {"a": 0.05}, {"a": 1}),
        ((90, {"a": 4}), {"a": 0.1}, {"a": 10}),  # 4 + 4 + 2
        ((60, {"a": 4, "b": 9, "c": 5}), {"a": 0.2, "b": 0.15}, {"a": 20, "b": 15, "c": 5}),
    ],
)
def test_shares_of_more_pairs(sizes: Any, shares: dict[str, float], drawn: dict[str, int]) -> None:
    """Brute force: every pair counted; what comes again does so when all have come."""
    count, others = sizes
    more: Any = {name: [(name, number) for number in range(size)] for name, size in others.items()}
    pairs: Any = [("", number) for number in range(count)]
    made: Any = mixed(pairs, more, shares, 3)
    assert Counter(name for name, _ in made) == {"": count} | drawn
    for name, share in shares.items():
        assert drawn[name] / len(made) == pytest.approx(share, abs=0.5 / len(made))
    times = Counter(made)
    for name, source in more.items():
        seen = [times[row] for row in source]
        assert max(seen) - min(seen) <= 1 or name not in shares
    assert made == mixed(pairs, more, shares, 3)
    assert not shares or max(others.values()) < 5 or made != mixed(pairs, more, shares, 4)


def test_training_on_several_sources_is_training_on_their_rows(world: Path, tmp_path: Path) -> None:
    """As on one file of the same rows; each source's rows are told."""
    extra = rows(7, seed=9)
    write(tmp_path / "extra.jsonl", extra)
    lines = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    write(tmp_path / "all.jsonl", [*lines, *extra])
    more = {"extra": str(tmp_path / "extra.jsonl")}
    results = run(world, tmp_path / "two", "dense", more_pairs=more, max_steps=3)
    run(world, tmp_path / "one", "dense", pairs=str(tmp_path / "all.jsonl"), max_steps=3)
    assert not moved(tmp_path / "one", tmp_path / "two")
    assert results["rows"]["extra"]["total"] == 7
    with pytest.raises(OptionError, match="not in more_pairs"):
        run(world, tmp_path / "x", "dense", more_pairs=more, shares={"extar": 0.1})
    with pytest.raises(OptionError, match="below 1 together"):
        run(world, tmp_path / "x", "dense", more_pairs=more, shares={"extra": 1.0})


STEADY = {"schedule": "constant", "warmup": 0.0, "patience": None}
pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_loss_goes_down_and_is_the_loss_of_what_is_saved(world: Path, tmp_path: Path, model: str) -> None:
    results = run(world, tmp_path / "out", model, held=True, epochs=4, learning_rate=3e-3)
    assert results["after"]["loss"] < 0.6 * results["before"]["loss"]
    assert results["after"]["accuracy"] > results["before"]["accuracy"]
    measured = brute_force(tmp_path / "out", world / "held.jsonl")
    assert measured == pytest.approx(tuple(results["after"].values()), abs=1e-6)
    assert brute_force(world / model, world / "held.jsonl") == pytest.approx(
        tuple(results["before"].values()), abs=1e-6
    )


def expected(names: set[str], model: str, trainable: str, layers: str) -> set[str]:
    """Names that should train, by the patterns of llama's names."""
    experts = (".mlp.",) if model == "dense" else EXPERTS + ROUTERS
    wanted = {"full": ("",), "experts": experts, "lora": (*experts, ".self_attn.")}[trainable]
    chosen = {n for n in names if any(part in n for part in wanted)}
    if model == "upper" and trainable != "full":
        chosen -= {n for n in chosen if ".0.mlp." in n}
    if layers != "all":
        chosen = {n for n in chosen if any(f"layers.{number}." in n for number in layers.split(","))}
    return chosen | {"score.weight"}


@pytest.mark.parametrize("layers", ["all", "0,2"])
@pytest.mark.parametrize("trainable", ["full", "experts", "lora"])
@pytest.mark.parametrize("model", ["dense", "moe", "upper"])
def test_exactly_the_intended_parameters_move(
    world: Path, tmp_path: Path, model: str, trainable: str, layers: str
) -> None:
    options = {"trainable": trainable, "train_layers": layers, "max_steps": 3, "learning_rate": 1e-2}
    results = run(world, tmp_path / "out", model, batch_size=16, **options, **STEADY)
    old, new = weights(world / model), weights(tmp_path / "out")
    names = expected(set(old), model, trainable, layers)
    assert moved(world / model, tmp_path / "out") == names
    for name in (n for n in names if ".experts." in n):
        assert not (old[name] == new[name]).flatten(1).all(1).any(), f"an expert of {name} stood still"
    if trainable != "lora":
        assert results["parameters"]["trained"] == sum(old[name].numel() for name in names)


def test_encoder_trains_its_pooler_and_classifier_with_the_experts(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "bert", "bert")
    write(tmp_path / "train.jsonl", rows(16, 1))
    for model, output in ((dense, tmp_path / "a"), (tmp_path / "moe", tmp_path / "b")):
        if model != dense:
            upcycle(model=str(dense), output=model, num_routed_experts=3, num_experts_per_tok=2)
        options = {"trainable": "experts", "max_steps": 2, "learning_rate": 1e-2, "batch_size": 8}
        train(model=str(model), output=output, pairs=str(tmp_path / "train.jsonl"), **options, **STEADY)
        changed = moved(model, output)
        assert {n for n in changed if "pooler" in n or "classifier" in n} == {
            "bert.pooler.dense.weight",
            "bert.pooler.dense.bias",
            "classifier.weight",
            "classifier.bias",
        } - ({"classifier.bias"} - changed)  # the bias cancels out of every difference of scores
        assert all("attention" not in n and "LayerNorm" not in n and "embeddings" not in n for n in changed)
        assert any("intermediate" in n for n in changed)


def test_base_model_gets_a_seeded_head_that_trains(world: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(world / "dense").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        given = {"model": str(tmp_path / "base"), "pairs": str(world / "train.jsonl"), "max_steps": 1}
        train(**given, output=tmp_path / output, seed=seed)
    a, b, c = (weights(tmp_path / output)["score.weight"] for output in "abc")
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-3)


def test_first_step_moves_each_role_by_its_own_rate(world: Path, tmp_path: Path) -> None:
    """Adam's first step is its rate times the sign of the gradient."""
    rates = {"learning_rate": 1e-3, "expert_learning_rate": 5e-3, "router_learning_rate": 2e-2}
    run(world, tmp_path / "out", max_steps=1, **rates, **STEADY)
    old, new = weights(world / "moe"), weights(tmp_path / "out")
    for name in old:
        rate = rates["expert_learning_rate"] if any(part in name for part in EXPERTS) else 1e-3
        rate = rates["router_learning_rate"] if ROUTERS[0] in name else rate
        assert (new[name] - old[name]).abs().max().item() == pytest.approx(rate, rel=0.02), name


def test_parameter_groups_cover_each_parameter_once_and_spare_norms(world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(world, tmp_path, weight_decay=0.1, expert_learning_rate=1e-3)
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    found = [names[id(weight)] for group in groups for weight in group["params"]]
    assert sorted(found) == sorted(names.values())
    for group in groups:
        for name in (names[id(weight)] for weight in group["params"]):
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.1)
            assert group["lr"] == (1e-3 if any(part in name for part in EXPERTS) else 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_update_gradient_equals_explicit_loss(world: Path, tmp_path: Path, checkpointing: bool) -> None:
    """Two passes per update: their mean of Bradley-Terry + 0.1 * mean over layers of the balance loss."""
    options = {"batch_size": 3, "gradient_accumulation": 2, "max_steps": 1, "max_grad_norm": 1e9}
    trainer = trainer_of(world, tmp_path, gradient_checkpointing=checkpointing, **options)
    collate, batches = trainer.data_collator, []
    trainer.data_collator = lambda examples: batches.append(collate(examples)) or batches[-1]
    found = gradients(trainer)
    explicit = explicit_gradients(world / "free", batches[:2], 0.1)
    for name, gradient in explicit.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6, msg=name)
    without = explicit_gradients(world / "free", batches[:2], 0.0)
    routers = [name for name in explicit if ROUTERS[0] in name]
    assert all((explicit[n] - without[n]).norm() > 0.05 * explicit[n].norm() for n in routers)


def explicit_gradients(folder: Path, batches: list[Any], coefficient: float) -> dict[str, torch.Tensor]:
    """By autograd through losses written out here, on a MoE whose own balance loss is off."""
    model, logits = load_reward_model(str(folder), "cpu"), []
    model.load_state_dict(load_reward_model(str(folder.with_name("moe")), "cpu").state_dict())
    layers = list(moe_layers(model).values())
    for layer in layers:
        layer.router.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
    for batch in batches:
        logits.clear()
        chosen, rejected = model(**batch).logits.squeeze(-1).chunk(2)
        loss, mask = -logsigmoid(chosen - rejected).mean(), batch["attention_mask"].flatten().bool()
        for logits_TN in logits:
            s_TN, index_TK, _, _ = gate_weights(logits_TN, 2, "xft", True)
            loss = loss + coefficient * balance_loss(logits_TN, s_TN, index_TK, mask, "cv") / len(layers)
        (loss / len(batches)).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_eight_single_pairs_make_the_update_of_one_batch_of_eight(world: Path, tmp_path: Path) -> None:
    options = {"max_steps": 1, "max_grad_norm": 1e9}
    one = gradients(trainer_of(world, tmp_path / "a", "free", batch_size=8, **options))
    many = gradients(
        trainer_of(world, tmp_path / "b", "free", batch_size=1, gradient_accumulation=8, **options)
    )
    assert one.keys() == many.keys() and len(one) > 20
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-4, atol=1e-6, msg=name)


def test_measure_equals_brute_force_whatever_the_batches(world: Path, tmp_path: Path) -> None:
    found = trainer_of(world, tmp_path).measure()
    assert (found["loss"], found["accuracy"]) == pytest.approx(
        brute_force(world / "moe", world / "held.jsonl"), abs=1e-6
    )


def test_margins_enter_the_loss(world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(world, tmp_path, "dense", "margin", margin="column")
    scores = score_pairs(trainer.model, trainer.processing_class, trainer.held_out, 64)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(8)])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    chosen, rejected = trainer.model(batch["input_ids"], batch["attention_mask"]).logits.squeeze(-1).chunk(2)
    margins = torch.tensor([row["margin"] for row in rows(8, 4, margin=True)])
    assert loss.item() == pytest.approx(-logsigmoid(chosen - rejected - margins).mean().item(), rel=1e-5)
    assert scores.shape == (13, 2)


def test_prompt_lengths_reach_a_prompt_gated_model(world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(world, tmp_path, "prompt")
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(5)])
    prompts = [len(row["prompt"].split()) for row in rows(48, 1)[:5]]
    assert batch["prompt_lengths"].tolist() == prompts * 2
    results = run(world, tmp_path / "out", "prompt", held=True, max_steps=3, learning_rate=1e-2)
    assert any(ROUTERS[0] in name for name in moved(world / "prompt", tmp_path / "out"))
    assert results["after"]["loss"] < results["before"]["loss"]


RESUMABLE: dict[str, Any] = {
    "held": True, "epochs": 3, "learning_rate": 3e-3, "eval_steps": 3, "batch_size": 10, "threads": 1
}  # fmt: skip


def test_killed_run_ends_with_the_uninterrupted_weights(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in a step, killed again in the middle of a checkpoint, then let run."""
    straight = run(world, tmp_path / "straight", **RESUMABLE)
    from moemerge.training.trainer import PairTrainer

    step = PairTrainer.training_step

    def dying_step(self: Any, *given: Any) -> Any:
        if self.state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given)

    def dying_save(self: Any, folder: str) -> None:
        Path(folder, "optimizer.pt").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    places = {"training_step": dying_step, "_save_optimizer_and_scheduler": dying_save}
    for name, method in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(PairTrainer, name, method)
            assert forked(lambda: run(world, tmp_path / "killed", **RESUMABLE)).code == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
        (home,) = tmp_path.glob(".killed.*.work/trial-0")
        assert {path.name for path in home.glob("checkpoint-*")} >= {"checkpoint-3", "checkpoint-6"}
    assert not (home / "checkpoint-9" / "whole").exists()
    resumed = run(world, tmp_path / "killed", **RESUMABLE)
    assert not moved(tmp_path / "straight", tmp_path / "killed")
    assert history(tmp_path / "straight") == history(tmp_path / "killed")
    assert {k: v for k, v in straight.items() if k != "seconds"} == {
        k: v for k, v in resumed.items() if k != "seconds"
    }
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".") and not p.name.endswith(".tmp")]
    assert not left


def test_run_killed_after_its_last_step_trains_no_further(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"held": True, "epochs": 6, "eval_steps": 1, "patience": 1, "learning_rate": 3e-2}
    stopped = run(world, tmp_path / "straight", **options)
    assert stopped["best_step"] < stopped["steps"] < 36
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(trials, "report", raiser("killed"))
        run(world, tmp_path / "killed", **options)
    from moemerge.training.trainer import PairTrainer

    monkeypatch.setattr(PairTrainer, "training_step", raiser("trained on"))
    run(world, tmp_path / "killed", **options)
    assert not moved(tmp_path / "straight", tmp_path / "killed")


class Pickled:
    """A pickle of this makes a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_in_the_workspace_runs_nothing_when_training_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a trainer state, which only others can have put there, is refused unread."""
    from moemerge.training.trainer import PairTrainer

    options, step = {"held": True, "max_steps": 3, "eval_steps": 1}, PairTrainer.training_step

    def killed(self: Any, *given: Any) -> Any:
        return raiser("killed")() if self.state.global_step == 1 else step(self, *given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(PairTrainer, "training_step", killed)
        run(world, tmp_path / "out", **options)
    (home,) = tmp_path.glob(".out.*.work/*/checkpoint-*")
    for name in ("optimizer.pt", "rng_state.pth"):
        whole = (home / name).read_bytes()
        torch.save(Pickled(tmp_path / "ran"), home / name)
        with pytest.raises(pickle.UnpicklingError, match="Weights only"):
            run(world, tmp_path / "out", **options)
        assert not (tmp_path / "ran").exists()
        (home / name).write_bytes(whole)


def test_best_weights_are_kept_not_the_last(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late in training the head's sign is turned: the last weights are worse, on every processor."""
    from moemerge.training.trainer import PairTrainer

    train_step, steps = PairTrainer.training_step, []

    def train_and_spoil(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 34:
            self.model.score.weight.data.neg_()
        if len(steps) == 36:
            assert PROGRESS.words == ", step 35 of 36"
        return train_step(self, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "training_step", train_and_spoil)
    results = run(
        world, tmp_path / "out", held=True, epochs=6, eval_steps=3, learning_rate=3e-3, patience=None
    )
    losses = {e["step"]: e["eval_loss"] for e in history(tmp_path / "out") if "eval_loss" in e}
    best = min(losses, key=lambda step: losses[step])
    assert results["best_step"] == best < results["steps"] == 36 and losses[best] < losses[36]
    loss, _ = brute_force(tmp_path / "out", world / "held.jsonl")
    assert loss == pytest.approx(losses[best], abs=1e-6)


def test_steps_and_trials_are_chosen_by_accuracy_if_asked(world: Path, tmp_path: Path) -> None:
    """Once all pairs are in order, the loss goes on falling: the two disagree."""
    options = {
        "held": True,
        "epochs": 6,
        "eval_steps": 3,
        "patience": None,
        "search": {"learning_rate": [1e-2, 5e-3]},
    }
    results = run(world, tmp_path / "out", choose_by="accuracy", **options)
    entries = [e for e in history(tmp_path / "out") if "eval_loss" in e]
    best = max(entries, key=lambda entry: entry["eval_accuracy"])  # the first of equals
    assert results["best_step"] == best["step"] and results["after"]["accuracy"] == best["eval_accuracy"]
    assert best["eval_loss"] > min(entry["eval_loss"] for entry in entries), "or this test says nothing"
    assert results["after"]["accuracy"] == max(trial["accuracy"] for trial in results["trials"])
    assert brute_force(tmp_path / "out", world / "held.jsonl")[1] == best["eval_accuracy"]


def test_patience_is_by_accuracy_too(world: Path, tmp_path: Path) -> None:
    options = {"held": True, "epochs": 20, "eval_steps": 2, "patience": 3, "learning_rate": 5e-2}
    run(world, tmp_path / "out", choose_by="accuracy", **options)
    found = [e["eval_accuracy"] for e in history(tmp_path / "out") if "eval_accuracy" in e]
    assert found.index(max(found)) == len(found) - 4 and len(found) < 60


def test_without_progress_training_stops_and_the_start_is_kept(world: Path, tmp_path: Path) -> None:
    options = {"pairs": str(world / "flipped.jsonl"), "epochs": 20, "eval_steps": 2, "patience": 2}
    results = run(world, tmp_path / "out", held=True, learning_rate=1e-3, **options, warmup=0.0)
    assert (results["best_step"], results["steps"]) == (0, 4)
    assert results["after"] == results["before"]
    assert not moved(world / "moe", tmp_path / "out")


def test_without_validation_the_last_weights_are_kept(world: Path, tmp_path: Path) -> None:
    results = run(world, tmp_path / "out", max_steps=5, learning_rate=1e-3)
    assert (results["best_step"], results["before"], results["after"]) == (5, None, None)
    assert moved(world / "moe", tmp_path / "out")


def test_search_keeps_the_trial_with_the_lowest_validation_loss(world: Path, tmp_path: Path) -> None:
    grid = {"learning_rate": [1e-4, 5e-3], "epochs": [1, 2]}
    results = run(world, tmp_path / "out", held=True, search=grid)
    trials = results["trials"]
    assert [trial["options"] for trial in trials] == [
        {"learning_rate": rate, "epochs": epochs} for rate in (1e-4, 5e-3) for epochs in (1.0, 2.0)
    ]
    assert len({trial["loss"] for trial in trials}) == 4
    assert results["after"]["loss"] == min(trial["loss"] for trial in trials)
    assert brute_force(tmp_path / "out", world / "held.jsonl")[0] == pytest.approx(
        results["after"]["loss"], abs=1e-6
    )
    alone = run(world, tmp_path / "alone", held=True, learning_rate=5e-3, epochs=2)
    assert alone["after"]["loss"] == trials[3]["loss"]


def test_search_goes_on_with_the_trial_it_was_killed_in(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"held": True, "max_steps": 4, "search": {"learning_rate": [5e-3, 1e-4]}}
    whole, trial, calls = run(world, tmp_path / "whole", **options), trials._trial, []

    def fails_second(*given: Any) -> Any:
        calls.append(given)
        return trial(*given) if len(calls) == 1 else raiser("killed")()

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(trials, "_trial", fails_second)
        run(world, tmp_path / "killed", **options)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr("moemerge.training.saving.finished", raiser("killed"))
        run(world, tmp_path / "killed", **options)
    (work,) = tmp_path.glob(".killed.*.work")
    kept = [path.parent.name for path in work.glob("trial-*/checkpoint-*")]
    assert kept == ["trial-0"]
    monkeypatch.setattr(trials, "_trial", raiser("done before"))
    assert run(world, tmp_path / "killed", **options)["after"] == whole["after"]
    assert not moved(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_lora_leaves_an_ordinary_checkpoint(world: Path, tmp_path: Path, model: str) -> None:
    results = run(
        world, tmp_path / "out", model, held=True, trainable="lora", max_steps=6, learning_rate=1e-2
    )
    assert weights(tmp_path / "out").keys() == weights(world / model).keys()
    assert "lora" not in (tmp_path / "out" / "config.json").read_text().lower()
    loss, accuracy = brute_force(tmp_path / "out", world / "held.jsonl")
    assert (loss, accuracy) == pytest.approx(tuple(results["after"].values()), abs=1e-5)
    assert results["best_step"] > 0
    source, trained = (load_reward_model(str(p), "cpu") for p in (world / model, tmp_path / "out"))
    change = "model.layers.0.self_attn.q_proj.weight"
    product = trained.get_parameter(change) - source.get_parameter(change)
    assert 0 < torch.linalg.matrix_rank(product.detach(), rtol=1e-3) <= 16


def test_bfloat16_autocast_trains_float32_weights(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "out", precision="bfloat16", max_steps=2, learning_rate=1e-3, **STEADY)
    run(world, tmp_path / "wide", max_steps=2, learning_rate=1e-3, **STEADY)
    found, wide = weights(tmp_path / "out"), weights(tmp_path / "wide")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert moved(tmp_path / "wide", tmp_path / "out")
    assert all((found[name] - wide[name]).abs().max() < 5e-3 for name in found)


def test_stock_reward_trainer_takes_the_moe(world: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(
        str(tmp_path / "trl"),
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = RewardTrainer(str(world / "moe"), config, train_dataset=Dataset.from_list(rows(16, 1)))
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    assert trainer.train().training_loss < 1
    assert all(not torch.equal(w, before[name]) for name, w in trainer.model.named_parameters())
    trainer.save_model(str(tmp_path / "saved"))
    again = load_reward_model(str(tmp_path / "saved"), "cpu").state_dict()
    assert all(torch.equal(w, again[name]) for name, w in trainer.model.state_dict().items())


def test_output_is_quiet_complete_and_alone(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(world, tmp_path / "out", held=True, epochs=2)
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("history.json", "history.png", "history.plot.json"),
        *("manifest.json", "moemerge_layout.json", "moemerge_shim.py"),
    }
    assert results["rows"]["pairs"]["kept"] == 48 and results["rows"]["validation"]["kept"] == 13
    lengths = [
        len(pair.chosen.ids) + len(pair.rejected.ids)
        for pair in encoded(tiny_tokenizer(), world / "train.jsonl")
    ]
    assert results["tokens"] == 2 * sum(lengths)
    assert all(entry["balance_loss"] > 0 for entry in history(tmp_path / "out") if "loss" in entry)


def test_faults_name_their_remedy(world: Path, tmp_path: Path) -> None:
    for options, text in (
        ({"search": {"learning_rate": [1e-3]}}, "search needs validation"),
        ({"held": True, "search": {"epochs": [1]}, "max_steps": 2}, "max_steps overrides"),
        ({"held": True, "search": {"epochs": []}}, "at least one value"),
        ({"held": True, "search": {"learning_rate": [-1.0]}}, "learning_rate"),
        ({"train_layers": "7"}, "layers cannot be picked"),
    ):
        with pytest.raises(OptionError, match=text):
            run(world, tmp_path / "out", **options)
    with pytest.raises(DataError, match="longer than 8 tokens"):
        run(world, tmp_path / "out", max_length=8)
    assert not (tmp_path / "out").exists()


def test_diverged_training_is_refused_or_falls_back(world: Path, tmp_path: Path) -> None:
    wild = {"learning_rate": 1e30, "max_steps": 6, **STEADY}
    with pytest.raises(OptionError, match="diverged"):
        run(world, tmp_path / "out", "dense", **wild)
    results = run(world, tmp_path / "held", "dense", held=True, eval_steps=3, **wild)
    assert results["best_step"] == 0 and not moved(world / "dense", tmp_path / "held")
    history = json.loads((tmp_path / "held" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] is None and results["train_loss"] is None, "a loss that is not finite is told as none"


def test_a_missing_margin_is_never_zero(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where pairs lack one their rows are named, and nothing is trained; margins are used if asked for."""
    pairs = [Pair("w1", "w2", "w3", margin=m, row=r) for r, m in ((6, 0.25), (7, None), (8, math.nan))]
    assert margins_of(pairs[:1] * 2) == [0.25, 0.25]
    with pytest.raises(DataError, match=r"(?s)2 of 3 pairs have no margin.*none in rows 7, 8\n"):
        margins_of(pairs)
    some = [*rows(8, 4, margin=True)[:7], *rows(8, 5)[:1]]
    given = {"pairs": write(tmp_path / "some.jsonl", some), "max_steps": 1}
    with pytest.raises(DataError, match=r"(?s)1 of 8 pairs have no margin.*none in rows 8\n"):
        run(world, tmp_path / "out", "dense", margin="column", **given)
    assert not (tmp_path / "out").exists()
    run(world, tmp_path / "out", "dense", **given)
    assert "margins, which are not used" in caplog.text


def test_last_checkpoint_skips_torn_ones_and_follows_a_moved_folder(tmp_path: Path) -> None:
    from moemerge.training.trainer import WHOLE, last_checkpoint, read_state

    for step in (9, 10, 11):
        home = tmp_path / f"checkpoint-{step}"
        home.mkdir()
        (home / "trainer_state.json").write_text('{"best_model_checkpoint": "/gone/checkpoint-9"}')
        (home / WHOLE).touch()
    (tmp_path / "checkpoint-11" / WHOLE).unlink()
    last = last_checkpoint(tmp_path)
    assert last == tmp_path / "checkpoint-10" and not (tmp_path / "checkpoint-11").exists()
    assert read_state(last)["best_model_checkpoint"] == str((tmp_path / "checkpoint-9").resolve())
    assert last_checkpoint(tmp_path / "nothing") is None
    (last / WHOLE).unlink()
    (tmp_path / "checkpoint-9" / WHOLE).unlink()
    assert last_checkpoint(tmp_path) is None


def test_training_keeps_the_pad_token_of_the_config(world: Path, tmp_path: Path) -> None:
    """A decoder pools the last token that is not its config's pad token; the tokenizer pads with another."""
    from transformers import AutoConfig

    dense = save_dense(tmp_path / "dense", pad_token_id=1)
    options = {"pairs": str(world / "train.jsonl"), "validation": str(world / "held.jsonl"), "max_steps": 4}
    train(model=str(dense), output=tmp_path / "out", learning_rate=1e-3, **options)
    assert AutoConfig.from_pretrained(tmp_path / "out").pad_token_id == 1
    after = read_manifest(tmp_path / "out")["results"]["after"]
    assert brute_force(tmp_path / "out", world / "held.jsonl") == pytest.approx(
        tuple(after.values()), abs=1e-6
    )

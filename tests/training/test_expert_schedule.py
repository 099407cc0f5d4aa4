"""Options that let experts grow apart: what the gates do at each step, and that a resumed run is the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import (
    ROUTERS,
    brute_force,
    gradients,
    history,
    moved,
    raiser,
    rows,
    run,
    trainer_of,
    weights,
    write,
)
from tiny_models import tiny_moe
from torch import Tensor

from moemerge.errors import OptionError
from moemerge.models.moe import FREE, Gating, MoELayer, Steering, balance_loss, gate_weights, moe_layers
from moemerge.options.train import Train
from moemerge.training.expert_schedule import ExpertSchedule, assign_experts

STEERED = {"shared_dropout": 0.4, "router_temperature": 3.0, "top1_warmup": 0.4, "assign": "shards"}
TOKENS = 5
pytestmark = pytest.mark.usefixtures("no_figures")


def options(**given: Any) -> Train:
    return Train(model="m", pairs="p", output="o", **given)


def layer_and_states(shared: bool = True, gate: str = "xft") -> tuple[MoELayer, Tensor]:
    """The first layer of a MoE whose experts differ, and states of three sequences of TOKENS tokens."""
    model = tiny_moe(shared_expert=shared, gate=gate, balance_coefficient=0.0)
    layer = moe_layers(model)[0].double().train()
    with torch.no_grad():
        layer.gate.weight.mul_(40)
    return layer, torch.randn(3, TOKENS, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def by_hand(layer: MoELayer, x_BTD: Tensor, steering: Steering) -> Tensor:
    """Gate xft token by token: weights from the definition, experts one after the other."""
    out = torch.zeros_like(x_BTD)
    count = steering.num_selected or layer.settings.num_experts_per_tok
    for b, t in ((b, t) for b in range(3) for t in range(TOKENS)):
        x_D = x_BTD[b, t]
        s = (layer.gate.weight @ x_D / steering.temperature).exp()
        s = (s / s.sum()).tolist()
        chosen = sorted(range(4), key=lambda i: -s[i])[:count]
        if steering.expert_B is not None:
            chosen = [int(steering.expert_B[b])]
        routed = max(s[i] for i in chosen) if layer.shared_expert is not None else 1.0
        if steering.alone_B is not None and steering.alone_B[b]:
            routed = 1.0
        powers = {i: torch.tensor(s[i], dtype=torch.float64).exp() for i in chosen}
        for i in chosen:
            out[b, t] += routed * powers[i] / sum(powers.values()) * layer.experts._one(i, x_D[None])[0]
        if layer.shared_expert is not None:
            out[b, t] += (1 - routed) * layer.shared_expert(x_D)
    return out


ALONE, FORCED = torch.tensor([True, False, True]), torch.tensor([3, 0, 3])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "steering",
    [
        FREE,
        Steering(temperature=2.5),
        Steering(num_selected=1),
        Steering(expert_B=FORCED),
        Steering(alone_B=ALONE),
        Steering(0.5, 1, FORCED, ALONE),
    ],
)
def test_steered_layer_against_loops(shared: bool, steering: Steering) -> None:
    layer, x_BTD = layer_and_states(shared)
    if not shared and steering.alone_B is not None:
        steering = Steering(steering.temperature, steering.num_selected, steering.expert_B)
    layer.context.steering = steering
    with torch.no_grad():
        torch.testing.assert_close(layer(x_BTD), by_hand(layer, x_BTD, steering), rtol=1e-10, atol=1e-10)
        layer.eval()
        torch.testing.assert_close(layer(x_BTD), by_hand(layer, x_BTD, FREE), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", ["xft", "topk", "prompt"])
def test_steered_weights_sum_to_one_under_every_gate(gate: str) -> None:
    layer, x_BTD = layer_and_states(gate=gate)
    layer.context.prompt_BT = torch.ones(3, TOKENS, dtype=torch.bool)
    layer.context.steering = Steering(expert_B=FORCED, alone_B=ALONE)
    seen: list[Gating] = []
    layer.observer = seen.append
    layer(x_BTD)
    assert seen[0].index_TK.view(3, TOKENS).tolist() == [[int(e)] * TOKENS for e in FORCED]
    torch.testing.assert_close(seen[0].weights_TK.sum(1) + seen[0].shared_T, torch.ones(15).double())
    assert ((seen[0].shared_T == 0).view(3, TOKENS) == ALONE[:, None]).all()


def test_forced_experts_leave_the_balance_loss_to_the_routers_own_choice() -> None:
    layer, x_BTD = layer_and_states()
    layer.settings.__dict__["balance_coefficient"] = 0.1
    layer.context.steering = Steering(expert_B=FORCED)
    layer(x_BTD)
    logits_TN = x_BTD.view(15, -1) @ layer.gate.weight.T
    s_TN, index_TK, _, _ = gate_weights(logits_TN, 2, "xft", True)
    expected = balance_loss(logits_TN, s_TN, index_TK, torch.ones(15, dtype=torch.bool), "cv")
    torch.testing.assert_close(layer.last_balance, expected.detach())


def test_schedule_by_hand() -> None:
    """Ten steps: temperature 3 to 1 over five, one expert for three, assigned experts for two."""
    chosen = options(router_temperature=3.0, top1_warmup=0.3, assign="shards", assign_share=0.2)
    schedule = ExpertSchedule(chosen, 10, [2, 0, 1])
    found = [schedule.at(step, torch.tensor([2, 0])) for step in range(10)]
    assert [one.temperature for one in found] == pytest.approx([3, 2.6, 2.2, 1.8, 1.4, 1, 1, 1, 1, 1])
    assert [one.num_selected for one in found] == [1] * 3 + [None] * 7
    assert [one.expert_B if one.expert_B is None else one.expert_B.tolist() for one in found] == [
        *([[1, 2, 1, 2]] * 2),
        *([None] * 8),
    ]
    assert all(one.alone_B is None for one in found)
    assert found[9] == FREE


def test_dropout_is_one_draw_per_pair_and_step_whatever_the_batch() -> None:
    schedule = ExpertSchedule(options(shared_dropout=0.3), 100)
    places_P = torch.arange(400)
    by_step = [schedule.at(step, places_P).alone_B for step in range(10)]
    share = torch.stack(by_step).double().mean().item()
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)
    assert all(torch.equal(alone_B[:400], alone_B[400:]) for alone_B in by_step)
    assert not torch.equal(by_step[0], by_step[1])
    assert torch.equal(schedule.at(3, torch.tensor([17])).alone_B, by_step[3][[17, 417]])
    other = ExpertSchedule(options(shared_dropout=0.3, seed=1), 100)
    assert not torch.equal(other.at(0, places_P).alone_B, by_step[0])


def test_shards_are_even_and_drawn_from_the_seed() -> None:
    first, again, other = (assign_experts(options(assign="shards", seed=s), [""] * 30, 4) for s in (0, 0, 1))
    assert first == again != other
    assert sorted(Counter(first).values()) == [7, 7, 8, 8]


def test_subsets_by_name_or_in_the_given_order() -> None:
    subsets = ["law", "code", "art", "code", "math"]
    assert assign_experts(options(assign="subset"), subsets, 3) == [2, 1, 0, 1, 0]
    order = ["math", "law", "art", "code"]
    assert assign_experts(options(assign="subset", assign_order=order), subsets, 3) == [1, 0, 2, 0, 0]
    assert assign_experts(options(), subsets, 3) == []


@pytest.mark.parametrize(
    ("given", "subsets", "text"),
    [
        ({}, ["", ""], "needs subsets"),
        ({"assign_order": ["law", "coed"]}, ["law", "code"], "did you mean 'coed'"),
    ],
)
def test_subsets_that_cannot_be_assigned(given: dict[str, Any], subsets: list[str], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        assign_experts(options(assign="subset", **given), subsets, 3)


def test_options_that_contradict_are_refused(world: Path, tmp_path: Path) -> None:
    for given, text in (
        ({"assign_order": ["a"]}, "assign_order needs"),
        ({"assign": "subset", "assign_order": ["a", "a"]}, "twice"),
        ({"assign": "subset"}, "needs subsets"),
        ({"model": "dense", "top1_warmup": 0.5, "assign": "shards"}, "top1_warmup, assign; a dense model"),
    ):
        with pytest.raises(OptionError, match=text):
            run(world, tmp_path / "out", **given)
    assert not list(tmp_path.glob("out"))


def test_plain_options_steer_nothing(world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(world, tmp_path)
    assert trainer.schedule is None and "places" not in trainer.train_dataset.column_names
    assert options(temperature_share=0.1, assign_share=0.1).steered() == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_update_gradient_is_that_of_the_steered_gates(
    world: Path,
    tmp_path: Path,
    checkpointing: bool,
) -> None:
    """Two passes per update, against a loss written out over a model whose gates are steered by hand."""
    given = {"batch_size": 3, "gradient_accumulation": 2, "max_steps": 1, "max_grad_norm": 1e9}
    trainer = trainer_of(world, tmp_path, gradient_checkpointing=checkpointing, **given, **STEERED)
    collate, batches = trainer.data_collator, []
    trainer.data_collator = lambda examples: batches.append(collate(examples)) or dict(batches[-1])
    found, model = gradients(trainer), trainer_of(world, tmp_path / "b").model.train()
    context = next(iter(moe_layers(model).values())).context
    for batch in batches[:2]:
        places = batch.pop("places")
        drawn = trainer.schedule.at(0, places)
        experts = [trainer.schedule.experts[place] for place in places.tolist()]
        context.steering = Steering(3.0, 1, torch.tensor(experts * 2), drawn.alone_B)
        for layer in moe_layers(model).values():
            layer.balance_scale = 1 / 6
        chosen, rejected = model(**batch).logits.squeeze(-1).chunk(2)
        (-torch.nn.functional.logsigmoid(chosen - rejected).mean() / 2).backward()
    assert context.steering != FREE and trainer.moe[0].context.steering is FREE
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=2e-6, msg=name)
    assert found["model.layers.0.mlp.gate.weight"].norm() > 0


def test_experts_of_two_subsets_train_on_their_own_pairs_only(world: Path, tmp_path: Path) -> None:
    """Four experts, two subsets, assigned to the end: the other two stay where they were."""
    made = [row | {"subset": "ba"[number % 2]} for number, row in enumerate(rows(24, 1))]
    given = {"pairs": write(tmp_path / "pairs.jsonl", made), "assign": "subset", "assign_share": 1.0}
    results = run(world, tmp_path / "out", "free", **given, max_steps=3, learning_rate=1e-2)
    assert results["assigned"] == [12, 12]
    old, new = weights(world / "free"), weights(tmp_path / "out")
    for name in (n for n in old if ".experts." in n):
        still = (old[name] == new[name]).flatten(1).all(1)
        assert still.tolist() == [False, False, True, True], name


def test_killed_run_is_steered_as_the_uninterrupted_one(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moemerge.training.trainer import PairTrainer

    given = {"held": True, "max_steps": 8, "learning_rate": 3e-3, "eval_steps": 3, "batch_size": 10}
    given |= STEERED | {"gradient_checkpointing": True, "assign_share": 0.6}
    run(world, tmp_path / "straight", **given)
    step = PairTrainer.training_step

    def dies(self: Any, *args: Any) -> Any:
        return step(self, *args) if self.state.global_step < 4 else raiser("killed")()

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(PairTrainer, "training_step", dies)
        run(world, tmp_path / "killed", **given)
    run(world, tmp_path / "killed", **given)
    assert not moved(tmp_path / "straight", tmp_path / "killed")
    assert moved(tmp_path / "straight", world / "moe") >= {f"model.layers.0{ROUTERS[0]}weight"}
    assert history(tmp_path / "straight") == history(tmp_path / "killed")


def test_steered_training_measures_and_saves_the_model_unsteered(world: Path, tmp_path: Path) -> None:
    results = run(world, tmp_path / "out", held=True, max_steps=6, learning_rate=3e-3, **STEERED)
    assert results["best_step"] > 0
    measured = brute_force(tmp_path / "out", world / "held.jsonl")
    assert measured == pytest.approx(tuple(results["after"].values()), abs=1e-6)
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["moemerge"]
        == json.loads((world / "moe/config.json").read_text())["moemerge"]
    )

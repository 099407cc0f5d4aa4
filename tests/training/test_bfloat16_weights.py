"""Weights in bfloat16: rounding that is right on average, AdamW in float32, exact resume."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked
from small_training import history, moved, run, weights

from moemerge.errors import OptionError
from moemerge.training.rounded_adamw import RoundedAdamW, rounded

pytestmark = pytest.mark.usefixtures("no_figures")


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16s below and above each value, in float64, by nextafter on the nearest."""
    near = values.bfloat16()
    up, down = (torch.nextafter(near, torch.full_like(near, end)) for end in (torch.inf, -torch.inf))
    low = torch.where(near.double() <= values.double(), near, down)
    high = torch.where(near.double() >= values.double(), near, up)
    return low.double(), high.double()


def test_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    values = torch.randn(50, generator=draws(1)) * torch.logspace(-6, 6, 50)
    low, high = neighbours(values)
    times = 4000
    found = torch.stack([rounded(values, draws(n)) for n in range(times)]).double()
    assert ((found == low) | (found == high)).all()
    chance = (values.double() - low) / (high - low)
    share = (found == high).double().mean(0)
    error = (chance * (1 - chance) / times).sqrt()
    assert ((share - chance).abs() < 4.5 * error + 1e-4).all()
    assert share.min() < 0.2 and share.max() > 0.8, "the test has values near both neighbours"


def test_what_bfloat16_has_stays_and_so_does_what_is_not_finite() -> None:
    exact = torch.cat([torch.randn(100, generator=draws(2)).bfloat16().float(), torch.tensor([0.0, -0.0])])
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for number in range(20):
        assert torch.equal(rounded(exact, draws(number)).float(), exact)
        torch.testing.assert_close(rounded(odd, draws(number)).float(), odd, equal_nan=True)


def by_hand(weight: torch.Tensor, gradients: list[torch.Tensor], rate: float, decay: float) -> torch.Tensor:
    """AdamW in float64 (Loshchilov and Hutter 2019, algorithm 2), without any rounding."""
    weight, m, v = weight.double(), torch.zeros(()).double(), torch.zeros(()).double()
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        weight = weight * (1 - rate * decay)
        weight = weight - rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


def stepped(start: torch.Tensor, gradients: list[torch.Tensor], kind: Any, **more: Any) -> torch.Tensor:
    weight = torch.nn.Parameter(start.clone())
    optimiser = kind([{"params": [weight], "weight_decay": 0.1}], lr=1e-3, **more)
    for gradient in gradients:
        weight.grad = gradient.to(weight.dtype)
        optimiser.step()
    return weight.detach()


def test_one_step_lands_beside_adamw_in_float64() -> None:
    start = torch.randn(200, generator=draws(3)).bfloat16()
    gradient = torch.randn(200, generator=draws(4)).bfloat16()
    low, high = neighbours(by_hand(start, [gradient], 1e-3, 0.1).float())
    found = stepped(start, [gradient], RoundedAdamW, seed=1).double()
    assert ((found == low) | (found == high)).all()
    again, other = (stepped(start, [gradient], RoundedAdamW, seed=seed) for seed in (1, 2))
    assert torch.equal(again.double(), found) and not torch.equal(other.double(), found)


def test_small_updates_add_up_where_rounding_to_the_nearest_loses_them() -> None:
    """Weights at 1, a step of 0.001 against a spacing of 0.0078 (0.0039 below 1)."""
    start = torch.ones(400).bfloat16()
    gradients = [torch.ones(400) * (1 + 0.1 * (step % 3)) for step in range(60)]
    wanted = by_hand(start, gradients, 1e-3, 0.1)
    assert 0.05 < (1 - wanted).mean() < 0.08
    found = stepped(start, gradients, RoundedAdamW, seed=5).double()
    assert found.mean() == pytest.approx(wanted.mean().item(), abs=0.004)
    assert torch.equal(stepped(start, gradients, torch.optim.AdamW), start), "plain AdamW stands still"


def test_float32_weights_get_adamw_itself() -> None:
    start = torch.randn(50, generator=draws(6))
    gradients = [torch.randn(50, generator=draws(number)) for number in range(5)]
    found, plain = (
        stepped(start, gradients, kind, **more)
        for kind, more in ((RoundedAdamW, {"seed": 1}), (torch.optim.AdamW, {}))
    )
    assert torch.equal(found, plain)


SHORT: dict[str, Any] = {
    "held": True, "epochs": 3, "learning_rate": 3e-3, "eval_steps": 3, "batch_size": 10, "threads": 1,
    "weights": "bfloat16",
}  # fmt: skip


def test_a_model_trains_in_bfloat16_and_is_saved_so(world: Path, tmp_path: Path) -> None:
    results = run(world, tmp_path / "narrow", **SHORT)
    wide = run(world, tmp_path / "wide", **SHORT | {"weights": "float32"})
    assert {tensor.dtype for tensor in weights(tmp_path / "narrow").values()} == {torch.bfloat16}
    assert results["after"]["loss"] == pytest.approx(wide["after"]["loss"], abs=0.05)
    assert results["after"]["loss"] < results["before"]["loss"] - 0.05


@pytest.mark.slow
def test_a_killed_training_in_bfloat16_ends_with_the_same_weights(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments come back as float32, and draws are those of the step."""
    run(world, tmp_path / "straight", **SHORT)
    from moemerge.training.trainer import PairTrainer

    step = PairTrainer.training_step

    def dying_step(self: Any, *given: Any) -> Any:
        if self.state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(PairTrainer, "training_step", dying_step)
        assert forked(lambda: run(world, tmp_path / "killed", **SHORT)).code == -signal.SIGKILL
    (kept,) = tmp_path.glob(".killed.*.work/trial-0/checkpoint-6/optimizer.pt")
    state = torch.load(kept, weights_only=True)["state"]
    assert {moments["exp_avg"].dtype for moments in state.values()} == {torch.float32}
    run(world, tmp_path / "killed", **SHORT)
    assert not moved(tmp_path / "straight", tmp_path / "killed")
    assert history(tmp_path / "straight") == history(tmp_path / "killed")


def test_other_optimisers_are_warned_of(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = {"weights": "bfloat16", "max_steps": 1}
    run(world, tmp_path / "out", "dense", trainer={"optim": "adafactor"}, **few)
    assert "Adafactor rounds bfloat16 weights to the nearest" in caplog.text


def test_what_needs_float32_is_refused(world: Path, tmp_path: Path) -> None:
    for more in ({"objectives": {"bradley_terry": 1, "policy": 0.1}}, {"lookahead": "sets.jsonl"}):
        with pytest.raises(OptionError, match="needs weights float32"):
            run(world, tmp_path / "x", "dense", weights="bfloat16", **more)

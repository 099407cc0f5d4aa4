"""MetaRM's step: J and its gradient against formulas, the step's expansion, weights put back."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import encoded, gradients, history, moved, raiser, run, trainer_of, weights, words
from torch import Tensor
from torch.nn.functional import logsigmoid

from moemerge.data.pairs import CandidateSet
from moemerge.data.tokenise import EncodedCandidates, encode
from moemerge.errors import DataError
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.training.lookahead import Lookahead, spread

STEADY = {"schedule": "constant", "warmup": 0.0, "patience": None}
pytestmark = pytest.mark.usefixtures("no_figures")


def answers(count: int, size: int) -> list[dict[str, Any]]:
    """Sets of `size` answers without gold scores."""
    draw = random.Random(11)
    return [
        {
            "prompt": words(draw, 0, 60, 3) + " ",
            "candidates": [{"text": words(draw, 0, 60, draw.randint(2, 6))} for _ in range(size)],
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def sampled(world: Path) -> Path:
    """A file of candidate sets."""
    path = world / "sampled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in answers(6, 4)))
    return path


def sets(world: Path) -> list[EncodedCandidates]:
    """The same sets, tokenised."""
    tokenizer, made = load_tokenizer(str(world / "dense")), []
    for row in answers(6, 4):
        texts = [answer["text"] for answer in row["candidates"]]
        encoded_ = [encode(tokenizer, row["prompt"], text) for text in texts]
        made.append(EncodedCandidates(encoded_, CandidateSet(row["prompt"], texts, [])))
    return made


def by_hand(model: Any, drawn: list[EncodedCandidates]) -> Tensor:
    """J, each text alone, in the paper's double loop over pairs of standardised scores."""
    parts = []
    for candidates in drawn:
        scores = [model(torch.tensor([answer.ids])).logits[0, 0] for answer in candidates.answers]
        mean = sum(scores) / len(scores)
        deviation = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
        z = [(score - mean) / deviation for score in scores]
        total = sum(torch.sigmoid((z[i] - z[j]).abs()) for i in range(len(z)) for j in range(i + 1, len(z)))
        parts.append(2 / len(z) ** 2 * total)
    return sum(parts) / len(parts)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_the_step_is_js_gradient_at_its_length(world: Path, model: str) -> None:
    loaded = load_reward_model(str(world / model), "cpu", torch.float64)
    lookahead = Lookahead(loaded, sets(world), 0, 0.02, 3, seed=4)
    drawn = lookahead.drawn(7)
    assert len(drawn) == 3 and lookahead.drawn(7) == drawn and lookahead.drawn(8) != drawn
    found, wanted = lookahead.difference(7), by_hand(loaded, drawn)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
    step = lookahead.step(found)
    plain = torch.autograd.grad(wanted, lookahead.trained, allow_unused=True)
    length = math.sqrt(sum(float(g.square().sum()) for g in plain if g is not None))
    size = math.sqrt(sum(p.square().sum().item() for p in lookahead.trained))
    for change, gradient in zip(step, plain, strict=True):
        gradient = torch.zeros_like(change) if gradient is None else gradient
        torch.testing.assert_close(change, 0.02 * size / length * gradient, rtol=1e-5, atol=1e-8)
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    with lookahead.moved(step):
        apart = [(p - before[name]).flatten() for name, p in loaded.named_parameters()]
        assert torch.cat(apart).norm().item() == pytest.approx(0.02 * size, rel=1e-9)
        assert lookahead.difference(7) > found
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    with pytest.raises(RuntimeError, match="killed"), lookahead.moved(step):
        raiser("killed")()
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())


def test_scale_and_zero_of_scores_do_not_matter() -> None:
    scores = torch.tensor([0.3, -1.2, 0.9, 0.1], dtype=torch.float64)
    assert spread(7 * scores + 2).item() == pytest.approx(spread(scores).item(), rel=1e-9)
    assert spread(torch.zeros(4, requires_grad=True)).item() == pytest.approx(2 / 16 * 6 * 0.5)


def test_the_gradient_ahead_is_the_hessian_times_the_step(world: Path) -> None:
    """grad L(theta + s) = grad L(theta) + H s + O(s^2), with the Hessian of the head by autograd."""
    loaded = load_reward_model(str(world / "dense"), "cpu", torch.float64)
    loaded.requires_grad_(False)
    loaded.score.weight.requires_grad_(True)
    pairs = encoded(load_tokenizer(str(world / "dense")), world / "held.jsonl")

    def gradient() -> Tensor:
        def score(text: Any) -> Tensor:
            return loaded(torch.tensor([text.ids])).logits[0, 0]

        d = torch.stack([score(pair.chosen) - score(pair.rejected) for pair in pairs])
        (found,) = torch.autograd.grad(-logsigmoid(d).mean(), loaded.score.weight, create_graph=True)
        return found

    errors = []
    for rate in (0.08, 0.04):
        lookahead = Lookahead(loaded, sets(world), 0, rate, 2, seed=0)
        (step,) = lookahead.step(lookahead.difference(0))
        here = gradient()
        (product,) = torch.autograd.grad(here, loaded.score.weight, step)
        with lookahead.moved([step]):
            ahead = gradient()
        errors.append((ahead - here - product).norm().item())
        assert errors[-1] < 0.1 * product.norm().item()
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_training_takes_the_gradient_ahead_and_steps_from_where_it_was(
    world: Path, sampled: Path, tmp_path: Path
) -> None:
    """The balance loss is not in J; a rate of 0 is plain training to the bit."""
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "batch_size": 6, **STEADY}
    run(world, tmp_path / "plain", shared_dropout=0.3, **options)
    looking = {"lookahead": str(sampled), "lookahead_sets": 2}
    run(world, tmp_path / "still", shared_dropout=0.3, lookahead_rate=0.0, **looking, **options)
    assert not moved(tmp_path / "plain", tmp_path / "still")
    results = run(world, tmp_path / "ahead", shared_dropout=0.3, **looking, **options)
    assert moved(tmp_path / "plain", tmp_path / "ahead") and results["rows"]["lookahead"]["kept"] == 6
    logged = [entry["lookahead_difference"] for entry in history(tmp_path / "ahead") if "loss" in entry]
    assert len(logged) == 2 and all(0.375 < value < 0.75 for value in logged)


def test_the_first_update_is_by_the_gradient_ahead(world: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 1, "batch_size": 6, "max_grad_norm": 1e9, "seed": 3}
    trainer = trainer_of(world, tmp_path, "moe", **options)
    trainer.lookahead = Lookahead(trainer.model, sets(world), 0, 0.05, 2, 3)
    found = gradients(trainer)
    other = trainer_of(world, tmp_path / "b", "moe", **options)
    ahead = load_reward_model(str(world / "moe"), "cpu")
    lookahead = Lookahead(ahead, sets(world), 0, 0.05, 2, 3)
    with lookahead.moved(lookahead.step(by_hand(ahead, lookahead.drawn(0)))):
        other.model.load_state_dict(ahead.state_dict())
    wanted = gradients(other)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-5, msg=name)
    start = weights(world / "moe")
    near = {name: tensor - start[name] for name, tensor in trainer.model.state_dict().items()}
    assert max(change.abs().max().item() for change in near.values()) < 1e-4, "the update began at theta"


def test_sets_of_two_are_refused(world: Path, tmp_path: Path) -> None:
    rows = [*answers(2, 4), *answers(1, 2)]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"(?s)1 of 3 sets.*fewer than 3 in rows 3\n.*--per-prompt"):
        run(world, tmp_path / "out", "dense", lookahead=str(path), max_steps=1)

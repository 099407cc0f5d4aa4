"""The choice of heads: gradients by enumeration, planted heads, a killed choice; losses with a cache."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy import save_policy
from torch import Tensor
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM

from moemerge.data.tokenise import Encoded
from moemerge.fitting import head_choice
from moemerge.fitting.head_choice import CHOICES, advantages, greedy, reinforce, score_gradient
from moemerge.fitting.head_losses import HeadLosses
from moemerge.models.attention_heads import AttentionHeads
from moemerge.models.folder import ModelFolder
from moemerge.models.language_model import LanguageModel
from moemerge.options.few_shot import FewShotSettings

SHAPE = (2, 3)
QUICK = FewShotSettings(steps=150, masks=16)


class Planted:
    """Losses of examples that one head lowers, and one raises."""

    def __init__(self, good: tuple[int, int] = (1, 2), bad: tuple[int, int] = (0, 1)) -> None:
        self.good, self.bad, self.asked = good, bad, 0

    def __len__(self) -> int:
        return 5

    def of(self, number: int, masks_MLH: Tensor) -> Tensor:
        self.asked += 1
        good_M, bad_M = (masks_MLH[:, layer, head].double() for layer, head in (self.good, self.bad))
        return 1.0 + 0.1 * number - 0.5 * good_M + 0.3 * bad_M


def test_the_gradient_is_that_of_the_expected_loss_by_enumeration() -> None:
    """Three heads, all eight masks; the mean of a step as baseline takes 1/M of the gradient away."""
    generator, count, size = torch.Generator().manual_seed(0), 100_000, 8
    losses_8 = torch.rand(8, generator=generator, dtype=torch.float64)
    chances = torch.tensor([[0.3, 0.6, 0.5]], dtype=torch.float64)
    masks_8 = torch.tensor(list(itertools.product([False, True], repeat=3)))[:, None]
    weights_8 = torch.where(masks_8, chances, 1 - chances).prod(2)[:, 0]
    exact = (weights_8[:, None, None] * losses_8[:, None, None] * (masks_8.double() - chances)).sum(0)
    assert float(exact.abs().max()) > 0.01
    drawn = torch.rand(count // size, size, 1, 3, generator=generator, dtype=torch.float64) < chances
    places = (drawn[:, :, 0] * torch.tensor([4, 2, 1])).sum(-1)
    found = []
    for masks_M, place_M in zip(drawn, places, strict=True):
        losses_M = losses_8[place_M]
        found.append(score_gradient(losses_M - losses_M.mean(), masks_M, chances))
    stacked = torch.stack(found) * size / (size - 1)
    error = stacked.std(0) / len(stacked) ** 0.5
    assert bool(((stacked.mean(0) - exact).abs() < 4 * error).all())


def test_advantages_have_mean_0_and_no_spread_gives_none() -> None:
    found_M = advantages(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert found_M.sum().abs() < 1e-12 and found_M[2] == pytest.approx(1 / (2 / 3) ** 0.5, rel=2e-3)
    assert advantages(torch.ones(4, dtype=torch.float64)).abs().max() == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_head_is_found(tmp_path: Path, seed: int) -> None:
    found = reinforce(Planted(), SHAPE, QUICK, seed, tmp_path)
    chosen = found.masks_CLH.double().mean(0)
    assert chosen[1, 2] > 0.9 and chosen[0, 1] < 0.1
    assert len(found.losses) == 150 and sum(found.losses[-20:]) < sum(found.losses[:20])
    first = greedy(Planted(), SHAPE, QUICK, seed, tmp_path).masks_CLH
    assert first.tolist() == [[[False, False, False], [False, False, True]]]  # no other one helps


def test_equal_seeds_choose_alike_and_a_killed_choice_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("whole", "killed", "other")]
    for folder in folders:
        folder.mkdir()
    whole = reinforce(Planted(), SHAPE, QUICK, 3, folders[0])
    draw = head_choice._draw

    def dies(chances: Any, count: int, seed: int, step: int) -> Tensor:
        if step == 60:
            raise KeyboardInterrupt
        return draw(chances, count, seed, step)

    monkeypatch.setattr(head_choice, "_draw", dies)
    with pytest.raises(KeyboardInterrupt):
        reinforce(Planted(), SHAPE, QUICK, 3, folders[1])
    monkeypatch.setattr(head_choice, "_draw", draw)
    losses = Planted()
    again = reinforce(losses, SHAPE, QUICK, 3, folders[1])
    assert losses.asked == 150 - 50  # two times 25 steps were kept
    assert torch.equal(again.masks_CLH, whole.masks_CLH) and again.losses == whole.losses
    other = reinforce(Planted(), SHAPE, QUICK, 4, folders[2])
    assert other.losses != whole.losses and set(CHOICES) == {"reinforce", "greedy"}


@pytest.mark.parametrize("with_cache", [True, False])
def test_losses_are_those_of_a_plain_model_whose_heads_are_replaced(tmp_path: Path, with_cache: bool) -> None:
    folder = save_policy(tmp_path / "lm", num_hidden_layers=2)
    model = LanguageModel(ModelFolder(folder), torch.device("cpu"))
    heads, generator = AttentionHeads(model.trunk), torch.Generator().manual_seed(1)
    values = torch.rand(heads.shape, generator=generator)
    texts = [Encoded([5, 9, 30, 7, 12], 5), Encoded([8], 1), Encoded([40, 41, 42], 3)]
    given = (model, heads, values, texts, [True, False, False], (4, 6), 8)
    losses = HeadLosses(*given, with_cache=with_cache)
    assert losses.with_cache == with_cache
    masks = torch.rand(5, *heads.shape[:2], generator=generator) > 0.5
    plain = AutoModelForCausalLM.from_pretrained(folder)
    own = AttentionHeads(plain.base_model)
    for number, text in enumerate(texts):
        expected = []
        for mask in masks:
            with own.replacing(torch.tensor([len(text.ids) - 1]), values, mask[None]), torch.no_grad():
                logits_V = plain(torch.tensor([text.ids])).logits[0, -1].double()
            odds = logits_V[4] - logits_V[6]
            expected.append(softplus(-odds if number == 0 else odds))
        torch.testing.assert_close(losses.of(number, masks), torch.stack(expected), atol=1e-5, rtol=0)
    assert losses.mean(masks).shape == (5,)

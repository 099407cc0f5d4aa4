"""Guided decoding: its step by the formula, its caches by fresh passes, its limits by brute force."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import save_last_word_model, save_policy
from tiny_models import tiny_dense, tiny_moe, tiny_tokenizer

from moemerge.data.tokenise import Encoded
from moemerge.models.language_model import load_language_model
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.token_steps import why_not_by_steps
from moemerge.options.decode import DecodeSettings
from moemerge.training.guided_decoding import (
    CachedGuide,
    Start,
    TextGuide,
    first_words,
    next_token,
    same_tokens,
    write_answers,
)

CPU = torch.device("cpu")
PROMPTS = ["w1 w2 w3 ", "w4 ", "w5 w6 w7 w8 w9 ", "w10 w11 "]


def softmax(values: Any) -> Any:
    powers = np.exp(np.asarray(values) - np.max(values))
    return powers / powers.sum()


def test_a_step_is_the_formula() -> None:
    """p, s and the result written out by hand, in both formulas, for both sides."""
    p, s, heat, weight = np.array([0.5, 0.3, 0.1]), np.array([1.0, -2.0, 4.0]), 0.6, 0.3
    log_BK, scores_BK = torch.from_numpy(np.log(p))[None], torch.from_numpy(s)[None]
    for side, sign in (("rejected", 1), ("chosen", -1)):
        options: dict[str, Any] = {"temperature": heat, "side": side}
        balanced = next_token(log_BK, scores_BK, DecodeSettings(**options, guidance=weight))[0].numpy()
        z = (s - s.mean()) / s.std()
        np.testing.assert_allclose(balanced, softmax(((1 - weight) * np.log(p) + weight * sign * z) / heat))
        reform = next_token(log_BK, scores_BK, DecodeSettings(**options, formula="reform"))[0].numpy()
        np.testing.assert_allclose(reform, softmax((softmax(sign * s / heat) + softmax(p / heat)) / heat))


def test_a_step_without_scores_is_the_policys() -> None:
    log_BK = torch.tensor([[0.5, 0.3, 0.2]]).log()
    settings = DecodeSettings(temperature=1.0, guidance=0.5)
    alike = next_token(log_BK, torch.full((1, 3), 2.0), settings)[0].numpy()
    np.testing.assert_allclose(alike, softmax(0.5 * np.log([0.5, 0.3, 0.2])), rtol=1e-6)
    lacking = next_token(log_BK, torch.tensor([[1.0, torch.nan, 3.0]]), settings)
    middle = next_token(log_BK, torch.tensor([[1.0, 2.0, 3.0]]), settings)
    np.testing.assert_allclose(lacking, middle)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_language_model(save_policy(tmp_path_factory.mktemp("p") / "policy"), CPU)


@pytest.fixture(scope="module")
def reward(dense_folder: Path) -> Any:
    return load_reward_model(dense_folder, "cpu")


def starts(seed: int = 0, prompts: list[str] = PROMPTS) -> list[Start]:
    return [Start(prompt, "w20 w21", Random(f"{seed} {prompt}")) for prompt in prompts]


@torch.no_grad()
def by_hand(policy: Any, reward: Any, start: Start, settings: DecodeSettings) -> list[int]:
    """Every pass afresh, one text at a time, without caches, padding or batches."""
    model, tokenizer = policy
    ids: list[int] = tokenizer(f"{start.prompt}{start.words}").input_ids
    written: list[int] = []
    for _ in range(settings.max_new_tokens):
        logits_V = model(torch.tensor([ids])).logits[0, -1]
        logits_V[[0, 2]] = -torch.inf  # pad and unk
        log_K, ids_K = logits_V.log_softmax(0).topk(settings.top)
        scores = [reward(torch.tensor([[*ids, one]])).logits.item() for one in ids_K.tolist()]
        probabilities = next_token(log_K[None], torch.tensor([scores]).double(), settings)[0].numpy()
        choice = int(np.searchsorted(probabilities.cumsum(), start.random.random(), side="right"))
        ids, written = [*ids, int(ids_K[choice])], [*written, int(ids_K[choice])]
        if written[-1] == 1:
            break
    return written


@pytest.mark.parametrize(
    "more",
    [
        {"guidance": 0.5},
        {"guidance": 0.0},
        {"guidance": 1.0, "temperature": 1e-6},
        {"formula": "reform", "side": "chosen"},
    ],
)
def test_batches_with_caches_write_what_fresh_passes_write(policy: Any, reward: Any, more: Any) -> None:
    """Guidance 0 is ancestral sampling of the likeliest, guidance 1 at no heat the best candidate."""
    settings = DecodeSettings(**{"top": 6, "max_new_tokens": 6, "temperature": 1.0, **more})
    model, tokenizer = policy

    def cached(some: Any, candidates: int) -> CachedGuide:
        return CachedGuide(reward, [start.ids(tokenizer) for start in some], candidates)

    answers = write_answers(model, tokenizer, starts(), cached, settings)
    expected = [by_hand(policy, reward, start, settings) for start in starts()]
    assert [answer.tokens for answer in answers] == list(map(len, expected))
    texts = [tokenizer.decode([i for i in ids if i != 1]) for ids in expected]
    assert [str(answer.text).split() for answer in answers] == [["w20", "w21", *t.split()] for t in texts]
    asked = 6 if settings.is_guided_decoding else 0
    assert [answer.queries for answer in answers] == [asked * len(ids) for ids in expected]
    assert [answer.ended for answer in answers] == [ids[-1] == 1 for ids in expected]
    alone = write_answers(model, tokenizer, starts(prompts=PROMPTS[1:2]), cached, settings)
    assert alone == answers[1:2]


def test_other_draws_write_otherwise(policy: Any) -> None:
    settings = DecodeSettings(top=20, max_new_tokens=6, temperature=2.0)
    first, again, other = (write_answers(*policy, starts(seed), None, settings) for seed in (0, 0, 1))
    assert first == again and first != other


def test_a_candidate_that_is_the_pad_token_is_read_before_it(dense_folder: Path) -> None:
    """As transformers reads a text that ends in it."""
    model: Any = load_reward_model(dense_folder, "cpu")
    model.config.pad_token_id = 7
    rows = [[5, 9, 11], [12]]
    guide = CachedGuide(model, rows, 3)
    for ids_BK in (torch.tensor([[7, 8, 9], [3, 7, 4]]), torch.tensor([[4, 7, 9], [7, 7, 5]])):
        scores_BK = guide.scores(ids_BK)
        for ids, candidates, scores_K in zip(rows, ids_BK.tolist(), scores_BK, strict=True):
            with torch.no_grad():
                wanted = [model(torch.tensor([[*ids, one]])).logits.item() for one in candidates]
            np.testing.assert_allclose(scores_K, wanted, atol=1e-5)
        guide.take(torch.tensor([2, 0]))
        rows = [[*rows[0], int(ids_BK[0, 2])], [*rows[1], int(ids_BK[1, 0])]]


def test_texts_anew_are_scored_as_whole_answers(policy: Any) -> None:
    asked: list[Any] = []

    def scorer(items: Any) -> Any:
        asked.extend(items)
        return np.array([float(len(answer)) for _, answer in items])

    guide = TextGuide(scorer, policy[1], starts()[:2])
    ids_BK = torch.tensor([[5, 16], [1, 6]])
    assert guide.scores(ids_BK).tolist() == [[10, 11], [7, 10]]
    guide.take(torch.tensor([1, 0]))
    guide.scores(ids_BK)
    assert asked[4:6] == [("w1 w2 w3 ", "w20 w21 w13 w2"), ("w1 w2 w3 ", "w20 w21 w13 w13")]


def random_texts(seed: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(seed)
    return [Encoded(torch.randint(3, 60, (n,), generator=draw).tolist(), 2) for n in (12, 7)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "gemma2"])
def test_decoders_are_read_by_steps(family: str) -> None:
    model: Any = tiny_dense(family)
    assert why_not_by_steps(model, random_texts(0), 8192) == ""


def test_models_that_cannot_be_read_by_steps_say_why() -> None:
    texts = random_texts(0)
    assert why_not_by_steps(tiny_moe("llama").eval(), texts, 8192) == ""  # type: ignore[arg-type]
    for model, reason in {
        tiny_moe("llama", gate="prompt").eval(): "its gates look at the whole prompt",
        tiny_dense("bert"): "it pools",
        tiny_dense("eurobert"): "later tokens move",
    }.items():
        assert reason in why_not_by_steps(model, texts, 8192)  # type: ignore[arg-type]
    unmasked: Any = tiny_dense("llama")
    right = unmasked.model.forward
    unmasked.model.forward = lambda *args, attention_mask=None, **how: right(*args, **how)
    assert "moves a score" in why_not_by_steps(unmasked, texts, 8192), "padding is seen"


def test_first_words_and_vocabularies(tmp_path: Path) -> None:
    assert first_words(" One two  three four.", 0.5) == " One two"
    assert first_words("One two", 0.25) == first_words("", 0.9) == ""
    ours, theirs = tiny_tokenizer(), load_tokenizer(save_last_word_model(tmp_path / "m", "w5"))
    assert same_tokens(ours, theirs)
    more = tiny_tokenizer()
    more.add_tokens(["w61"])
    assert same_tokens(ours, more) and not same_tokens(more, ours)

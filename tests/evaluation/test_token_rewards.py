"""Token rewards telescope, and are plain transformers' on every beginning; words, phrases, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from html_page import check_page
from small_heads import under_head
from small_moe import make_moe, random_pairs, write_rows
from small_policy import CHAT, save_last_word_model
from tiny_models import save_dense, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import moemerge
from moemerge.data.pairs import Pair
from moemerge.data.rows import read_rows
from moemerge.data.tokenise import Encoded, encode, token_texts
from moemerge.errors import DataError, UnsupportedError
from moemerge.evaluation.explanation import Explained, sections, sentence
from moemerge.evaluation.factors import factors, parts_of
from moemerge.evaluation.phrases import phrases, unlike
from moemerge.evaluation.token_rewards import TokenRewards, Word
from moemerge.models.heads.base import head_of
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.pooled_states import states_and_scores
from moemerge.models.scoring import score
from moemerge.options.explain import Explain

ITEMS = [("w3 w4 ", "w5 w6 w7"), ("w9 ", "w1"), ("", "w2 w8 w8 w3"), ("w3 w4 w5 ", "w60 unheard w2 w2 w2")]
QUIET = {"output": "out", "max_pairs": None, "least": 2}


@torch.no_grad()
def test_plain_transformers_on_every_beginning(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    for item, found in zip(ITEMS, moemerge.token_rewards(folder, ITEMS), strict=True):
        prompt, whole = (tokenizer(text).input_ids for text in (item[0], f"{item[0]}{item[1]}<eos>"))
        begun = range(max(len(prompt), 1), len(whole) + 1)
        scores = [plain(input_ids=torch.tensor([whole[:end]])).logits.item() for end in begun]
        expected = np.diff(scores) if prompt else [0.0, *np.diff(scores)]  # the first word is where it begins
        np.testing.assert_allclose(found.rewards, expected, atol=2e-6)
        assert found.prompt_score == pytest.approx(scores[0], abs=1e-6)
        assert "".join(found.tokens) == f" {item[1]}<eos>".removeprefix("" if prompt else " ")


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_rewards_and_the_prompts_score_make_the_score(kind: str, tmp_path: Path) -> None:
    folder = (make_moe if kind == "moe" else save_dense)(tmp_path / "model")
    model, tokenizer = load_reward_model(folder, "cpu"), load_tokenizer(folder)
    whole = score(model, tokenizer, [encode(tokenizer, *item) for item in ITEMS], 8192)
    for found, expected in zip(moemerge.token_rewards(folder, ITEMS), whole.tolist(), strict=True):
        assert found.score == expected  # to the last bit
        assert sum(found.rewards) == pytest.approx(found.score - found.prompt_score, rel=1e-14, abs=1e-14)
        assert len(found.rewards) == len(found.tokens)
    # Neither the others of a batch nor their order matter beyond rounding.
    alone = [moemerge.token_rewards(folder, [item], batch_tokens=1)[0] for item in ITEMS[::-1]]
    for one, other in zip(alone[::-1], moemerge.token_rewards(folder, ITEMS), strict=True):
        np.testing.assert_allclose(one.rewards, other.rewards, rtol=1e-5, atol=1e-5)


def test_a_model_of_last_words_in_closed_form(tmp_path: Path) -> None:
    """Its score is a number for the last word, so a word's reward is its number minus that of the last."""
    folder = save_last_word_model(tmp_path / "model", "w7")
    worth = {w: moemerge.token_rewards(folder, [(w, " w1")])[0].prompt_score for w in ("w3", "w5", "w7")}
    (found,) = moemerge.token_rewards(folder, [("w3", " w7 w5 w7")])
    expected = [worth["w7"] - worth["w3"], worth["w5"] - worth["w7"], worth["w7"] - worth["w5"]]
    np.testing.assert_allclose(found.rewards, expected, atol=1e-6)
    assert worth["w7"] == pytest.approx(1, abs=1e-5)


def test_chats(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(CHAT)
    item = ([{"role": "user", "content": "w3"}], [{"role": "assistant", "content": "w4 w5"}])
    (found,) = moemerge.token_rewards(folder, [item])
    assert found.tokens == [" assistant", " w4", " w5"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(["<eos>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), byte_tokenizer()], ids=["words", "bytes"])
def test_token_texts_make_the_text(tokenizer: Any) -> None:
    for prompt, answer in [("w1  w2 ", "w3 w4\n w5"), ("", "  wé 好的  w5"), ("w1", "")]:
        texts = token_texts(tokenizer, prompt, answer)
        assert "".join(texts) == f"{prompt}{answer}<eos>"
        assert len(texts) == len(encode(tokenizer, prompt, answer).ids)


def test_words() -> None:
    tokens = [" I", "'", "m", " un", "usual", ",", " ", "\n", "好", "的", "", " end", "<eos>"]
    found = TokenRewards(tokens, [0.0, *np.cumsum(2.0 ** np.arange(13)).tolist()])
    assert found.words == [
        Word(" I'm", 7),
        Word(" unusual", 24),
        Word(",", 32),
        Word(" ", 64),
        Word("\n", 128),
        Word("好", 256),
        Word("的", 512 + 1024),
        Word(" end", 2048),
        Word("<eos>", 4096),
    ]


def answers_of(words: list[list[str]], rewards: list[list[float]]) -> list[TokenRewards]:
    return [
        TokenRewards([f" {w}" for w in some], [0.0, *np.cumsum(values).tolist()])
        for some, values in zip(words, rewards, strict=True)
    ]


def drawn_answers(count: int, seed: int, planted: float = 0.0) -> list[TokenRewards]:
    random = np.random.default_rng(seed)
    words = [random.choice(["a", "b", "c", "d", "e"], random.integers(3, 9)).tolist() for _ in range(count)]
    rewards = [
        [v + planted * (w == "b") for v, w in zip(random.normal(size=len(some)), some, strict=True)]
        for some in words
    ]
    return answers_of(words, rewards)


def test_phrases_against_a_plain_count_and_a_bootstrap() -> None:
    answers = drawn_answers(120, seed=1, planted=1.0)
    prompts = [number // 2 for number in range(120)]
    found = {phrase.text: phrase for phrase in phrases(answers, prompts, 5, 0.95)}
    sums = np.zeros((60, 2))
    for prompt, answer in zip(prompts, answers, strict=True):
        words, rewards = [t.strip() for t in answer.tokens], answer.rewards
        for i in range(len(words) - 1):
            if words[i : i + 2] == ["a", "b"]:
                sums[prompt] += [1, rewards[i] + rewards[i + 1] - 2 * np.mean(rewards)]
    phrase = found["a b"]
    assert phrase.places == sums[:, 0].sum() and phrase.prompts == (sums[:, 0] > 0).sum()
    assert phrase.excess == pytest.approx(sums[:, 1].sum() / sums[:, 0].sum())
    draws = np.random.default_rng(0).integers(0, 60, (20000, 60))
    means = sums[draws, 1].sum(axis=1) / sums[draws, 0].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (phrase.low, phrase.high) == pytest.approx((low, high), abs=0.08)
    assert list(found) == sorted(found, key=lambda text: -found[text].excess)


def test_a_planted_word_is_told_and_no_other() -> None:
    """Holm keeps the chance of any false word below the level; 30 drawn sets, of which 5 % may fail."""
    told = [
        [p.text for p in phrases(drawn_answers(100, seed, 1.0), range(100), 5, 0.95) if p.p < 0.05]
        for seed in range(5)
    ]
    assert all("b" in names for names in told)
    false = [any(p.p < 0.05 for p in phrases(drawn_answers(100, s), range(100), 5, 0.95)) for s in range(30)]
    assert sum(false) <= 4


def test_phrases_need_prompts() -> None:
    (answer,) = answers_of([["a", "a", "a"]], [[1.0, 1.0, 1.0]])
    assert phrases([answer] * 4, [0, 0, 0, 1], 3, 0.95) == []
    assert phrases([], [], 2, 0.95) == []
    found = phrases([answer] * 4, range(4), 2, 0.95)
    assert {phrase.text: phrase.places for phrase in found} == {"a": 12, "a a": 8, "a a a": 4}
    assert [phrase.text for phrase in unlike(found)] == ["a", "a a", "a a a"]
    (other,) = answers_of([["a", "b"]], [[1.0, 2.0]])
    assert {phrase.text for phrase in unlike(phrases([other] * 4, range(4), 2, 0.95))} == {"a b"}


def explained(scores: list[tuple[list[float], list[float]]]) -> Explained:
    """Pairs by the scores of both answers' beginnings."""
    sides = [[TokenRewards([" w"] * (len(s) - 1), s) for s in side] for side in zip(*scores, strict=True)]
    pairs = [Pair(f"p{n}", "w", "v", row=n + 1) for n in range(len(scores))]
    return Explained(pairs, *sides, Explain(model="m", pairs="p", **QUIET))


def test_when_pairs_are_decided_by_hand() -> None:
    """Of ten tokens one more is read at each share."""
    rising, flat = [0.0, *range(1, 11)], [0.0] * 11
    late = [0.0] * 8 + [1.0, 1.0, 1.0]
    wavering = [0.0, 1, 1, 1, -1, -1, 1, 1, 1, 1, 1]
    numbers = explained([(rising, flat), (flat, rising), (late, flat), (wavering, flat)]).numbers()
    decided = numbers["decided"]
    assert decided["share"][0] == 0.1 and decided["right"] == [0.5] * 3 + [0.25] * 2 + [0.5] * 2 + [0.75] * 3
    assert decided["stands"] == [0.5] * 5 + [0.75] * 2 + [1.0] * 3
    assert "4 pairs, 75% ranked correctly; half of the verdicts stand after 10%" in sentence(numbers)


def test_worst_pairs_are_read_first() -> None:
    found = explained([([0.0, float(n)], [0.0, 2.5]) for n in range(6)])
    object.__setattr__(found, "options", found.options.model_copy(update={"shown": 4}))
    assert found.to_read()[:2] == [0, 1] and len(set(found.to_read())) == 4


def test_the_stage(tmp_path: Path) -> None:
    model = save_dense(tmp_path / "rm")
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(40, seed=3))
    out = moemerge.explain(model, pairs, output=tmp_path / "out", least=3, shown=6)
    rows = [row for _, row in read_rows(str(out / "tokens.jsonl.gz")) if isinstance(row, dict)]
    assert len(rows) == 80 and [row["side"] for row in rows[:2]] == ["chosen", "rejected"]
    for row in rows:
        assert sum(row["rewards"]) == pytest.approx(row["score"] - row["prompt_score"], abs=1e-12)
    given = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    whole = moemerge.token_rewards(model, [(row["prompt"], row["chosen"]) for row in given])
    assert [row["score"] for row in rows[::2]] == pytest.approx([one.score for one in whole], abs=1e-6)
    page = check_page((out / "report.html").read_text())
    assert len([p for p in page.all("p") if p.get("class") == "heat"]) == 12
    assert "What pays in rm" in (out / "report.md").read_text()
    assert [row["text"] for row in out.rows()] == [
        phrase["text"] for phrase in json.loads((out / "explanation.json").read_text())["phrases"]
    ]
    again = moemerge.explain(model, pairs, output=tmp_path / "again", least=3, shown=6)
    for name in ("tokens.jsonl.gz", "explanation.json", "report.md"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_factors_of_a_head_and_what_they_pay_for(tmp_path: Path) -> None:
    """Parts sum to scores, shares to one; a factor that is the answer's length is seen to be that."""
    model = under_head(save_dense(tmp_path / "dense"), tmp_path / "rm", "nonnegative")
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(12, seed=3))
    out = moemerge.explain(model, pairs, output=tmp_path / "out", least=3, shown=2)
    told = json.loads((out / "explanation.json").read_text())["factors"]
    assert sum(factor["share"] for factor in told) == pytest.approx(1)
    assert "Factors of the reward head" in (out / "report.md").read_text()
    loaded = load_reward_model(model, "cpu")
    head: Any = head_of(loaded)
    states_ND, scores_N = states_and_scores(loaded, [Encoded([5, 6, 7], 1), Encoded([8, 9], 1)], 64)
    assert parts_of(head, states_ND)[0].sum(1) == pytest.approx(scores_N, abs=1e-5)
    lengths = [9, 2, 5, 4, 1, 7]
    parts_NK = np.stack([np.array(lengths) * 0.5, np.array([0.0, 1, 0, 0, 0, 0]), np.ones(6)], axis=1)
    longest, single = factors(parts_NK, np.array([0.5, 1.0, 1.0]), lengths)
    assert (longest.number, longest.length, longest.lit) == (0, pytest.approx(1), 1)
    assert longest.right == pytest.approx(2 / 3) and longest.brightest == [0, 5, 2]
    assert (single.number, single.lit, single.right) == (1, pytest.approx(1 / 6), 0)
    assert longest.share + single.share == pytest.approx(1) and longest.share > 1 > 0 > single.share


def test_a_page_without_words_to_tell(tmp_path: Path) -> None:
    found = explained([([0.0, 1.0], [0.0, 1.0])])
    numbers = found.numbers()
    assert numbers["phrases"] == [] and found.spread == 1.0
    shown = sections(found, numbers, tmp_path)
    assert [section.title for section in shown][-1] == "Texts to read"


def test_faults(tmp_path: Path) -> None:
    encoder = save_dense(tmp_path / "bert", "bert")
    with pytest.raises(UnsupportedError, match="decoder, whose tokens see only those before them"):
        moemerge.token_rewards(encoder, ITEMS)
    with pytest.raises(DataError, match="chat messages cannot be encoded"):
        moemerge.token_rewards(save_dense(tmp_path / "rm"), [([], [{"role": "user", "content": "w"}])])
    assert moemerge.token_rewards(tmp_path / "rm", []) == []

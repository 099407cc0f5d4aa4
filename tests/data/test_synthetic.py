"""The synthetic preference world: gold reward by hand, what is written, what is promised of it."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.pairs import Pair
from moemerge.data.reading import read_candidates, read_pairs
from moemerge.data.world import (
    CONTENT,
    FILLERS,
    KINDS,
    REGIMES,
    SHIFTED,
    TOPICS,
    TRAINING,
    WIDE,
    WORTH,
    Prompts,
    Worth,
    candidate_rows,
    draw_answers,
    gold_R,
    gold_reward,
    pair_rows,
    word_value_GC,
)
from moemerge.errors import DataError
from moemerge.options.base import TextFormat
from moemerge.stages.synthetic import write_world

SMALL = {
    "train_pairs": 60, "validation_pairs": 20, "test_pairs": 30, "own_pairs": 12, "prompts": 3,
    "candidates": 8,
}  # fmt: skip
# The kind that should follow kinds 0, 1, 2, 3 in each regime, read off the cycles by hand.
FOLLOWS = {
    "explain": {0: 1, 1: 2, 2: 3, 3: 0},
    "plan": {0: 2, 2: 1, 1: 3, 3: 0},
    "story": {0: 3, 3: 2, 2: 1, 1: 0},
    "advise": {3: 0, 0: 2, 2: 1, 1: 3},
}


def word_worth(regime: str, topic: str, word: str) -> float:
    """Worth of one word, from an answer that holds nothing else: the sum is divided by sqrt(4)."""
    return 2 * gold_reward(f"{regime} {topic} ", word)


def plain_gold(regime: str, topic: str, answer: str) -> float:
    """The gold reward again, word by word in plain Python."""
    words = answer.split()
    content = [word for word in words if word in CONTENT]
    kinds = [next(k for k, kind in enumerate(KINDS) if word in kind) for word in content]
    total = 0.0
    for i, word in enumerate(content):
        if word in content[:i]:
            continue
        total += word_worth(regime, topic, word)
        total += float(i > 0 and FOLLOWS[regime][kinds[i - 1]] == kinds[i])
    excess = max(0, sum(word in FILLERS for word in words) - 4)
    return total / math.sqrt(max(4, len(content))) - 0.8 * excess


def test_gold_by_hand() -> None:
    first, water, because, finally_ = (word_worth("explain", "sea", kind[0]) for kind in KINDS)
    gold = {answer: gold_reward("explain sea ", answer) for answer in (
        "first water",  # in order: one bonus
        "water first",  # against the order
        "first certainly water",  # a filler between them does no harm
        "first first",  # repeated: nothing new
        "first water because finally first",  # five words, three bonuses
        "certainly " * 4,
        "certainly indeed " * 3,
    )}  # fmt: skip
    assert list(gold.values()) == pytest.approx(
        [
            (first + water + 1) / 2,
            (first + water) / 2,
            (first + water + 1) / 2,
            first / 2,
            (first + water + because + finally_ + 3) / math.sqrt(5),
            0.0,
            -1.6,
        ]
    )


def test_order_and_worth_depend_on_the_regime() -> None:
    def bonus(regime: str, a: str, b: str) -> float:
        return gold_reward(f"{regime} sea", f"{a} {b}") * 2 - sum(
            word_worth(regime, "sea", w) for w in (a, b)
        )

    for regime, follows in FOLLOWS.items():
        got = {(i, j): round(bonus(regime, KINDS[i][1], KINDS[j][2])) for i in range(4) for j in range(4)}
        assert got == {(i, j): int(follows[i] == j) for i in range(4) for j in range(4)}
    worth_GC = np.array([[word_worth(regime, "sea", word) for word in CONTENT] for regime in REGIMES])
    likeness = np.corrcoef(worth_GC)[np.triu_indices(4, 1)]
    assert likeness.min() > 0 and likeness.max() < 0.8


def test_many_rows_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for row in candidate_rows(rng, WIDE, 6, 20):
        regime, topic = row["prompt"].split()
        for answer in row["candidates"]:
            assert answer["score"] == pytest.approx(plain_gold(regime, topic, answer["text"]), abs=1e-12)
            assert answer["score"] == pytest.approx(gold_reward(row["prompt"], answer["text"]), abs=1e-12)


def test_words_of_another_world_are_refused() -> None:
    for prompt, answer in (
        ("explain sea", "hello"),
        ("hello sea", "first"),
        ("explain", "first"),
        ("", "first"),
    ):
        with pytest.raises(DataError) as error:
            gold_reward(prompt, answer)
        assert error.value.given and error.value.expected and error.value.fix


def test_labels_follow_gold_but_for_the_noise() -> None:
    for noise in (0.0, 0.2):
        rows = pair_rows(np.random.default_rng(1), TRAINING, 800, noise)
        assert len(rows) == 800
        leads = [
            gold_reward(r["prompt"], r["chosen"]) - gold_reward(r["prompt"], r["rejected"]) for r in rows
        ]
        assert np.mean(np.array(leads) < 0) == pytest.approx(noise, abs=0.045 * (noise > 0))
        assert 0.0 not in leads


def test_another_rater_has_another_gold() -> None:
    """One who likes fillers from the first on, by what each is worth to that rater; words count as before."""
    fond, plain = Worth(free_fillers=0, filler_cost=-0.5), "first water"
    assert gold_reward("explain sea ", plain, fond) == gold_reward("explain sea ", plain)
    padded = gold_reward("explain sea ", f"{plain} certainly indeed", fond)
    assert padded == pytest.approx(gold_reward("explain sea ", plain) + 2 * 0.5)
    other = gold_reward("explain sea ", plain, Worth(tables_seed=7))
    assert other != gold_reward("explain sea ", plain)


def fillers_of(words_RT: np.ndarray) -> np.ndarray:
    return np.asarray((words_RT >= len(CONTENT)).sum(axis=1))


def test_fillers_go_with_quality_in_training_only() -> None:
    rng = np.random.default_rng(2)
    prompts = Prompts.draw(rng, 4000)
    words = {style: draw_answers(rng, style, prompts) for style in (TRAINING, SHIFTED, WIDE)}
    bond = {s: np.corrcoef(fillers_of(w), gold_R(prompts, w))[0, 1] for s, w in words.items()}
    assert bond[TRAINING] > 0.5 and abs(bond[SHIFTED]) < 0.05 and bond[WIDE] < 0
    assert fillers_of(words[TRAINING]).max() == fillers_of(words[SHIFTED]).max() == 4
    padded = fillers_of(words[WIDE]) > 4
    assert fillers_of(words[WIDE]).max() == 12 and 0.005 < padded.mean() < 0.02
    assert all((w >= 0).sum(axis=1).max() <= 20 for w in words.values())


def test_world_on_disk(tmp_path: Path) -> None:
    out = write_world(output=tmp_path / "world", label_noise=0.2, **SMALL)
    sizes = {
        "train": 60, "validation": 20, "tests/in_distribution": 30,
        "tests/out_of_distribution": 30, "candidates/wide": 3, "own": 12,
    }  # fmt: skip
    written = read_manifest(out)["results"]["sizes"]
    assert sizes == {name: size for name, size in written.items() if not name.startswith("regimes/")}
    for name, size in sizes.items():
        read = read_candidates if name.startswith("candidates") else read_pairs
        rows, report = read(str(out / "data" / f"{name}.jsonl.gz"), TextFormat())
        assert (len(rows), report.bad) == (size, 0)
        assert {row.subset for row in rows} <= set(REGIMES)
    sets, _ = read_candidates(str(out / "data/candidates/wide.jsonl.gz"), TextFormat())
    assert [len(one.texts) for one in sets] == [8, 8, 8]


def test_pairs_for_models_trained_apart(tmp_path: Path) -> None:
    out = write_world(output=tmp_path / "world", label_noise=0.4, **SMALL) / "data"

    def pairs(name: str) -> list[Pair]:
        return read_pairs(str(out / f"{name}.jsonl.gz"), TextFormat())[0]

    by_regime = {name: pairs(f"regimes/{name}") for name in REGIMES}
    train = pairs("train")
    assert sum(map(len, by_regime.values())) == len(train) == 60
    for name, mine in by_regime.items():
        assert [pair.chosen for pair in mine] == [pair.chosen for pair in train if pair.subset == name]
    own = pairs("own")
    assert {pair.subset for pair in own} == set(REGIMES[:-1])
    # 40 % of the training labels are flipped, and none of these.
    assert all(gold_reward(p.prompt, p.chosen) > gold_reward(p.prompt, p.rejected) for p in own)


def test_model_loads_with_the_auto_classes_and_knows_every_word(tmp_path: Path) -> None:
    out = write_world(output=tmp_path / "world", hidden_size=24, num_layers=2, **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert (model.config.num_labels, model.config.hidden_size, model.config.num_hidden_layers) == (1, 24, 2)
    assert model.dtype == torch.float32 and type(model).__name__ == "LlamaForSequenceClassification"
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer(" ".join([*REGIMES, *TOPICS, *CONTENT, *FILLERS]) + "<eos>")["input_ids"]
    assert len(set(ids)) == len(ids) and tokenizer.unk_token_id not in ids
    assert len(tokenizer) == model.config.vocab_size
    batch = tokenizer(["plan sea first<eos>", "plan sea first water<eos>"], padding=True, return_tensors="pt")
    logits = model(**batch).logits
    assert logits.shape == (2, 1) and logits.isfinite().all() and logits[0] != logits[1]


def test_seed_decides_everything(tmp_path: Path) -> None:
    def files(name: str, seed: int) -> dict[str, bytes]:
        out = write_world(output=tmp_path / name, seed=seed, **SMALL)
        return {
            str(p.relative_to(out)): p.read_bytes()
            for p in out.rglob("*")
            if p.suffix in (".gz", ".safetensors")
        }

    first, same, other = files("a", 1), files("b", 1), files("c", 2)
    assert len(first) == 11 and first == same
    assert all(first[name] != other[name] for name in first)


def test_more_training_pairs_leave_the_other_sets_as_they_are(tmp_path: Path) -> None:
    small = write_world(output=tmp_path / "small", **SMALL)
    large = write_world(output=tmp_path / "large", **(SMALL | {"train_pairs": 90}))
    for name in ("validation", "tests/in_distribution", "candidates/wide"):
        one, other = (json.loads(gzip.decompress((f / f"data/{name}.jsonl.gz").read_bytes()).splitlines()[0])
                      for f in (small, large))  # fmt: skip
        assert one == other


def test_tables_are_standardised() -> None:
    value_GC = word_value_GC(WORTH)
    assert value_GC.shape == (4, 32)
    np.testing.assert_allclose(value_GC.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(value_GC.std(axis=1), 1)

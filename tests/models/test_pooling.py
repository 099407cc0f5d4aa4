"""No step moves the token that a score is read from: the oracle is plain transformers, one text at a time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small_moe import write_rows
from tiny_models import save_dense, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

import moemerge
from moemerge.artifacts.manifest import read_manifest
from moemerge.data.pairs import Pair
from moemerge.data.tokenise import Encoded, EncodedPair
from moemerge.errors import CheckpointError, UnsupportedError
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.models import ModelList
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.pooling import pooled_positions, safe_pad
from moemerge.models.scoring import loss_and_accuracy, score, score_pairs

PAD, EOS, WORD, UNKNOWN = 0, 1, 9, 64
# What config.json and the tokenizer say of padding; an added token has no row in the model's embeddings.
PADDINGS: dict[str, tuple[int | None, str | None]] = {
    "both": (PAD, "<pad>"),
    "config alone": (PAD, None),
    "tokenizer alone": (None, "<pad>"),
    "none": (None, None),
    "tokenizer pads with eos": (None, "<eos>"),
    "both pad with eos": (EOS, "<eos>"),
    "config pads with eos": (EOS, "<pad>"),
    "others": (WORD, "<pad>"),
    "added, not resized": (None, "<added>"),
    "minus one": (-1, "<pad>"),
}
MOE: dict[str, Any] = {"num_routed_experts": 3, "num_experts_per_tok": 2}
every_padding = pytest.mark.parametrize("padding", PADDINGS)
# For whole chains of stages: the others are in the slow tests.
some_padding = pytest.mark.parametrize(
    "padding",
    [
        padding if padding in ("both", "none", "tokenizer pads with eos", "minus one")
        else pytest.param(padding, marks=pytest.mark.slow)
        for padding in PADDINGS
    ],
)  # fmt: skip


def make(folder: Path, padding: str, family: str = "llama", seed: int = 0) -> Path:
    """A reward model whose config and tokenizer speak of padding as `padding` says."""
    config_pad, tokenizer_pad = PADDINGS[padding]
    save_dense(folder, family, seed=seed)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": config_pad}))
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    if tokenizer_pad:
        tokenizer.add_special_tokens({"pad_token": tokenizer_pad})
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == UNKNOWN + (tokenizer_pad == "<added>")
    return folder


def texts() -> list[Encoded]:
    """Texts of many lengths that end in a word, in <eos>, in <pad>, in word 9; some hold these within."""
    dice = random.Random(0)
    ends: list[list[int]] = [[], [EOS], [PAD], [WORD], [EOS, EOS], [PAD, PAD]]
    rows = [[dice.randint(0, 63) for _ in range(dice.randint(2, 20))] + end for end in ends * 4]
    return [Encoded(ids, 2) for ids in rows]


def pairs() -> list[EncodedPair]:
    rows = texts()
    pair = Pair("w1", "w2", "w3", "", None, 1, {})
    return [EncodedPair(rows[n], rows[n + 1], pair) for n in range(0, len(rows), 2)]


@torch.no_grad()
def plain(folder: Path, encoded: list[Encoded] | None = None) -> Tensor:
    """Scores under plain transformers, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = encoded if encoded is not None else texts()
    return torch.stack([model(input_ids=torch.tensor([text.ids])).logits[0, 0] for text in rows])


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 1e-3
    assert (found.double() - expected.double()).abs().max() <= 2e-5


def pad_of(folder: Path) -> int | None:
    return json.loads((folder / "config.json").read_text()).get("pad_token_id")


def jsonl(path: Path) -> str:
    dice = random.Random(1)
    rows: Any = [
        {"prompt": f"w{n + 30} ", "chosen": f"w{n} w{dice.randint(10, 60)} <eos>", "rejected": f"w{n} w5"}
        for n in range(24)
    ]
    return str(write_rows(path, rows))


@every_padding
def test_scores_are_those_of_each_text_alone(padding: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", padding)
    model, tokenizer = load_reward_model(folder, "cpu"), load_tokenizer(folder)
    before = model.config.to_dict()
    for batch_tokens in (1, 60, 10_000):
        assert_same(score(model, tokenizer, texts(), batch_tokens), plain(folder))
    assert model.config.to_dict() == before


@some_padding
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bert", "qwen3"])
def test_so_they_are_of_other_families(family: str, padding: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", padding, family)
    if padding == "minus one" and family == "bert":
        return  # an encoder's embeddings take no row -1 away; its scores are read from the first token
    assert_same(score(load_reward_model(folder, "cpu"), load_tokenizer(folder), texts(), 60), plain(folder))


@some_padding
def test_an_upcycled_model_scores_as_before(padding: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", padding)
    moe = moemerge.upcycle(model=str(folder), output=tmp_path / "moe", **MOE)
    assert_same(plain(moe), plain(folder))
    fit = moemerge.fit(model=str(moe), method="uniform", output=tmp_path / "fit")
    merged = moemerge.merge(model=str(moe), coefficients=str(fit), output=tmp_path / "merged")
    assert_same(plain(merged), plain(folder))
    experts = moemerge.export(model=str(moe), output=tmp_path / "experts")
    assert_same(plain(experts / "expert-0"), plain(folder))


@every_padding
def test_a_merge_of_a_model_with_itself_is_that_model(padding: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", padding)
    merged = moemerge.merge_models([str(folder), str(folder)], tmp_path / "merged")
    assert_same(plain(merged), plain(folder))
    assert pad_of(merged) in (PADDINGS[padding][0], None)


@every_padding
def test_the_model_that_a_fit_sees_is_that_model(padding: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", padding)
    source = ModelList([str(folder), str(folder)])
    alpha_LN = torch.full((len(source.blocks()), 2), 0.5, dtype=torch.float64)
    merged = MergedModel(
        source, alpha_LN, torch.zeros(len(alpha_LN), dtype=torch.float64), "cpu", torch.float32
    )
    expected = plain(folder).view(-1, 2)
    answers = merged.answers(pairs(), states=True)
    assert_same(answers.margins_P.detach(), expected[:, 0] - expected[:, 1])
    assert answers.states_2PD is not None
    head = merged.model.score.weight[0]
    assert_same(answers.states_2PD.detach() @ head, expected.T)


@some_padding
def test_training_trains_and_judges_the_model_that_was_given(padding: str, tmp_path: Path) -> None:
    """After a step that moves nothing all is as before; what is measured is plain transformers' answer."""
    folder, rows = make(tmp_path / "m", padding), jsonl(tmp_path / "rows.jsonl")
    options: dict[str, Any] = {
        "pairs": rows,
        "validation": rows,
        "max_steps": 1,
        "threads": 1,
        "batch_size": 4,
    }
    out = moemerge.train(model=str(folder), output=tmp_path / "out", learning_rate=1e-12, **options)
    assert_same(plain(out), plain(folder))
    assert pad_of(out) in (PADDINGS[padding][0], None)
    for state in ("before", "after"):
        told = read_manifest(out)["results"][state]
        loss, accuracy = loss_and_accuracy(margins(folder, rows))
        assert told["loss"] == pytest.approx(loss, abs=1e-5) and told["accuracy"] == accuracy


def margins(folder: Path, rows: str) -> Tensor:
    """Differences of plain scores on the pairs of a file, each text encoded by the tokenizer alone."""
    tokenizer, values = (
        load_tokenizer(folder),
        [json.loads(line) for line in Path(rows).read_text().splitlines()],
    )
    sides = [
        [Encoded(tokenizer(row["prompt"] + row[side]).input_ids, 1) for row in values]
        for side in ("chosen", "rejected")
    ]
    for side in sides:
        for text in side:
            if text.ids[-1] != EOS:
                text.ids.append(EOS)
    chosen, rejected = (plain(folder, side) for side in sides)
    return (chosen - rejected).double()


def test_gradients_of_training_reach_the_token_that_is_scored(tmp_path: Path) -> None:
    """Two models that differ in nothing but the tokenizer's pad token train to the same weights."""
    rows = jsonl(tmp_path / "rows.jsonl")
    scores = []
    for padding in ("none", "tokenizer alone", "tokenizer pads with eos", "added, not resized"):
        folder = make(tmp_path / padding.replace(" ", "-"), padding)
        out = moemerge.train(
            model=str(folder),
            pairs=rows,
            output=Path(f"{folder}-out"),
            max_steps=3,
            learning_rate=1e-3,
            threads=1,
        )
        scores.append(plain(out))
        assert pad_of(out) is None
    assert (scores[0] - plain(tmp_path / "none")).abs().max() > 1e-3, "it was trained"
    assert all(torch.equal(found, scores[0]) for found in scores[1:])


def test_a_base_model_is_given_its_tokenizers_pad_token(tmp_path: Path) -> None:
    """Under a fresh head nothing can move, and who trains wants a model that scores batches."""
    from transformers import LlamaForCausalLM

    folder = make(tmp_path / "m", "tokenizer alone")
    config = AutoConfig.from_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    rows = jsonl(tmp_path / "rows.jsonl")
    trained = moemerge.train(model=str(folder), pairs=rows, output=tmp_path / "out", max_steps=1, threads=1)
    moe = moemerge.upcycle(model=str(folder), output=tmp_path / "moe", **MOE)
    assert pad_of(trained) == pad_of(moe) == PAD


@pytest.mark.parametrize(("one", "other"), [("both", "config pads with eos"), ("both pad with eos", "none")])
def test_models_that_read_scores_at_different_tokens_are_not_merged(
    one: str, other: str, tmp_path: Path
) -> None:
    folders = [str(make(tmp_path / str(n), padding)) for n, padding in enumerate((one, other))]
    for call in (
        lambda: moemerge.merge_models(folders, tmp_path / "merged"),
        lambda: moemerge.fit_models(folders, jsonl(tmp_path / "rows.jsonl"), tmp_path / "fit"),
    ):
        with pytest.raises(UnsupportedError, match="read their scores at different tokens"):
            call()


def test_other_pad_tokens_that_end_no_text_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [str(make(tmp_path / str(n), padding)) for n, padding in enumerate(("both", "others", "none"))]
    merged = moemerge.merge_models(folders, tmp_path / "merged")
    assert pad_of(merged) == PAD
    assert "pad_token_id" in caplog.text


def test_padding_ends_no_text() -> None:
    config = AutoConfig.for_model("llama", pad_token_id=None, vocab_size=8)
    assert safe_pad(config, [Encoded([5, n], 1) for n in (0, 1, 3)]) == 2
    assert safe_pad(AutoConfig.for_model("llama", pad_token_id=1, vocab_size=8), [Encoded([1, 1], 1)]) == 1


def test_positions_are_those_of_transformers(tmp_path: Path) -> None:
    """Brute force: the last token unequal to pad; the first where there is none."""
    ids_BT = torch.tensor([[3, 0, 4, 0], [0, 0, 0, 0], [0, 0, 5, 6], [7, 0, 0, 0]])
    assert pooled_positions(ids_BT, 0).tolist() == [2, 0, 3, 0]


def test_pairs_are_scored_as_texts(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "none")
    scores_P2 = score_pairs(load_reward_model(folder, "cpu"), load_tokenizer(folder), pairs(), 60)
    assert_same(scores_P2, plain(folder).view(-1, 2))


def test_a_pad_token_beyond_the_vocabulary_is_still_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "both")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": UNKNOWN}))
    with pytest.raises(CheckpointError, match="pad token .* is no token"):
        load_reward_model(folder, "cpu")

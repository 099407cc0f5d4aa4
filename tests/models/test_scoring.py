"""Scoring: equal to a loop over single texts; models that are not whole are refused."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile_files import edit_json
from safetensors.torch import load_file, save_file
from tiny_models import CORE, SIZES, TINY, families, save_dense, tiny_tokenizer, tokenizer_of
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from moemerge.artifacts.progress import PROGRESS
from moemerge.data.pairs import Pair
from moemerge.data.tokenise import Encoded, EncodedPair
from moemerge.errors import CheckpointError, DataError
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.scoring import batches, bradley_terry, score, score_pairs
from moemerge.stages.upcycle import upcycle


def texts(count: int = 40, seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    return [
        Encoded([draw.randrange(3, 60) for _ in range(draw.randrange(1, 60))] + [1], 0) for _ in range(count)
    ]


def one_at_a_time(model: torch.nn.Module, encoded: list[Encoded]) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([text.ids])).logits[0, 0] for text in encoded])


@pytest.mark.parametrize("family", families(CORE))
def test_equals_one_at_a_time_in_the_order_given(family: str, tmp_path: Path) -> None:
    model = load_reward_model(str(save_dense(tmp_path / "m", family)), "cpu")
    encoded = texts()
    expected = one_at_a_time(model, encoded)
    assert expected.std() > 1e-3
    for batch_tokens in (1, 300, 100_000):
        found = score(model, load_tokenizer(str(tmp_path / "m")), encoded, batch_tokens)
        assert found.dtype == torch.float32 and (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_any_padding_of_the_tokenizer_gives_the_same(side: str, pad: str | None, tmp_path: Path) -> None:
    """Also with pad = eos, where the model pools the token before the end, alone as in a batch."""
    ids = {"<pad>": 0, "<eos>": 1, None: None}
    folder = save_dense(tmp_path / "m", pad_token_id=ids[pad])
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = side, pad
    tokenizer.save_pretrained(folder)
    model, loaded = load_reward_model(str(folder), "cpu"), load_tokenizer(str(folder))
    assert loaded.padding_side == side and loaded.pad_token == pad, "the tokenizer is as it lies there"
    assert model.config.pad_token_id == ids[pad]
    found = score(model, loaded, texts(), 300)
    assert (found - one_at_a_time(model, texts())).abs().max() <= 1e-5


NEEDS_A_PAD_TOKEN = {"camembert", "data2vec-text", "mpnet", "roberta", "xlm-roberta", "modernbert-decoder"}


@pytest.mark.parametrize("family", families())
def test_a_pad_token_of_minus_one_is_none_or_refused(family: str, tmp_path: Path) -> None:
    """transformers itself would find no padding then, and take a shorter text's score from a pad token."""
    folder = save_dense(tmp_path / "m", family)
    whole = load_reward_model(str(folder), "cpu")
    edit_json(folder / "config.json", pad_token_id=-1)
    if family in NEEDS_A_PAD_TOKEN:
        with pytest.raises(CheckpointError, match="pad token .* is no token") as caught:
            load_reward_model(str(folder), "cpu")
        assert "set pad_token_id in its config.json" in caught.value.fix
        return
    model, tokenizer = load_reward_model(str(folder), "cpu"), load_tokenizer(str(folder))
    assert model.config.pad_token_id is None, "as transformers reads it: no token is -1"
    assert torch.equal(score(model, tokenizer, texts(8), 300), score(whole, tokenizer, texts(8), 300))


def test_a_moe_of_a_model_with_a_pad_token_of_minus_one(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "m")
    expected = score(load_reward_model(str(folder), "cpu"), load_tokenizer(str(folder)), texts(8), 300)
    edit_json(folder / "config.json", pad_token_id=-1)
    moe = str(upcycle(model=str(folder), output=tmp_path / "moe", num_experts_per_tok=2))
    found = score(load_reward_model(moe, "cpu"), load_tokenizer(moe), texts(8), 300)
    assert (found - expected).abs().max() <= 1e-5
    assert AutoConfig.from_pretrained(moe).pad_token_id != -1


def test_batches_keep_the_token_budget_and_every_row() -> None:
    lengths = [len(text.ids) for text in texts(200)] + [5000]
    groups = list(batches(lengths, 256))
    assert sorted(row for rows in groups for row in rows) == list(range(201))
    assert all(len(rows) == 1 or len(rows) * max(lengths[r] for r in rows) <= 256 for rows in groups)
    padding = sum(len(rows) * max(lengths[r] for r in rows) for rows in groups) / sum(lengths)
    assert padding < 1.05


def test_a_prompt_gated_mixture_is_told_where_prompts_end(dense_folder: Path, tmp_path: Path) -> None:
    draw = {"num_routed_experts": 4, "num_experts_per_tok": 1, "expert_noise": 1.0, "router_init_std": 2.0}
    folder = str(upcycle(model=str(dense_folder), output=tmp_path / "moe", gate="prompt", **draw))
    model, tokenizer = load_reward_model(folder, "cpu"), load_tokenizer(folder)
    encoded = [Encoded(text.ids, 1 + len(text.ids) // 2) for text in texts(20)]
    with torch.no_grad():
        alone = [
            model(torch.tensor([text.ids]), prompt_lengths=torch.tensor([text.prompt_length])).logits[0, 0]
            for text in encoded
        ]
    found = score(model, tokenizer, encoded, 300)
    assert (found - torch.stack(alone)).abs().max() <= 1e-5
    shorter = score(model, tokenizer, [Encoded(text.ids, 1) for text in encoded], 300)
    assert (found - shorter).abs().max() > 1e-4


def test_how_far_it_has_come_is_told(dense_folder: Path) -> None:
    model, tokenizer = load_reward_model(str(dense_folder), "cpu"), load_tokenizer(str(dense_folder))
    score(model, tokenizer, [Encoded([3, 4], 1)] * 5, 4, "test")
    assert PROGRESS.words == ", test: 5 of 5 texts"


def test_no_texts_and_empty_texts(dense_folder: Path) -> None:
    model, tokenizer = load_reward_model(str(dense_folder), "cpu"), load_tokenizer(str(dense_folder))
    assert score(model, tokenizer, [], 100).shape == (0,)
    with pytest.raises(DataError, match="without tokens"):
        score(model, tokenizer, [Encoded([5], 0), Encoded([], 0)], 100)


def test_scores_that_are_not_finite_are_refused(dense_folder: Path) -> None:
    model = load_reward_model(str(dense_folder), "cpu")
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite") as caught:
        score(model, load_tokenizer(str(dense_folder)), texts(3), 100, "rm-b on own")
    assert caught.value.given.startswith("rm-b on own: 3 of 3 texts")


def test_pairs_and_bradley_terry(dense_folder: Path) -> None:
    model, tokenizer = load_reward_model(str(dense_folder), "cpu"), load_tokenizer(str(dense_folder))
    some = texts(10)
    pairs = [EncodedPair(a, b, Pair("", "a", "b")) for a, b in zip(some[:5], some[5:], strict=True)]
    found = score_pairs(model, tokenizer, pairs, 300)
    expected = one_at_a_time(model, some)
    torch.testing.assert_close(found, torch.stack([expected[:5], expected[5:]], dim=1), atol=1e-5, rtol=0)


def test_bradley_terry_counts_ties_as_errors() -> None:
    loss, accuracy = bradley_terry(torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 1.0], [500.0, -500.0]]))
    exact = [torch.tensor(1 + 2.718281828459045**-d).log().item() for d in (1.0, 0.0, -1.0)]
    assert loss == pytest.approx(sum(exact) / 4, abs=1e-6) and accuracy == 0.5
    assert bradley_terry(torch.tensor([[-1e4, 1e4]]))[0] == pytest.approx(2e4)
    with pytest.raises(DataError):
        bradley_terry(torch.empty(0, 2))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", AutoModelForCausalLM),
        ("qwen2", AutoModel),
        ("bert", AutoModel),
        ("bert", AutoModelForMaskedLM),
    ],
)
def test_base_models_get_a_seeded_head_or_are_refused(family: str, kind: type, tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_labels"}
    base = kind.from_config(AutoConfig.for_model(family, **sizes, **TINY[family]))
    base.save_pretrained(tmp_path)
    tokenizer_of(family).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no reward head"):
        load_reward_model(str(tmp_path), "cpu")
    torch.manual_seed(5)
    first = load_reward_model(str(tmp_path), "cpu", fresh_head_seed=3)
    second, third = (load_reward_model(str(tmp_path), "cpu", fresh_head_seed=s) for s in (3, 4))
    found = [score(m, load_tokenizer(str(tmp_path)), texts(), 300) for m in (first, second, third)]
    assert first.config.num_labels == 1
    assert torch.equal(found[0], found[1]) and (found[0] - found[2]).abs().max() > 1e-3
    backbone = base.base_model.state_dict()
    loaded = first.base_model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in backbone.items())


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message", "seed"),
    [
        (without("score"), "no reward head", None),
        (without("layers.1.mlp"), "missing: model.layers.1.mlp.down_proj.weight", None),
        (without("layers.1.mlp"), "missing: model.layers.1.mlp.down_proj.weight", 1),
        (lambda t: {**t, "model.layers.0.foo": torch.ones(2)}, "left over: model.layers.0.foo", None),
        (lambda t: {**t, "model.layers.0.foo": torch.ones(2)}, "left over: model.layers.0.foo", 1),
        (lambda t: {**t, "score.weight": torch.ones(1, 8)}, r"score.weight \(1, 8\), not \(1, 32\)", None),
        (lambda t: {**t, "model.norm.weight": torch.ones(8)}, r"norm.weight \(8,\), not \(32,\)", 1),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    change: Callable[..., dict[str, Tensor]],
    message: str,
    seed: int | None,
    dense_folder: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(dense_folder, tmp_path / "m")
    tensors = change(load_file(dense_folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_reward_model(str(folder), "cpu", fresh_head_seed=seed)


def test_pickled_weights_are_refused(dense_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense_folder, tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    load_reward_model(str(folder), "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled weights"):
        load_reward_model(str(folder), "cpu")


def test_other_faults_of_a_checkpoint(dense_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="2 outputs"):
        load_reward_model(str(save_dense(tmp_path / "two", num_labels=2)), "cpu")
    with pytest.raises(CheckpointError, match="model cannot be found"):
        load_reward_model(str(tmp_path / "nowhere"), "cpu")
    with pytest.raises(CheckpointError, match="model cannot be found"):
        load_tokenizer(str(tmp_path / "nowhere"))
    cut = shutil.copytree(dense_folder, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        load_reward_model(str(cut.parent), "cpu")


def test_dtype(tmp_path: Path) -> None:
    folder = str(save_dense(tmp_path / "m", dtype="bfloat16"))
    assert load_reward_model(folder, "cpu").dtype == torch.float32
    assert load_reward_model(folder, "cpu", torch.bfloat16).dtype == torch.bfloat16

"""DogeRM: a reward model and a language model of one base; heads, vocabularies, the weight that is chosen."""

from __future__ import annotations

import json
import random
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_moe import random_pairs, rewrite, stock_merge, write_rows
from tiny_models import SIZES, TINY, VOCABULARY, tiny_dense, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import encode_pairs
from moemerge.errors import CheckpointError, OptionError, UnsupportedError
from moemerge.merging.coefficients import Coefficients
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.portable import make_portable
from moemerge.models.scoring import score_pairs
from moemerge.options.base import TextFormat
from moemerge.stages.export import export
from moemerge.stages.fit import fit_models
from moemerge.stages.merge import merge_models

EMBED = "model.embed_tokens.weight"


def save(folder: Path, model: torch.nn.Module, extra: list[str], rows: int | None = None) -> str:
    """`model`, its tensors made lively, with the tiny tokenizer and `extra` tokens; `rows` of embeddings."""
    model.resize_token_embeddings(rows or len(VOCABULARY) + len(extra), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(extra)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(len(str(folder)) + sum(map(ord, "".join(extra))))
    return str(rewrite(folder, lambda _, t: t + 0.2 * torch.randn(t.shape, generator=generator)))


def reward_model(folder: Path, extra: list[str] | None = None, rows: int | None = None, seed: int = 0) -> str:
    return save(folder, tiny_dense("llama", seed), extra or [], rows)


def language_model(
    folder: Path,
    extra: list[str] | None = None,
    rows: int | None = None,
    family: str = "llama",
    **changes: Any,
) -> str:
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **{**SIZES, **TINY[family], **changes})
    return save(folder, AutoModelForCausalLM.from_config(config).float(), extra or [], rows)


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def given(folder: Path, weight: float) -> str:
    """Coefficients with the reward model at `weight`."""
    alpha_LN, shared_L = torch.ones(4, 1, dtype=torch.float64), torch.full((4,), weight, dtype=torch.float64)
    Coefficients(["outside", "layers.0", "layers.1", "layers.2"], alpha_LN, shared_L).save(folder)
    return str(folder)


def doge(rm: str, lm: str, output: Path, weight: float, **options: Any) -> Path:
    coefficients = given(output.with_suffix(".c"), weight)
    return merge_models([lm], output, base=rm, scope="body", coefficients=coefficients, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_the_average_by_hand(tied: bool, tmp_path: Path) -> None:
    """Head kept, the language model's left out, all else (1 - t) RM + t LM."""
    rm = reward_model(tmp_path / "rm")
    lm = language_model(tmp_path / "lm", tie_word_embeddings=tied)
    assert ("lm_head.weight" in weights(lm)) != tied
    merged = doge(rm, lm, tmp_path / "m", 0.7)
    found, ours, theirs = weights(merged), weights(rm), weights(lm)
    assert found.keys() == ours.keys()
    assert torch.equal(found["score.weight"], ours["score.weight"])
    for name in found.keys() - {"score.weight"}:
        expected = 0.7 * ours[name].double() + 0.3 * theirs[name].double()
        torch.testing.assert_close(found[name].double(), expected, atol=3e-7, rtol=0)
    load_reward_model(str(merged), "cpu")


def test_with_all_the_weight_it_is_the_reward_model_bit_for_bit(tmp_path: Path) -> None:
    rm, lm = reward_model(tmp_path / "rm", ["<rm>"]), language_model(tmp_path / "lm")
    found, ours = weights(doge(rm, lm, tmp_path / "m", 1.0)), weights(rm)
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in found)


def test_every_token_keeps_its_embedding(tmp_path: Path) -> None:
    """Tokens of both are averaged, those of one are its own; ids of the reward model stay as they are."""
    rm = reward_model(tmp_path / "rm", ["<both>", "<rm>"], rows=70)
    lm = language_model(tmp_path / "lm", ["<lm>", "<both>", "<lm2>"])
    merged = doge(rm, lm, tmp_path / "m", 0.6)
    tokenizer, ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (merged, rm, lm))
    table, mine, other = (weights(place)[EMBED] for place in (merged, rm, lm))
    assert len(tokenizer) == len(VOCABULARY) + 4 and len(table) == 70
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == 70
    for token, row in tokenizer.get_vocab().items():
        a, b = ours.get_vocab().get(token), theirs.get_vocab().get(token)
        if b is None:
            assert row == a and torch.equal(table[row], mine[a]), token
        elif a is None:
            assert torch.equal(table[row], other[b]), token
        else:
            expected = 0.6 * mine[a].double() + 0.4 * other[b].double()
            assert row == a
            torch.testing.assert_close(table[row].double(), expected, atol=3e-7, rtol=0)
    assert torch.equal(table[len(tokenizer) :], mine[len(tokenizer) :]), "rows without a token stay"
    assert tokenizer.tokenize("w1 <lm2> w2") == ["w1", "<lm2>", "w2"]
    load_reward_model(str(merged), "cpu")


def test_the_table_grows_where_it_must(tmp_path: Path) -> None:
    rm, lm = reward_model(tmp_path / "rm"), language_model(tmp_path / "lm", ["<a>", "<b>"])
    merged = doge(rm, lm, tmp_path / "m", 0.5)
    config = json.loads((merged / "config.json").read_text())
    assert config["vocab_size"] == len(VOCABULARY) + 2 == len(weights(merged)[EMBED])
    ids = load_tokenizer(str(merged))("w1 <b>")["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def labelled_by(judge: Path, folder: Path, wrong: float = 0.0, subsets: tuple[str, ...] = ("",)) -> Path:
    """Pairs whose chosen answer is the one that `judge` scores higher, but for a share of `wrong` ones."""
    rows, draw = random_pairs(120, seed=8, subsets=subsets), random.Random(0)
    pairs, report = read_pairs(str(write_rows(folder / "raw.jsonl", rows)), TextFormat())
    tokenizer = load_tokenizer(str(judge))
    encoded = encode_pairs(tokenizer, pairs, TextFormat(), report)
    scores_P2 = score_pairs(load_reward_model(str(judge), "cpu"), tokenizer, encoded, 10_000)
    for row, (chosen, rejected) in zip(rows, scores_P2.tolist(), strict=True):
        if (chosen < rejected) != (draw.random() < wrong):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return write_rows(folder / "pairs.jsonl", rows)


def test_the_weight_is_chosen_on_pairs(tmp_path: Path) -> None:
    """Pairs labelled by the merge at 0.3: the grid finds 0.3, and says what it brings on held-out pairs."""
    rm, lm = reward_model(tmp_path / "rm"), language_model(tmp_path / "lm")
    judge = doge(rm, lm, tmp_path / "judge", 0.3)
    folder = fit_models(
        [lm], labelled_by(judge, tmp_path), tmp_path / "fit", base=rm, scope="body", method="grid",
        shared_weight=1.0, grid=[0.0, 0.3, 0.6, 1.0],
    )  # fmt: skip
    found, told = Coefficients.load(folder), json.loads((folder / "report.json").read_text())
    assert found.shared_L.tolist() == [0.3] * 4 and found.alpha_LN.tolist() == [[1.0]] * 4
    losses = {point["shared_weight"]: point["loss"] for point in told["grid"]}
    assert min(losses, key=losses.__getitem__) == 0.3 and len(losses) == 4
    assert told["held_out"]["after"]["accuracy"] == 1.0 > told["held_out"]["before"]["accuracy"]
    merged = weights(merge_models([lm], tmp_path / "m", base=rm, scope="body", coefficients=folder))
    expected = weights(judge)
    assert all(torch.equal(merged[name], expected[name]) for name in merged)


def scaled(rm: str, factor: float, folder: Path) -> str:
    """The reward model with a head of so many times the size."""
    copytree(rm, folder)
    return str(rewrite(folder, lambda name, t: t * factor if name == "score.weight" else t))


@pytest.mark.parametrize("judge", ["calibrated", "accuracy"])
def test_the_heads_size_plays_no_part_in_the_choice(judge: str, tmp_path: Path) -> None:
    """Nor in what decides it."""
    rm, lm = reward_model(tmp_path / "rm"), language_model(tmp_path / "lm")
    pairs = labelled_by(doge(rm, lm, tmp_path / "judge", 0.3), tmp_path, wrong=0.3)

    def chosen(factor: float) -> tuple[float, list[float]]:
        folder = fit_models(
            [lm], pairs, tmp_path / f"fit-{factor}", base=scaled(rm, factor, tmp_path / f"rm-{factor}"),
            scope="body", method="grid", shared_weight=1.0, judge=judge,
            grid=[0.0, 0.15, 0.3, 0.45, 0.6, 1.0],
        )  # fmt: skip
        told = json.loads((folder / "report.json").read_text())
        return Coefficients.load(folder).shared_L[0].item(), [point["judged"] for point in told["grid"]]

    (one, at_1), (ten, at_10), (thousandth, at_0) = (chosen(factor) for factor in (1.0, 10.0, 0.001))
    assert one == ten == thousandth == 0.3
    assert at_1 == pytest.approx(at_10, abs=1e-5) and at_1 == pytest.approx(at_0, abs=1e-5)


def test_the_curve_is_that_of_each_merge(tmp_path: Path) -> None:
    """Each weight's accuracy by subset, counted with the merge on disk."""
    rm, lm = reward_model(tmp_path / "rm"), language_model(tmp_path / "lm")
    pairs = labelled_by(doge(rm, lm, tmp_path / "judge", 0.3), tmp_path, subsets=("chat", "math"))
    grid = [0.0, 0.5, 1.0]
    out = fit_models([lm], pairs, tmp_path / "fit", base=rm, scope="body", method="grid", grid=grid,
                     curve={"test": str(pairs)})  # fmt: skip
    rows = json.loads((out / "report.json").read_text())["curve"]
    assert [(row["subset"], row["shared_weight"]) for row in rows] == [
        (subset, weight) for subset in ("all", "chat", "math") for weight in grid
    ]
    for weight in grid:
        merged = doge(rm, lm, tmp_path / f"m-{weight}", weight)
        tokenizer = load_tokenizer(merged)
        read, report = read_pairs(str(pairs), TextFormat())
        encoded = encode_pairs(tokenizer, read, TextFormat(), report)
        scores_P2 = score_pairs(load_reward_model(merged, "cpu"), tokenizer, encoded, 10_000)
        right_P = scores_P2[:, 0] > scores_P2[:, 1]
        for row in (row for row in rows if row["shared_weight"] == weight):
            mine = torch.tensor([row["subset"] in ("all", pair.subset) for pair in read])
            assert row["accuracy"] == pytest.approx(right_P[mine].double().mean().item())
            assert row["pairs"] == mine.sum() and row["low"] <= row["accuracy"] <= row["high"]
    assert (out / "curve.png").exists() and "curve.png" in (out / "fit.md").read_text()
    with pytest.raises(OptionError, match="curve goes with method grid"):
        fit_models([lm], pairs, tmp_path / "no", base=rm, scope="body", curve={"test": str(pairs)})


@pytest.mark.slow
def test_a_weight_per_layer_is_learned(tmp_path: Path) -> None:
    rm, lm = reward_model(tmp_path / "rm"), language_model(tmp_path / "lm")
    pairs = labelled_by(doge(rm, lm, tmp_path / "judge", 0.2), tmp_path)
    folder = fit_models(
        [lm], pairs, tmp_path / "fit", base=rm, scope="body", shared_weight="learned", level=1.0,
    )  # fmt: skip
    found = Coefficients.load(folder)
    assert len(set(found.shared_L.tolist())) == 4 and bool(
        ((found.shared_L > 0) & (found.shared_L < 1)).all()
    )


def test_the_language_model_as_a_reward_model_for_stock_mergekit(tmp_path: Path) -> None:
    """What mergekit refuses or breaks by itself: export writes both as reward models of one vocabulary."""
    rm, lm = reward_model(tmp_path / "rm", ["<rm>"]), language_model(tmp_path / "lm", ["<lm>"])
    coefficients = given(tmp_path / "c", 0.7)
    options: dict[str, Any] = {"models": [lm], "base": rm, "scope": "body", "coefficients": coefficients}
    folder = export(**options, output=tmp_path / "e")
    assert {path.name for path in folder.iterdir()} == {"base", "model-0", "linear.yml", "manifest.json"}
    for name in ("base", "model-0"):
        load_reward_model(str(folder / name), "cpu")
        assert torch.equal(Checkpoint(folder / name).tensor("score.weight"), weights(rm)["score.weight"])
    stock_merge(folder / "linear.yml", tmp_path / "stock")
    merged = merge_models(
        [lm], tmp_path / "m", base=rm, scope="body", coefficients=coefficients, method="linear",
        parameters={"normalize": False},
    )  # fmt: skip
    found, ours = weights(tmp_path / "stock"), weights(merged)
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in found)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    rm, lm = reward_model(tmp_path / "rm"), language_model(tmp_path / "lm")

    def refused(kind: type[Exception], word: str, **options: Any) -> None:
        with pytest.raises(kind, match=word):
            merge_models(output=tmp_path / "refused", **options)
        assert not (tmp_path / "refused").exists()

    refused(UnsupportedError, "no reward head to merge", models=[lm], base=rm)
    refused(CheckpointError, "has no reward head", models=[rm], base=lm, scope="body")
    other = language_model(tmp_path / "other", family="mistral")
    refused(UnsupportedError, "model_type mistral", models=[other], base=rm, scope="body")
    deep = language_model(tmp_path / "deep", num_hidden_layers=4)
    refused(UnsupportedError, "layers.3", models=[deep], base=rm, scope="body")
    with pytest.raises(OptionError, match="method grid has no weight to choose"):
        pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(4))
        fit_models([rm, rm], pairs, tmp_path / "f", method="grid")


def test_a_classic_pad_token_of_the_reward_model_survives(tmp_path: Path) -> None:
    """DogeRM's own code starts from the language model's table and loses it."""
    rm, lm = reward_model(tmp_path / "rm", ["[PAD]"]), language_model(tmp_path / "lm")
    merged = doge(rm, lm, tmp_path / "m", 0.2)
    row = AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids("[PAD]")
    assert row == len(VOCABULARY) and torch.equal(weights(merged)[EMBED][row], weights(rm)[EMBED][row])
    make_portable(Path(rm))  # as merge does with what it writes
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (Path(rm) / name).read_bytes()

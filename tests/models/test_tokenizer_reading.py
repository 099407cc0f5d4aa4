"""Texts are read as tokenizer.json says, or it is told or refused that they are not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tiny_models import save_dense, tiny_qwen_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moemerge.errors import CheckpointError
from moemerge.models.loading import load_tokenizer
from moemerge.stages.evaluate import evaluate


def by_letters(folder: Path) -> Path:
    """A tokenizer of bytes that splits at white space only, where Qwen's class splits off each digit, too."""
    vocabulary = tiny_qwen_tokenizer().get_vocab()
    core = Tokenizer(models.BPE({**vocabulary, "12": len(vocabulary)}, [("1", "2")]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_a_tokenizer_that_reads_nothing_is_refused(tmp_path: Path) -> None:
    """transformers reads every text as no token at all, and each score would be that of the end token."""
    folder = save_dense(tmp_path / "rm", "qwen2")
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(CheckpointError, match="rm reads nothing of a text") as caught:
        load_tokenizer(str(folder))
    assert "Qwen2Tokenizer" in caught.value.given
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1", "chosen": " w2", "rejected": " w3"}\n')
    with pytest.raises(CheckpointError, match="reads nothing"):
        evaluate(models=[str(folder)], pairs=[str(tmp_path / "p.jsonl")], output=tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_tokenizer_that_reads_otherwise_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = by_letters(save_dense(tmp_path / "rm", "qwen2"))
    with caplog.at_level(logging.WARNING, "moemerge"):
        load_tokenizer(str(folder))
    assert "Qwen2Tokenizer, which transformers takes" in caplog.text
    assert "otherwise than tokenizer.json says" in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "bert", "gemma2", "modernbert"])
def test_one_that_reads_as_its_file_is_not_told(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_dense(tmp_path / "rm", family)
    with caplog.at_level(logging.WARNING, "moemerge"):
        assert load_tokenizer(str(folder))("w1 w23")["input_ids"]
    assert [record for record in caplog.records if record.name.startswith("moemerge")] == []


def test_padding_and_truncation_of_the_file_are_no_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_dense(tmp_path / "rm", "qwen2")
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.enable_padding(length=64)
    core.enable_truncation(3)
    core.save(str(folder / "tokenizer.json"))
    with caplog.at_level(logging.WARNING, "moemerge"):
        load_tokenizer(str(folder))
    assert caplog.text == ""


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_file_is_what_is_read(family: str, tmp_path: Path) -> None:
    """By a type's own class or by the plain one, against the tokenizers library itself."""
    folder = by_letters(save_dense(tmp_path / "rm", family))
    meant = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("w12 w3", add_special_tokens=False).ids
    assert load_tokenizer(str(folder))("w12 w3", add_special_tokens=False)["input_ids"] == meant

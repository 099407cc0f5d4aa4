"""Lists of models that differ in more than weights: what is lost or dropped is told in a line each."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_dense, tiny_tokenizer

from moemerge.models.portable import make_portable
from moemerge.stages.merge import merge_models

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [save_dense(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]


def merged(folders: list[Path], **options: object) -> Path:
    return merge_models(folders, folders[0].parent / "merged", **options)  # type: ignore[arg-type]


def cast(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chat_template": TEMPLATE}, "in chat_template;"),
        ({"pad_token": "<eos>"}, "in pad_token;"),
        ({"eos_token": "<unk>", "bos_token": "<eos>"}, "in bos_token, eos_token;"),
    ],
)
@pytest.mark.parametrize("scope", ["all", "mlp"])
def test_tokenizers_that_make_other_texts_are_told(
    change: dict[str, str], words: str, scope: str, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    for name, value in change.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folders[1])
    out = merged(folders, scope=scope)
    lines = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1 and words in lines[0] and str(folders[1]) in lines[0]
    make_portable(folders[0])  # as merge does with what it writes
    kept = (folders[0] / "tokenizer_config.json").read_text()
    assert json.loads((out / "tokenizer_config.json").read_text()) == json.loads(kept)


def test_tokens_put_around_a_text_are_told(folders: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save_pretrained(folders[1])
    merged(folders)
    assert "in the tokens put around a text;" in caplog.text


def test_equal_models_say_nothing(folders: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    merged(folders)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_bits_that_the_first_models_dtype_cannot_hold_are_told(
    folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The remedy gives the average of what the models hold, to float32's last digits."""
    cast(folders[0], torch.bfloat16)
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    out = load_file(merged(folders) / "model.safetensors")
    assert "need float32, and the result is bfloat16" in caplog.text and "dtype: float32" in caplog.text
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}
    caplog.clear()
    whole = merge_models(folders, folders[0].parent / "whole", dtype="float32")
    assert "loses bits" not in caplog.text
    for name, tensor in load_file(whole / "model.safetensors").items():
        expected = (first[name].double() + second[name].double()) / 2
        assert (tensor.double() - expected).abs().max() <= 1e-7 * expected.abs().max()


def test_bits_are_not_lost_where_the_first_is_the_widest(
    folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    cast(folders[1], torch.bfloat16)
    merged(folders)
    assert "loses bits" not in caplog.text


@pytest.mark.parametrize(
    ("parameters", "factor", "words"),
    [
        ({"weight": 0.7}, 1.0, "divides by their sum: all count alike"),
        (
            {"weight": 0.7, "normalize": False},
            1.4,
            "sum to 1.4, and linear does not divide by that",
        ),
        ({"weight": 0.5, "normalize": False}, 1.0, None),
    ],
)
def test_weights_that_do_not_sum_to_one_are_told(
    parameters: dict[str, float | bool],
    factor: float,
    words: str | None,
    folders: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And what is told is what happens to the weights."""
    out = load_file(merged(folders, method="linear", parameters=parameters) / "model.safetensors")
    first, second = (load_file(folder / "model.safetensors")["score.weight"] for folder in folders)
    assert torch.allclose(out["score.weight"], factor * (first + second) / 2, atol=1e-6)
    # What is told is a warning; lines of information, shown after some tests, name the folder of this one.
    told = " ".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert (words in told) if words else "sum" not in told

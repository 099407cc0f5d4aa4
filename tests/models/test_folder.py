"""The opened model folder: what it says of a model, and the one place where a model is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_moe import make_moe
from tiny_models import SIZES, TINY, save_dense, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from moemerge.errors import CheckpointError, UnsupportedError
from moemerge.models.folder import ModelFolder, opened


def save_base(folder: Path, family: str = "llama") -> Path:
    """A language model, without a reward head, and its tokenizer."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_labels"}
    config = AutoConfig.for_model(family, **sizes, **TINY[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_reward_model(tmp_path: Path) -> None:
    model = ModelFolder(save_dense(tmp_path / "dense"))
    assert (model.kind, model.model_type, model.dense_type) == ("dense", "llama", "llama")
    assert model.claims_head and model.head_names == ["score.weight"] and model.missing_head == []
    assert model.config is model.config and model.weights is model.weights
    assert opened(model) is model and opened(str(tmp_path / "dense")).folder == model.folder
    model.require_dense()
    model.require_one_output()
    with pytest.raises(CheckpointError, match="dense is not a MoE made by moemerge"):
        model.require_moe()


def test_a_moe(tmp_path: Path) -> None:
    model = ModelFolder(make_moe(tmp_path / "moe"))
    assert (model.kind, model.model_type, model.dense_type) == ("moe", "moemerge_llama", "llama")
    assert model.claims_head and model.head_names == ["score.weight"]
    model.require_moe()
    with pytest.raises(UnsupportedError, match="moe is a MoE made by moemerge"):
        model.require_dense()


def test_a_native_moe(tmp_path: Path) -> None:
    MixtralConfig(vocab_size=64, num_labels=1).save_pretrained(tmp_path)
    assert ModelFolder(tmp_path).kind == "native"


def test_a_base_model_lacks_its_head(tmp_path: Path) -> None:
    model = ModelFolder(save_base(tmp_path / "base"))
    assert not model.claims_head
    assert model.missing_head == model.head_names == ["score.weight"]
    assert model.dense_names["model.norm.weight"] == "model.norm.weight"


def test_the_pad_token_is_the_configs_alone(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "dense")
    for written, read in ((5, 5), (None, None), (-1, None)):
        edit(folder, pad_token_id=written)
        assert ModelFolder(folder).config.pad_token_id == read


def test_one_output_is_asked_for_in_one_way(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="two is not a reward model") as caught:
        ModelFolder(save_dense(tmp_path / "two", num_labels=2)).require_one_output()
    assert caught.value.given == "2 outputs"


def test_a_file_and_nothing_at_all_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    for source in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="model cannot be found"):
            ModelFolder(source)


def test_a_tokenizer_needs_no_model_beside_it(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="config cannot be read"):
        ModelFolder(tmp_path).config  # noqa: B018 (reading it is the test)

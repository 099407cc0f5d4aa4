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


@pytest.mark.parametrize("source", ["./rm-aa", "no/such/folder", "rm-a/config.json", "/nowhere/rm"])
def test_what_cannot_be_on_the_hub_is_not_asked_for_there(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dense(tmp_path / "rm-a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match="model cannot be found") as caught:
        ModelFolder(source)
    assert ("did you mean 'rm-a'?" in caught.value.fix) == (source == "./rm-aa")
    assert ("it lies in: rm-a" in caught.value.fix) == (source == "rm-a/config.json")


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(source: str, name: str, **how: Any) -> None:
        asked.append(name)
        raise OSError("We couldn't connect to the hub")

    save_dense(tmp_path / "reward-model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("transformers.utils.hub.cached_file", fetch)
    with pytest.raises(CheckpointError, match="cannot be found: reward-modl") as caught:
        ModelFolder("reward-modl")
    assert asked == ["config.json"] and "couldn't connect" in caught.value.given
    assert "'reward-model'" in caught.value.fix and "network" in caught.value.fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="unset HF_HUB_OFFLINE"):
        ModelFolder("owner/reward-model")


def test_a_name_that_is_not_cached_says_so_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="couldn't find them in the cached files"):
        ModelFolder("owner/reward-model")

"""Configs of strangers: what has no sense, or would be made without end, is refused with its own name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile_files import RECIPE, copy_model, dense_and_pairs, edit_json
from refusals import refused
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

import moemerge
from moemerge.errors import CheckpointError
from moemerge.models.config_values import check_values
from moemerge.models.configs import _check_names

UNNAMED = {"id2label": None, "label2id": None}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and pairs. Read only."""
    return dense_and_pairs(tmp_path_factory.mktemp("world"))


def recipe(folder: Path, model: Path, world: Path) -> Path:
    text = RECIPE.replace("dense", str(model)).replace("pairs.jsonl", str(world / "pairs.jsonl"))
    (folder / "recipe.yml").write_text(text)
    return folder / "recipe.yml"


# Seen in config.json itself, so that `moemerge check` sees it.
READ: dict[str, tuple[dict[str, Any], str]] = {
    "billion_labels": ({**UNNAMED, "num_labels": 10**9}, "num_labels 1000000000"),
    "billion_labels_of_old": ({**UNNAMED, "_num_labels": 10**9}, "_num_labels 1000000000"),
    "billion_labels_within": ({"text_config": {"num_labels": 10**9}}, "num_labels 1000000000"),
    "names_of_labels": ({"id2label": {str(i): "x" for i in range(300_000)}}, "id2label names 300000"),
    "labels_below_zero": ({**UNNAMED, "num_labels": -5}, "num_labels -5"),
    "labels_are_text": ({**UNNAMED, "num_labels": "x"}, "num_labels 'x'"),
    "equal_layers": ({"num_hidden_layers": 100_000}, "num_hidden_layers 100000"),
    "layers_within": ({"text_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers 1000000"),
    "layers_of_another_family": ({"model_type": "bart", "encoder_layers": 10**9}, "encoder_layers"),
    "attention_types": (
        {"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]},
        "attention_types",
    ),
    "attention_times": (
        {"model_type": "gpt_neo", "attention_types": [[["global"] * 1000, 1000]] * 10},
        "attention_types stands for more than 1000 layers",
    ),
    "blocks": ({"model_type": "funnel", "block_sizes": [4, 10**9]}, "block_sizes"),
    "width_below_zero": ({"hidden_size": -5}, "hidden_size -5"),
    "vocabulary_below_zero": ({"vocab_size": -1}, "vocab_size -1"),
    "no_heads": ({"num_attention_heads": 0}, "num_attention_heads 0"),
    "heads_below_zero": ({"head_dim": -1}, "head_dim -1"),
    "window_below_zero": ({"sliding_window": -1}, "sliding_window -1"),
    "dtype_of_no_text": ({"dtype": 0.5}, "dtype '0.5'"),
    "dtype_unknown": ({"dtype": "float33"}, "dtype 'float33'"),
    "dtype_of_integers": ({"dtype": "int8"}, "dtype 'int8'"),
    "dtype_is_a_class": ({"dtype": "Tensor"}, "dtype 'Tensor'"),
    "dtype_is_a_module": ({"torch_dtype": "nn"}, "torch_dtype 'nn'"),
    "dtype_is_a_list": ({"dtype": None, "torch_dtype": ["float32"]}, "torch_dtype"),
    "base_of_positions": ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta 0"),
    "factor_below_zero": ({"rope_scaling": {**LINEAR, "factor": -1.0}}, "factor -1.0"),
    "factor_is_text": ({"rope_scaling": {**LINEAR, "factor": "x"}}, "factor 'x'"),
    "not_a_number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
    "infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps inf"),
    "dropout_of_five": ({"attention_dropout": 5.0}, "attention_dropout 5.0"),
    "tuples": ({"return_dict": False}, "return_dict False"),
    "attentions": ({"output_attentions": True}, "output_attentions True"),
}
# Seen when transformers' class takes it, or beside the weights.
USED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "silo"}, "did you mean 'silu'?"),
    "activation_is_a_list": ({"hidden_act": ["silu"]}, "hidden_act"),
    "activation_is_a_number": ({"hidden_act": 5}, "hidden_act"),
    "kind_of_positions": ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "did you mean 'yarn'?"),
    "positions_are_text": ({"rope_scaling": "x"}, "rope_parameters"),
    "nothing_for_yarn": ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
    "layer_types": ({"layer_types": ["full_attention"] * 100_000}, "layer_types"),
    "names_are_a_list": ({"id2label": ["x"]}, "the model's config cannot be read"),
    "thousand_wide_layers": (
        {"num_hidden_layers": 1000, "hidden_size": 10**6, "num_attention_heads": 100},
        "config",
    ),
    "huge_heads": ({"head_dim": 10**12}, "config"),
    "huge_mlp": ({"intermediate_size": 10**15}, "config"),
    "text_config_is_a_number": ({"text_config": 5}, "the model's config cannot be read"),
}


@pytest.mark.parametrize("name", [*READ, *USED])
def test_nonsense_is_named(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = (READ | USED)[name]
    model = copy_model(world / "dense", tmp_path / "model")
    edit_json(model / "config.json", **change)
    if name in READ:
        assert reason in refused(["check", recipe(tmp_path, model, world)], tmp_path, capsys)
    command = ["evaluate", "--models", f"m={model}", "--pairs", f"t={world / 'pairs.jsonl'}"]
    assert reason in refused([*command, "--output", tmp_path / "out"], tmp_path, capsys)
    with pytest.raises(CheckpointError) as caught:
        moemerge.upcycle(model=str(model), output=tmp_path / "out")
    assert reason in str(caught.value)


def test_as_many_positions_as_a_config_may_say_take_no_memory(world: Path, tmp_path: Path) -> None:
    model = copy_model(world / "dense", tmp_path / "model")
    edit_json(model / "config.json", max_position_embeddings=10**12)
    moemerge.upcycle(model=str(model), output=tmp_path / "moe")


@pytest.mark.parametrize("kind", sorted(set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)))
def test_configs_of_transformers_pass(kind: str) -> None:
    config = CONFIG_MAPPING[kind]()
    check_values(json.loads(config.to_json_string(use_diff=False)))
    _check_names(config)

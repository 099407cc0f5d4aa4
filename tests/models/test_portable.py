"""What transformers 4 finds in a folder that version 5 wrote; test_peers.py asks version 4 itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_dense, scores
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from moemerge.models.portable import make_portable, name_label

YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 32}
BY_LAYER = {"full_attention": {"rope_type": "default", "rope_theta": 9.0}}


def written(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    ("rope", "older"),
    [
        ({"rope_type": "default", "rope_theta": 50.0}, {"rope_theta": 50.0}),
        (YARN, {"rope_theta": 50.0, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}}),
    ],
)
def test_positions_have_their_older_names_and_stay_the_same(
    rope: dict[str, Any], older: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_dense(tmp_path / "m", rope_parameters=rope)
    load = AutoModelForSequenceClassification.from_pretrained
    before, known = scores(load(folder)), AutoConfig.from_pretrained(folder).rope_parameters
    make_portable(folder)
    config = written(folder, "config.json")
    assert older.items() <= config.items() and config["rope_parameters"] == known
    assert AutoConfig.from_pretrained(folder).rope_parameters == known
    assert torch.equal(scores(load(folder)), before)


def test_a_label_without_a_name_is_called_reward() -> None:
    for given, named in (("LABEL_0", "reward"), ("good", "good")):
        config = AutoConfig.for_model("llama", id2label={0: given}, label2id={given: 0})
        name_label(config)
        assert config.id2label == {0: named} and config.label2id == {named: 0}


def test_what_needs_no_change_is_not_written(tmp_path: Path) -> None:
    texts = {
        "config.json": json.dumps({"rope_parameters": BY_LAYER, "id2label": {"0": "good"}}),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "BertTokenizer", "backend": "x"}),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    make_portable(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in texts} == texts


def test_the_tokenizer_has_a_class_that_both_versions_know(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<mine>"]})
    tokenizer.save_pretrained(folder)
    assert written(folder, "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    make_portable(folder)
    values = written(folder, "tokenizer_config.json")
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert values["model_input_names"] == ["input_ids", "attention_mask"]
    assert "extra_special_tokens" not in values and values["additional_special_tokens"] == ["<mine>"]
    again, text = AutoTokenizer.from_pretrained(folder), "w1 <mine> w2"
    assert again(text) == tokenizer(text) and again.all_special_tokens == tokenizer.all_special_tokens

"""A reward head is never replaced in silence: by whatever name it is stored, and at whatever door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_moe import write_rows
from tiny_models import save_dense, tiny_dense, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

import moemerge
from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import CheckpointError
from moemerge.models.folder import ModelFolder
from moemerge.models.guards import check_reward_model
from moemerge.models.head_tensors import foreign_head
from moemerge.models.loading import load_reward_model

MOE: dict[str, Any] = {"num_routed_experts": 2, "num_experts_per_tok": 1}


def rewrite(folder: Path, rename: dict[str, str | None], classes: list[str] | None = None) -> Path:
    """Call tensors by other names (None: drop them), and the model by other classes."""
    path = folder / "model.safetensors"
    tensors = {rename.get(name, name): tensor for name, tensor in load_file(path).items()}
    save_file({n: t for n, t in tensors.items() if n}, path, metadata={"format": "pt"})
    if classes is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": classes}))
    return folder


def rows(tmp_path: Path) -> str:
    values: Any = [{"prompt": f"w{n} ", "chosen": f"w{n + 20} w3", "rejected": "w5"} for n in range(8)]
    return str(write_rows(tmp_path / "rows.jsonl", values))


def doors(folder: Path, tmp_path: Path) -> list[Callable[[], object]]:
    """Every way in: to be scored, merged by us and by mergekit, upcycled, trained."""
    name, output = str(folder), tmp_path / "out"
    return [
        lambda: load_reward_model(name, "cpu"),
        lambda: check_reward_model(name),
        lambda: moemerge.merge_models([name, name], output),
        lambda: moemerge.upcycle(model=name, output=output, **MOE),
        lambda: moemerge.train(model=name, pairs=rows(tmp_path), output=output, max_steps=1, threads=1),
    ]


OTHER_NAMES = [
    "v_head.summary.weight", "v_head.weight", "value_head.weight", "reward_head.weight", "rm_head.weight",
    "classifier.weight", "summary.weight", "regression_head.weight", "scorer.weight", "model.score.weight",
    "classification_head.out_proj.weight", "rewardmodel.reward.weight", "score.0.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_heads_of_other_tools_are_known_by_name(name: str) -> None:
    assert foreign_head(name)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight", "cls.predictions.bias", "model.lm_head.weight", "mask_predictions.classifier.bias",
        "model.layers.0.self_attn.head_norm.weight", "h.1.attn.head.bias", "model.norm.weight", "pooler.bias",
        "generator_lm_head.weight", "vocab_projector.bias",
    ],
)  # fmt: skip
def test_other_tensors_are_no_reward_heads(name: str) -> None:
    assert not foreign_head(name)


@pytest.mark.parametrize("classes", [["LlamaForSequenceClassification"], ["LlamaForCausalLM"]])
def test_a_head_under_another_name_is_named_at_every_door(classes: list[str], tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "m")
    rewrite(folder, {"score.weight": "v_head.summary.weight"}, classes)
    score, mergekit, *others = doors(folder, tmp_path)
    # mergekit's door takes no causal LM at all, whatever it holds
    for door in (score, *others, *([mergekit] if "CausalLM" not in classes[0] else [])):
        with pytest.raises(CheckpointError, match="under another name") as caught:
            door()
        assert "v_head.summary.weight" in caught.value.given
        assert "rename v_head.summary.weight to score.weight" in caught.value.fix


@pytest.mark.parametrize("file", ["value_head.safetensors", "value_head.bin"])
def test_so_is_a_head_in_a_file_beside_the_weights(file: str, tmp_path: Path) -> None:
    """LLaMA-Factory and ms-swift write one beside a causal LM, which looks like a base model."""
    folder = rewrite(save_dense(tmp_path / "m"), {"score.weight": None}, ["LlamaForCausalLM"])
    save_file({"v_head.summary.weight": torch.ones(1, 32)}, folder / file)
    _, _, merge, upcycle, train = doors(folder, tmp_path)
    for door in (upcycle, train, merge):
        with pytest.raises(CheckpointError, match="under another name") as caught:
            door()
        assert file in caught.value.given


def test_a_dropped_head_is_said_to_be_dropped_at_every_door(tmp_path: Path) -> None:
    """No remedy leads to a door that refuses the model too."""
    folder = rewrite(save_dense(tmp_path / "m"), {"score.weight": None})
    for door in doors(folder, tmp_path):
        with pytest.raises(CheckpointError, match="has no reward head") as caught:
            door()
        assert "dropped the head" in caught.value.fix and "fresh_head: true" in caught.value.fix


@pytest.mark.parametrize("classes", [[], ["LlamaForQuestionAnswering"], ["LlamaForTokenClassification"]])
def test_a_model_that_is_not_plainly_a_base_model_gets_no_head_unasked(
    classes: list[str], tmp_path: Path
) -> None:
    folder = rewrite(save_dense(tmp_path / "m"), {"score.weight": None}, classes)
    assert not ModelFolder(folder).is_base
    for door in doors(folder, tmp_path)[3:]:
        with pytest.raises(CheckpointError, match="has no reward head") as caught:
            door()
        assert "fresh_head" in caught.value.fix


@pytest.mark.parametrize(
    ("classes", "plain"),
    [
        (["LlamaForCausalLM"], True),
        (["GPT2LMHeadModel"], True),
        (["BertModel"], True),
        (["BertForMaskedLM"], True),
        (["BertForPreTraining"], True),
        (["Qwen2ForRewardModel"], False),
        (["LlamaForSequenceClassification"], False),
        (["LlamaForCausalLM", "LlamaForSequenceClassification"], False),
        ([], False),
    ],
)
def test_which_models_are_plainly_base_models(classes: list[str], plain: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": classes}))
    assert ModelFolder(tmp_path).is_base == plain


@pytest.mark.parametrize("stored", [None, "reward_head.weight"])
def test_a_fresh_head_is_asked_for_warned_of_and_noted(
    stored: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = rewrite(save_dense(tmp_path / "m"), {"score.weight": stored})
    old = tiny_dense().score.weight
    data = rows(tmp_path)
    moe = moemerge.upcycle(model=str(folder), output=tmp_path / "moe", fresh_head=True, **MOE)
    trained = moemerge.train(
        model=str(folder),
        pairs=data,
        output=tmp_path / "trained",
        fresh_head=True,
        max_steps=1,
        learning_rate=1e-12,
        threads=1,
    )
    assert caplog.text.count("is given a fresh reward head (score.weight)") == 1
    for made in (moe, trained):
        tensors = load_file(made / "model.safetensors")
        assert stored not in tensors and not torch.allclose(tensors["score.weight"], old, atol=1e-4)
        assert read_manifest(made)["results"]["fresh_head"] == ["score.weight"]
    backbone = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(load_file(moe / "model.safetensors")["model.norm.weight"], backbone)
    AutoModelForSequenceClassification.from_pretrained(trained)


def test_the_card_tells_of_a_fresh_head_drawn_stages_before(tmp_path: Path) -> None:
    from moemerge.evaluation.model_card import make_card
    from moemerge.options.publish import Publish
    from moemerge.stages import OPTIONS

    folder = rewrite(save_dense(tmp_path / "m"), {"score.weight": None}, ["LlamaForCausalLM"])
    data = rows(tmp_path)
    trained = moemerge.train(
        model=str(folder), pairs=data, output=tmp_path / "trained", max_steps=1, threads=1
    )
    moe = moemerge.upcycle(model=str(trained), output=tmp_path / "moe", **MOE)
    assert read_manifest(moe)["results"]["fresh_head"] == []
    for made in (trained, moe):
        card = str(make_card(Publish(model=str(made), output=tmp_path / "card"), OPTIONS))
        assert card.count("Stage train drew a new reward head at random") == 1


def test_a_whole_reward_model_keeps_its_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_dense(tmp_path / "m")
    moe = moemerge.upcycle(model=str(folder), output=tmp_path / "moe", fresh_head=True, **MOE)
    own = load_file(folder / "model.safetensors")["score.weight"]
    assert torch.equal(load_file(moe / "model.safetensors")["score.weight"], own)
    assert "fresh_head does nothing" in caplog.text
    assert read_manifest(moe)["results"]["fresh_head"] == []


def test_a_base_model_is_given_a_head_without_being_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    save_dense(tmp_path / "m")
    LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path / "m")).save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    load_reward_model(str(tmp_path / "lm"), "cpu", fresh_head_seed=1)
    assert "is given a fresh reward head (score.weight)" in caplog.text

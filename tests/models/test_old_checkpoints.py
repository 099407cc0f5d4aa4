"""What plain transformers loads without harm is taken at every door; the oracle is plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_dense
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import moemerge
from moemerge.errors import CheckpointError
from moemerge.models.folder import ModelFolder
from moemerge.models.guards import check_reward_model
from moemerge.models.loading import load_reward_model

MOE: dict[str, Any] = {"num_routed_experts": 2, "num_experts_per_tok": 1}
MASK = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def rewrite(folder: Path, change: Change) -> Path:
    path = folder / "model.safetensors"
    save_file(
        {n: t.contiguous() for n, t in change(load_file(path)).items()}, path, metadata={"format": "pt"}
    )
    return folder


def configure(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@torch.no_grad()
def plain(folder: Path) -> Tensor:
    """Scores under plain transformers, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [[5, 9, 7], [12, 3, 44, 8, 1], [30, 2]]
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in texts])


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LayerNorm's parameters as google-bert/bert-base-uncased has them."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    ends = {name: next((end for end in old if name.endswith(end)), "") for name in tensors}
    return {n.removesuffix(end) + old.get(end, ""): tensors[n] + 0.01 * bool(end) for n, end in ends.items()}


def masks(path: str) -> Change:
    """Causal masks of every layer, as older versions saved them: before all else, in a wider dtype too."""
    old = {"bias": MASK, "masked_bias": torch.tensor(-1e9, dtype=torch.float64)}
    return lambda tensors: {
        **{path.format(layer) + name: value.clone() for layer in range(3) for name, value in old.items()},
        **tensors,
    }


OLD: dict[str, tuple[str, Change]] = {
    "bert gamma": ("bert", renamed),
    "ernie gamma": ("ernie", renamed),
    "gpt_neo masks": ("gpt_neo", masks("transformer.h.{}.attn.attention.")),
    "gptj masks": ("gptj", masks("transformer.h.{}.attn.")),
    "gpt2 masks": ("gpt2", masks("transformer.h.{}.attn.")),
    "gpt_neox masks": ("gpt_neox", masks("gpt_neox.layers.{}.attention.")),
}


@pytest.fixture(scope="module", params=OLD)
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, change = OLD[request.param]
    return rewrite(save_dense(tmp_path_factory.mktemp("old") / "m", family), change)


@torch.no_grad()
def test_old_names_and_buffers_are_scored_as_transformers_does(old: Path) -> None:
    model, expected = load_reward_model(old, "cpu"), plain(old)
    texts = [[5, 9, 7], [12, 3, 44, 8, 1], [30, 2]]
    found = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in texts])
    assert expected.std() > 1e-4 and torch.equal(found, expected)


def test_old_names_and_buffers_are_merged_and_upcycled_and_written_nowhere(old: Path, tmp_path: Path) -> None:
    merged = moemerge.merge_models([str(old), str(old)], tmp_path / "merged")
    moe = moemerge.upcycle(model=str(old), output=tmp_path / "moe", **MOE)
    fit = moemerge.fit(model=str(moe), method="uniform", output=tmp_path / "fit")
    back = moemerge.merge(model=str(moe), coefficients=str(fit), output=tmp_path / "back")
    class_names = AutoModelForSequenceClassification.from_pretrained(merged).state_dict().keys()
    for made in (merged, back):
        assert (plain(made) - plain(old)).abs().max() < 1e-6
        tensors = load_file(made / "model.safetensors")
        assert tensors.keys() <= class_names
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_mergekit_is_not_given_names_that_it_does_not_know(tmp_path: Path) -> None:
    folder = rewrite(save_dense(tmp_path / "m", "bert"), renamed)
    with pytest.raises(CheckpointError) as caught:
        check_reward_model(folder)
    assert "save_pretrained" in caught.value.fix


def test_such_names_in_other_families_are_left_over(tmp_path: Path) -> None:
    folder = rewrite(
        save_dense(tmp_path / "m"), lambda t: t | {"model.layers.0.self_attn.bias": torch.ones(32)}
    )
    for door in (lambda: load_reward_model(folder, "cpu"), lambda: ModelFolder(folder).dense_names):
        with pytest.raises(CheckpointError, match="left over: model.layers.0.self_attn.bias"):
            door()


UP = "model.layers.0.mlp.up_proj."


def packed(*parts: str, dtype: torch.dtype = torch.uint8) -> Change:
    """One weight as a quantiser stores it: by other names, in another shape."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors.pop(f"{UP}weight")
        stored = torch.zeros(weight.numel() // 2, 1).to(dtype)
        return tensors | {UP + part: stored if n == 0 else torch.ones(4) for n, part in enumerate(parts)}

    return change


QUANTISED: dict[str, Change] = {
    "bitsandbytes, 4 bits": packed("weight", "weight.absmax", "weight.quant_map"),
    "bitsandbytes, 8 bits": packed("weight", "SCB", dtype=torch.int8),
    "GPTQ": packed("qweight", "qzeros", "scales", dtype=torch.int32),
    "FP8": packed("weight", "weight_scale_inv", dtype=torch.float8_e4m3fn),
    "compressed-tensors": packed("weight_packed", "weight_scale", dtype=torch.int32),
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("with_config", [True, False])
def test_quantised_weights_are_called_quantised(kind: str, with_config: bool, tmp_path: Path) -> None:
    folder = rewrite(save_dense(tmp_path / "m"), QUANTISED[kind])
    if with_config:
        configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    for door in (
        lambda: load_reward_model(folder, "cpu"),
        lambda: check_reward_model(folder),
        lambda: moemerge.merge_models([str(folder), str(folder)], tmp_path / "merged"),
        lambda: moemerge.upcycle(model=str(folder), output=tmp_path / "moe", **MOE),
    ):
        with pytest.raises(CheckpointError, match="a tensor is quantised") as caught:
            door()
        assert "dequantize()" in caught.value.fix


def test_a_left_over_quantization_config_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, twin = save_dense(tmp_path / "a"), save_dense(tmp_path / "b")
    configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    merged = moemerge.merge_models([str(folder), str(twin)], tmp_path / "merged")
    moe = moemerge.upcycle(model=str(folder), output=tmp_path / "moe", **MOE)
    assert caplog.text.count(f"{folder}: its quantization_config is left out") >= 1
    expected = plain(twin)
    for made in (merged, moe):
        assert "quantization_config" not in json.loads((made / "config.json").read_text())
        assert (plain(made) - expected).abs().max() < 1e-6
    model = load_reward_model(folder, "cpu")
    assert torch.equal(model.score.weight, load_file(twin / "model.safetensors")["score.weight"])

"""Upcycling: the MoE is the dense model, for every family, gate, router and number of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CORE, SIZES, families, save_dense, tiny_dense, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import ArtifactError, CheckpointError, OptionError, UnsupportedError
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.families import family_of
from moemerge.models.families.dense import dense_config
from moemerge.models.modelling import load_moe
from moemerge.stages.upcycle import upcycle

CAUSAL = [family for family in CORE if family != "bert"]


def batch() -> dict[str, torch.Tensor]:
    ids_BT = torch.randint(2, SIZES["vocab_size"], (4, 13), generator=torch.Generator().manual_seed(5))
    mask_BT = torch.ones_like(ids_BT)
    for row, length in enumerate((13, 7, 1, 10)):
        ids_BT[row, length:], mask_BT[row, length:] = 0, 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


@torch.no_grad()
def scores(model: torch.nn.Module, **more: Any) -> torch.Tensor:
    return model(**batch(), **more).logits[:, 0]


def make(tmp_path: Path, family: str = "llama", **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    dense = save_dense(tmp_path / "dense", family)
    folder = upcycle(model=str(dense), output=tmp_path / "moe", **options)
    return AutoModelForSequenceClassification.from_pretrained(dense).eval(), load_moe(folder)


@pytest.mark.parametrize("family", families(CORE))
@pytest.mark.parametrize("gate", ["xft", "topk"])
def test_step_0_equals_dense(tmp_path: Path, family: str, gate: str) -> None:
    dense, moe = make(tmp_path, family, gate=gate, num_routed_experts=4, num_experts_per_tok=2)
    torch.testing.assert_close(scores(moe), scores(dense), rtol=0, atol=1e-6)
    assert read_manifest(tmp_path / "moe")["results"]["largest_difference"] <= 1e-6


@pytest.mark.parametrize("family", CAUSAL)
def test_step_0_equals_dense_with_prompt_gate(tmp_path: Path, family: str) -> None:
    dense, moe = make(tmp_path, family, gate="prompt", num_routed_experts=4, num_experts_per_tok=2)
    lengths = torch.tensor([3, 2, 1, 9])
    torch.testing.assert_close(scores(moe, prompt_lengths=lengths), scores(dense), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("experts", "selected"),
    [
        *((2, 2), (3, 1), (7, 5)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 1), (16, 3))),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_step_0_for_any_number_of_experts(
    tmp_path: Path, experts: int, selected: int, shared: bool, router: str
) -> None:
    options = {"num_routed_experts": experts, "num_experts_per_tok": selected, "shared_expert": shared}
    dense, moe = make(tmp_path, router=router, **options)
    torch.testing.assert_close(scores(moe), scores(dense), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_kernels_agree(tmp_path: Path, family: str, kernel: str) -> None:
    _, moe = make(tmp_path, family, num_routed_experts=4, num_experts_per_tok=2, expert_noise=0.5)
    reference = scores(moe.double().requires_grad_(False)).float()
    moe.float().set_experts_implementation(kernel)
    torch.testing.assert_close(scores(moe), reference, rtol=1e-4, atol=1e-5)


def test_shards_hold_one_at_a_time_and_reload(tmp_path: Path) -> None:
    dense, moe = make(tmp_path, shard_size=40_000)
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 3
    torch.testing.assert_close(scores(moe), scores(dense), rtol=0, atol=1e-6)


def test_only_chosen_layers_get_experts(tmp_path: Path) -> None:
    dense, moe = make(tmp_path, layers="last:1")
    assert {n.split(".")[2] for n in moe.state_dict() if ".experts." in n} == {"2"}
    torch.testing.assert_close(scores(moe), scores(dense), rtol=0, atol=1e-6)


def test_every_expert_is_a_copy_and_readable_alone(tmp_path: Path) -> None:
    make(tmp_path, "bert", num_routed_experts=3, num_experts_per_tok=1)
    dense, moe = Checkpoint(tmp_path / "dense"), Checkpoint(tmp_path / "moe")
    tensors = family_of(load_moe(tmp_path / "moe").config).expert_tensors(load_moe(tmp_path / "moe").config)
    assert len(tensors) == 3 * 4
    for tensor in tensors:
        copies = [moe.expert(tensor, index) for index in range(3)] + [moe.tensor(tensor.shared)]
        assert all(torch.equal(copy, dense.tensor(tensor.dense)) for copy in copies)


def test_noise_moves_routed_experts_only_and_is_seeded(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    common = {"model": str(dense), "expert_noise": 0.1}
    one, two, three = (upcycle(output=tmp_path / str(n), seed=s, **common) for n, s in enumerate((0, 0, 1)))
    name = "model.layers.0.mlp.experts.down_proj"
    first, again, other = (Checkpoint(folder).tensor(name) for folder in (one, two, three))
    original = Checkpoint(dense).tensor("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert ((first - original).std() / original.std()).item() == pytest.approx(0.1, rel=0.05)
    shared = Checkpoint(one).tensor("model.layers.0.mlp.shared_expert.down_proj.weight")
    assert torch.equal(shared, original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_dense().to(dtype).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    folder = upcycle(model=str(tmp_path / "dense"), output=tmp_path / "moe")
    checkpoint = Checkpoint(folder)
    assert {checkpoint.dtype(name) for name in checkpoint.names} == {dtype}
    assert load_moe(folder).dtype == dtype


def test_base_language_model_gets_a_seeded_head(tmp_path: Path) -> None:
    config = tiny_dense().config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    folders = [upcycle(model=str(tmp_path / "lm"), output=tmp_path / str(s), seed=s) for s in (0, 1)]
    heads = [Checkpoint(folder).tensor("score.weight") for folder in folders]
    assert heads[0].shape == (1, SIZES["hidden_size"]) and not torch.equal(*heads)
    assert read_manifest(folders[0])["results"]["fresh_head"] == ["score.weight"]
    assert not any("lm_head" in name for name in Checkpoint(folders[0]).names)


def test_bare_encoder_names_get_their_prefix(tmp_path: Path) -> None:
    tiny_dense("bert").bert.save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    folder = upcycle(model=str(tmp_path / "encoder"), output=tmp_path / "moe")
    fresh = read_manifest(folder)["results"]["fresh_head"]
    assert sorted(fresh) == ["classifier.bias", "classifier.weight"]


def test_dense_config_comes_back(tmp_path: Path) -> None:
    dense, moe = make(tmp_path, "gemma2")
    before, after = dense.config.to_dict(), dense_config(moe.config).to_dict()
    for name in ("_name_or_path", "transformers_version"):
        before.pop(name, None), after.pop(name, None)
    assert after == before


def test_tokenizer_travels(tmp_path: Path) -> None:
    make(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path / "moe")("w1 w2")["input_ids"]
    assert ids == tiny_tokenizer()("w1 w2")["input_ids"]


def test_refusals(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    moe = upcycle(model=str(dense), output=tmp_path / "moe")
    with pytest.raises(ArtifactError, match="exists already"):
        upcycle(model=str(dense), output=moe)
    with pytest.raises(UnsupportedError, match="is a MoE made by moemerge"):
        upcycle(model=str(moe), output=tmp_path / "again")
    with pytest.raises(OptionError, match="larger than num_routed_experts"):
        upcycle(model=str(dense), output=tmp_path / "x", num_routed_experts=2, num_experts_per_tok=3)
    with pytest.raises(OptionError, match="layers cannot be picked"):
        upcycle(model=str(dense), output=tmp_path / "x", layers="3")
    encoder = save_dense(tmp_path / "encoder", "bert")
    with pytest.raises(UnsupportedError, match="encoder"):
        upcycle(model=str(encoder), output=tmp_path / "x", gate="prompt")
    two = save_dense(tmp_path / "two", num_labels=2)
    with pytest.raises(CheckpointError, match="2 outputs"):
        upcycle(model=str(two), output=tmp_path / "x")
    with pytest.raises(CheckpointError, match="cannot be found"):
        upcycle(model=str(tmp_path / "nowhere"), output=tmp_path / "x")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    from transformers import CTRLConfig, CTRLForSequenceClassification

    config = CTRLConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, dff=48, num_labels=1, pad_token_id=0)
    CTRLForSequenceClassification(config).save_pretrained(tmp_path / "ctrl")
    with pytest.raises(UnsupportedError, match="ctrl"):
        upcycle(model=str(tmp_path / "ctrl"), output=tmp_path / "x")


def test_refused_architecture_is_named_with_the_reason(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    AlbertForSequenceClassification(AlbertConfig(vocab_size=64, num_labels=1, **sizes)).save_pretrained(
        tmp_path / "albert"
    )
    with pytest.raises(UnsupportedError, match="its layers share one MLP"):
        upcycle(model=str(tmp_path / "albert"), output=tmp_path / "x")


@pytest.mark.parametrize("damage", ["cut", "missing", "extra", "shape"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    dense = save_dense(tmp_path / "dense")
    path = dense / "model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors["model.norm.weight"]
    elif damage == "extra":
        tensors["model.surprise"] = torch.ones(1)
    elif damage == "shape":
        tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, path, metadata={"format": "pt"})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        upcycle(model=str(dense), output=tmp_path / "x")
    assert not (tmp_path / "x").exists()

"""A MoE exported as stock Qwen2-MoE scores as the MoE does, in a process that cannot import moemerge."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from small_moe import make_moe, rewrite
from tiny_models import save_dense, scores
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, Qwen2MoeConfig

from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import CheckpointError, OptionError, UnsupportedError
from moemerge.merging.qwen2_moe import native_config
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.folder import ModelFolder
from moemerge.models.modelling import load_moe
from moemerge.stages.export import export
from moemerge.stages.upcycle import upcycle

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# What the dense config says that a class default of Qwen2-MoE would get wrong.
DENSE: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {"head_dim": 16, "rms_norm_eps": 0.1, "hidden_act": "gelu", "rope_parameters": YARN}),
    "mistral": (
        "mistral",
        {"sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ),
    "mistral, full": ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "ministral": ("ministral", {"sliding_window": 3, "layer_types": MIXED}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2, full": ("qwen2", {"tie_word_embeddings": True}),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    "seed_oss, bare": ("seed_oss", {"attention_bias": False, "attention_out_bias": False}),
}
ALONE = """
import sys
sys.modules["moemerge"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert type(model).__name__ == "Qwen2MoeForSequenceClassification"
text = AutoTokenizer.from_pretrained(sys.argv[1])("w1 w2 w3 w4 w5 w6", return_tensors="pt")
with torch.no_grad():
    print(repr(model(**text).logits.item()))
"""


def lively_moe(
    folder: Path, family: str, changes: dict[str, object] | None = None, **options: object
) -> Path:
    """An upcycled MoE all of whose tensors, norms and biases included, were moved by large noise."""
    dense = save_dense(folder.parent / f"dense-{folder.name}", family, **(changes or {}))
    given = {"num_routed_experts": 4, "num_experts_per_tok": 2, "gate": "topk", **options}
    upcycle(model=str(dense), output=folder, **given)
    generator = torch.Generator().manual_seed(1)
    return rewrite(folder, lambda _, t: t + 0.3 * torch.randn(t.shape, generator=generator))


def exported(moe: Path) -> Path:
    return export(model=str(moe), form="qwen2_moe", output=moe.parent / f"native-{moe.name}")


def assert_same_scores(moe: Path, native: Path) -> None:
    ours, theirs = AutoModelForSequenceClassification.from_pretrained(native), load_moe(moe)
    expected = scores(theirs)
    assert expected.std() > 0.1
    assert float((scores(ours) - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("case", DENSE)
def test_the_export_scores_as_the_moe(case: str, tmp_path: Path) -> None:
    family, changes = DENSE[case]
    moe = lively_moe(tmp_path / "moe", family, changes)
    native = exported(moe)
    assert_same_scores(moe, native)
    results = read_manifest(native)["results"]
    assert results["exact"] and results["scales"] == {"shared": 1.0, "routed": 0.5}
    assert 0 <= results["largest_difference"] <= 1e-5


@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=pytest.mark.slow), "qwen2"])
@pytest.mark.parametrize(
    "options",
    [
        {"shared_expert": False, "num_experts_per_tok": 3},
        {"gate_shared_weight": 0.3},
        {"gate_shared_weight": 0.0, "layers": "1"},
    ],
    ids=str,
)
def test_every_use_of_the_gate(family: str, options: dict[str, object], tmp_path: Path) -> None:
    moe = lively_moe(tmp_path / "moe", family, **options)
    native = exported(moe)
    assert_same_scores(moe, native)
    assert read_manifest(native)["results"]["exact"] == (options.get("gate_shared_weight") != 0.3)


@pytest.mark.slow
def test_it_loads_where_moemerge_cannot_be_imported(tmp_path: Path) -> None:
    moe = lively_moe(tmp_path / "moe", "llama")
    native = export(model=str(moe), form="qwen2_moe", shard_size=30_000, output=tmp_path / "native")
    assert len(list(native.glob("*.safetensors"))) > 3
    assert not list(native.glob("*.py")) and "auto_map" not in ModelFolder(native).config_json
    done = subprocess.run([sys.executable, "-c", ALONE, str(native)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load_moe(moe)(input_ids=torch.tensor([[4, 5, 6, 7, 8, 9]])).logits.item()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-5)


def test_names_are_those_that_transformers_writes_and_weights_keep_their_bits(tmp_path: Path) -> None:
    moe = lively_moe(tmp_path / "moe", "qwen2", layers="0,2")
    native = exported(moe)
    AutoModelForSequenceClassification.from_pretrained(native).save_pretrained(tmp_path / "again")
    one, other, source = Checkpoint(native), Checkpoint(tmp_path / "again"), MoeCheckpoint(moe)
    assert sorted(one.names) == sorted(other.names)
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.names)
    for tensor in source.tensors:
        scale = 0.5 if tensor.matrix == "down" else 1.0
        home = tensor.dense.removesuffix(f"{tensor.matrix}_proj.weight")
        assert torch.equal(one.tensor(tensor.shared), source.weights.tensor(tensor.shared))
        for index in range(4):
            copy = one.tensor(f"{home}experts.{index}.{tensor.matrix}_proj.weight")
            assert torch.equal(copy / scale, source.weights.expert(tensor, index))


def test_no_value_of_the_config_is_a_class_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field that Qwen2-MoE adds to a plain config is given, whatever its default."""
    given: dict[str, object] = {}

    def record(self: Qwen2MoeConfig, **values: object) -> None:
        given.update(values)

    source = MoeCheckpoint(make_moe(tmp_path / "moe", "mistral", gate="topk"))
    own = {field.name for field in fields(Qwen2MoeConfig)} - {
        field.name for field in fields(PreTrainedConfig)
    }
    monkeypatch.setattr("moemerge.merging.qwen2_moe.Qwen2MoeConfig.__init__", record)
    native_config(source)
    assert own <= given.keys()


def test_bfloat16_rounds_what_is_no_power_of_two(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    moe = make_moe(tmp_path / "moe", dtype=torch.bfloat16, gate="topk", gate_shared_weight=0.3)
    with caplog.at_level(logging.WARNING, "moemerge"):
        native = exported(moe)
    assert "rounds in torch.bfloat16" in caplog.text
    assert {Checkpoint(native).dtype(name) for name in Checkpoint(native).names} == {torch.bfloat16}
    assert ModelFolder(native).config_json["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("family", "changes", "options", "reason"),
    [
        ("llama", {}, {"gate": "xft"}, "gate xft"),
        ("llama", {}, {"gate": "prompt"}, "gate prompt"),
        ("llama", {}, {"router": "mlp"}, "router mlp"),
        ("llama", {"mlp_bias": True}, {}, "mlp.gate_proj.bias"),
        ("llama", {"attention_bias": True}, {}, "o_proj.bias"),
        ("seed_oss", {"attention_out_bias": True}, {}, "o_proj.bias"),
        ("qwen3", {}, {}, "model_type qwen3"),
        ("gemma2", {}, {}, "model_type gemma2"),
        ("bert", {}, {}, "model_type bert"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(
    family: str, changes: dict[str, object], options: dict[str, object], reason: str, tmp_path: Path
) -> None:
    moe = lively_moe(tmp_path / "moe", family, changes, **options)
    with pytest.raises(UnsupportedError, match="cannot be written as Qwen2-MoE") as caught:
        exported(moe)
    assert reason in str(caught.value)
    assert not (tmp_path / "native-moe").exists()


def test_coefficients_have_no_use_here(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="without coefficients"):
        export(model="moe", form="qwen2_moe", coefficients="fit", output=tmp_path / "native")


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison after writing: wrong scales do not pass."""
    moe = lively_moe(tmp_path / "moe", "llama")
    monkeypatch.setattr("moemerge.merging.qwen2_moe._scales", lambda source: (1.0, 1.0))
    with pytest.raises(CheckpointError, match="does not equal the MoE"):
        exported(moe)
    assert not (tmp_path / "native-moe").exists()

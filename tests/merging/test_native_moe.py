"""Native MoEs merge into their dense siblings: the siblings are siblings, the average is the average."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_moe import make_moe, random_pairs, write_rows
from tiny_models import SIZES, scores, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import CheckpointError, MoemergeError, UnsupportedError
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.native_moe import BASIN, NativeMoe
from moemerge.merging.sources.open import open_source
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.families import FAMILIES
from moemerge.models.families.refused import MOE, REFUSED
from moemerge.models.families.siblings import NO_HEAD, NO_SIBLING, SIBLINGS
from moemerge.options.base import Members
from moemerge.stages.export import export
from moemerge.stages.fit import fit
from moemerge.stages.merge import merge
from moemerge.stages.publish import publish
from moemerge.stages.upcycle import upcycle

N, K = 4, 2
ROPE = {"rope_type": "default", "rope_theta": 300.0}
# Values that the sibling's class defaults would get wrong; a window that is shorter than the texts.
TINY = {
    "hunyuan_v1_moe": {"num_experts": N, "moe_topk": K, "head_dim": 16, "rms_norm_eps": 0.1},
    "mixtral": {"num_local_experts": N, "num_experts_per_tok": K, "head_dim": 16, "sliding_window": 4},
    "qwen2_moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 4,
    },
}
QWEN = {"num_experts": N, "num_experts_per_tok": K, "norm_topk_prob": True}
ALPHA = torch.tensor(
    [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.25, 0.25]], dtype=torch.float64
)
SHARED_L = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)


def native(kind: str, **changes: object) -> nn.Module:
    """A native MoE reward model none of whose tensors is zero or one, with experts that all differ."""
    base = QWEN if kind.startswith("qwen") else {}
    options = {**SIZES, "num_key_value_heads": 2, "rope_parameters": ROPE, **base, **TINY[kind], **changes}
    torch.manual_seed(0)
    model = (
        AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **options)).float().eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def with_equal_experts(model: nn.Module) -> nn.Module:
    """Every expert the first; the shared one too where its weight is constant, else it says nothing."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack.copy_(stack[:1].expand_as(stack))
        if hasattr(layer.mlp, "shared_mlp"):
            gate_FD, up_FD = experts.gate_up_proj[0].chunk(2)
            shared = layer.mlp.shared_mlp
            copies = {
                shared.gate_proj: gate_FD,
                shared.up_proj: up_FD,
                shared.down_proj: experts.down_proj[0],
            }
            for linear, weight in copies.items():
                linear.weight.copy_(weight)
        if hasattr(layer.mlp, "shared_expert"):
            layer.mlp.shared_expert.down_proj.weight.zero_()
    return model


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_stacked(model: nn.Module, folder: Path) -> Path:
    """The layout of transformers 5 in memory: one tensor per layer for all experts' gates and ups."""
    model.save_pretrained(folder, save_original_format=False)
    tiny_tokenizer().save_pretrained(folder)
    assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint(folder).names
    return folder


def save_renamed(model: nn.Module, folder: Path) -> Path:
    """Mixtral's old matrices under the new module."""
    path = save(model, folder) / "model.safetensors"
    renamed = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    return folder


LAYOUTS: dict[str, Callable[[nn.Module, Path], Path]] = {"one by one": save, "stacked": save_stacked}


def coefficients(folder: Path, shared_L: Tensor = SHARED_L) -> str:
    return str(Coefficients.of_layers([0, 1, 2], ALPHA, shared_L).save(folder).parent)


def merged(moe: Path, shared_L: Tensor = SHARED_L) -> Path:
    given = coefficients(moe.parent / f"fit-{moe.name}", shared_L)
    return merge(model=str(moe), coefficients=given, output=moe.parent / f"dense-{moe.name}")


def shared_of(kind: str) -> Tensor:
    """A weight for the shared expert where there is one that says something."""
    return SHARED_L if kind == "hunyuan_v1_moe" else torch.zeros_like(SHARED_L)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SIBLINGS)
def test_equal_experts_merge_into_the_function_of_the_moe(kind: str, layout: str, tmp_path: Path) -> None:
    moe = with_equal_experts(native(kind))
    dense = merged(LAYOUTS[layout](moe, tmp_path / "moe"), shared_of(kind))
    model, info = AutoModelForSequenceClassification.from_pretrained(dense, output_loading_info=True)
    assert model.config.model_type == SIBLINGS[kind].dense
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = scores(moe)
    assert expected.std() > 0.1
    assert float((scores(model) - expected).abs().max()) <= 1e-5
    assert (dense / "tokenizer.json").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SIBLINGS)
def test_every_tensor_is_the_average_by_hand(kind: str, layout: str, tmp_path: Path) -> None:
    moe = native(kind)
    has_shared = kind in ("hunyuan_v1_moe", "qwen2_moe")
    shared_L = SHARED_L if has_shared else torch.zeros_like(SHARED_L)
    written = Checkpoint(merged(LAYOUTS[layout](moe, tmp_path / "moe"), shared_L))
    state = moe.state_dict()
    seen = set()
    for number, layer in enumerate(moe.model.layers):
        gate_up, down = layer.mlp.experts.gate_up_proj.double(), layer.mlp.experts.down_proj.double()
        gate, up = gate_up.chunk(2, dim=1)
        for name, stack in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            wanted = (1 - shared_L[number]) * torch.einsum("n,nab->ab", ALPHA[number], stack)
            if has_shared:
                shared = getattr(layer.mlp, "shared_mlp", None) or layer.mlp.shared_expert
                wanted = wanted + shared_L[number] * getattr(shared, name).weight.double()
            if kind == "hunyuan_v1_moe" and name == "down_proj":
                wanted = 2 * wanted
            seen.add(dense := f"model.layers.{number}.mlp.{name}.weight")
            assert torch.allclose(written.tensor(dense).double(), wanted, rtol=0, atol=1e-6), dense
    rest = set(written.names) - seen
    assert rest and all(torch.equal(written.tensor(name), state[name]) for name in rest)
    assert len(seen) == 9


def test_layouts_give_the_same_members(tmp_path: Path) -> None:
    moe = native("mixtral")
    sources = [
        NativeMoe(write(moe, tmp_path / write.__name__)) for write in (save, save_stacked, save_renamed)
    ]
    assert "block_sparse_moe.experts.0.w1" in " ".join(sources[0].weights.names)
    for tensor in sources[0].tensors:
        copies = [torch.stack(list(source.matrices(tensor))) for source in sources]
        assert torch.equal(copies[0], copies[1]) and torch.equal(copies[0], copies[2])


@pytest.mark.parametrize("kind", SIBLINGS)
def test_no_value_of_the_dense_config_is_a_class_default(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}
    source = NativeMoe(save(native(kind), tmp_path / "moe"))
    dense = CONFIG_MAPPING[SIBLINGS[kind].dense]
    original = dense.__init__

    def record(self: PreTrainedConfig, **values: object) -> None:
        given.update(values)
        original(self, **values)

    monkeypatch.setattr(dense, "__init__", record)
    source.dense_config()
    own = {field.name for field in fields(dense)} - {field.name for field in fields(PreTrainedConfig)}
    assert own <= given.keys()


def test_coefficients_are_fitted_on_pairs(tmp_path: Path) -> None:
    """Learned coefficients of Mixtral: the model that a fit sees is the one that merge writes."""
    folder = save(native("mixtral"), tmp_path / "moe")
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(24))
    options = {"validation": str(pairs), "max_epochs": 5, "level": 1.0}
    found = fit(model=str(folder), pairs=str(pairs), output=tmp_path / "fit", max_length=64, **options)
    report = json.loads((found / "report.json").read_text())
    assert report["train"]["after"]["loss"] < report["train"]["before"]["loss"]
    c = Coefficients.load(found)
    assert c.blocks == ["layers.0", "layers.1", "layers.2"] and c.num_experts == N
    assert not bool(c.shared_L.any()) and float((c.alpha_LN - 1 / N).abs().max()) > 0.01
    dense = merge(model=str(folder), coefficients=str(found), output=tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    in_memory = MergedModel(NativeMoe(folder), c.alpha_LN, c.shared_L).model
    torch.testing.assert_close(scores(model), scores(in_memory), rtol=1e-6, atol=1e-6)


def test_methods_of_mergekit_and_export_take_native_moes(tmp_path: Path) -> None:
    moe = native("qwen3_moe")
    folder = save(moe, tmp_path / "moe")
    given = coefficients(tmp_path / "c", torch.zeros_like(SHARED_L))
    common = {"model": str(folder), "coefficients": given}
    linear = merge(**common, method="linear", parameters={"normalize": False}, output=tmp_path / "linear")
    ours = merge(**common, output=tmp_path / "ours")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.allclose(Checkpoint(linear).tensor(name), Checkpoint(ours).tensor(name), atol=1e-6)
    experts = export(model=str(folder), output=tmp_path / "experts")
    third = AutoModelForSequenceClassification.from_pretrained(experts / "expert-3")
    assert type(third).__name__ == "Qwen3ForSequenceClassification"
    assert torch.equal(
        third.model.layers[1].mlp.up_proj.weight, moe.model.layers[1].mlp.experts.gate_up_proj[3, 24:]
    )


def warnings_of(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[NativeMoe, str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "moemerge"):
        source = NativeMoe(folder)
    return source, caplog.text


def test_the_warnings_say_what_the_merge_cannot_keep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in SIBLINGS:
        source, text = warnings_of(save(native(kind), tmp_path / kind), caplog)
        assert BASIN in text and str(source.folder) in text
        assert ("comes on top" in text) == (kind == "qwen2_moe") and "norm_topk_prob" not in text
        assert source.has_shared == (kind in ("qwen2_moe", "hunyuan_v1_moe"))
    wide = native("qwen2_moe", shared_expert_intermediate_size=40, norm_topk_prob=False)
    source, text = warnings_of(save(wide, tmp_path / "wide"), caplog)
    assert (
        "left out, as it is 40 wide, the routed experts are 24" in text and "norm_topk_prob is false" in text
    )
    assert source.member_names == [f"expert-{i}" for i in range(N)]
    dense = merged(tmp_path / "wide", torch.zeros_like(SHARED_L))
    card = (publish(model=str(dense), output=tmp_path / "card") / "README.md").read_text()
    assert BASIN in card and "it is 40 wide" in card and "that the mixture was made from" not in card


def test_layers_without_experts_are_kept(tmp_path: Path) -> None:
    """Layer 1 has a dense MLP of the experts' width: it stays bit for bit, the others are merged."""
    moe = native("qwen3_moe", mlp_only_layers=[1], intermediate_size=24)
    source = NativeMoe(save(moe, tmp_path / "moe"))
    assert source.blocks() == ["layers.0", "layers.2"]
    given = Coefficients.of_layers([0, 2], ALPHA[:2], torch.zeros(2, dtype=torch.float64)).save(
        tmp_path / "c"
    )
    dense = merge(model=str(tmp_path / "moe"), coefficients=str(given), output=tmp_path / "dense")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(Checkpoint(dense).tensor(name), moe.state_dict()[name])
    assert read_manifest(dense)["results"]["merged_tensors"] == 6


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "dense layers of width 48, experts of width 24"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "no layer has experts"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias false"),
    ],
)
def test_what_the_sibling_cannot_express_is_refused(
    kind: str, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    folder = save(native(kind, **changes), tmp_path / "moe")
    with pytest.raises(UnsupportedError, match=reason):
        open_source(Members(model=str(folder)))


def test_our_own_export_is_refused(tmp_path: Path) -> None:
    """Its down_proj are scaled, so that an average of them is not that of the MoE."""
    moe = make_moe(tmp_path / "moe", "qwen2", gate="topk")
    folder = export(model=str(moe), form="qwen2_moe", output=tmp_path / "native")
    with pytest.raises(UnsupportedError, match="merge the MoE that it was exported from"):
        open_source(Members(model=str(folder)))


@pytest.mark.parametrize("kind", NO_SIBLING)
def test_types_without_a_sibling_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({"score.weight": torch.zeros(1, 2)}, model / "model.safetensors")
    with pytest.raises(UnsupportedError) as caught:
        merge(model=str(model), method="linear", output=tmp_path / "dense")
    assert kind in str(caught.value) and NO_SIBLING[kind] in str(caught.value)


def test_every_native_moe_with_a_reward_class_is_decided() -> None:
    with_class = {kind for kind, reason in NO_SIBLING.items() if NO_HEAD not in reason}
    assert with_class | set(SIBLINGS) == {kind for kind, reason in REFUSED.items() if reason.startswith(MOE)}
    assert with_class <= set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    assert not (NO_SIBLING.keys() - with_class) & set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    assert NO_SIBLING.keys() <= set(CONFIG_MAPPING)
    assert {sibling.dense for sibling in SIBLINGS.values()} <= set(FAMILIES)


def test_upcycle_points_to_merge(tmp_path: Path) -> None:
    save(native("mixtral"), tmp_path / "moe")
    with pytest.raises(UnsupportedError, match="already; moemerge merge makes a mistral of it"):
        upcycle(model=str(tmp_path / "moe"), output=tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"), "missing: .*experts.2.up_proj"),
        (lambda t: t.pop("score.weight"), "missing: score.weight"),
        (
            lambda t: t.update({"model.layers.0.mlp.bias": torch.ones(2)}),
            "left over: model.layers.0.mlp.bias",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.1.down_proj.weight": torch.ones(2, 2)}),
            "misshapen: .*experts.1.down_proj",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if "layers.2.mlp.experts" in n],
            "no experts for model.layers.2.mlp",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(
    change: Callable[[dict[str, Tensor]], object], fault: str, tmp_path: Path
) -> None:
    path = save(native("qwen3_moe"), tmp_path / "moe") / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=fault):
        NativeMoe(tmp_path / "moe")


def test_more_than_one_output_is_no_reward_model(tmp_path: Path) -> None:
    folder = save(native("mixtral", num_labels=2), tmp_path / "moe")
    with pytest.raises(MoemergeError, match="2 outputs"):
        NativeMoe(folder)

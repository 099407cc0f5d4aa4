"""The mergekit method, through mergekit's own Python API, against sums in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_dense
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.merge_methods import merge_state_dicts, registry
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from moemerge import mergekit_bridge
from moemerge.coefficients.base import Coefficients
from moemerge.errors import CheckpointError, MoemergeError, OptionError

ALPHA = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]], dtype=torch.float64)
SHARED = torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base model and three experts: tiny llamas of different seeds."""
    root = tmp_path_factory.mktemp("dense")
    return [save_dense(root / f"m{seed}", seed=seed) for seed in range(4)]


@pytest.fixture
def coefficients(tmp_path: Path) -> Path:
    Coefficients([0, 1, 2], ALPHA, SHARED).save(tmp_path / "fit")
    return tmp_path / "fit"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def by_hand(
    models: list[dict[str, torch.Tensor]], layers: tuple[int, ...] = (0, 1, 2)
) -> dict[str, torch.Tensor]:
    """shared * base + (1 - shared) * sum_i alpha_i expert_i for MLP tensors, else the base's, in float64."""
    expected = {}
    for name, base in models[0].items():
        expected[name] = base.double()
        for layer in layers:
            if f"layers.{layer}.mlp." in name:
                mean = sum(ALPHA[layer, i] * models[i + 1][name].double() for i in range(3))
                expected[name] = SHARED[layer] * base.double() + (1 - SHARED[layer]) * mean
    return expected


def test_yaml_merge_equals_the_sum_by_hand(dense: list[Path], coefficients: Path, tmp_path: Path) -> None:
    order = [2, 0, 1]  # the order in the file does not matter, the parameter expert does
    config = {
        "merge_method": mergekit_bridge.NAME,
        "base_model": str(dense[0]),
        "parameters": {"coefficients": str(coefficients)},
        "models": [{"model": str(dense[i + 1]), "parameters": {"expert": i}} for i in order],
    }
    text = yaml.safe_dump(config)
    merge = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(
        merge,
        str(tmp_path / "out"),
        MergeOptions(write_model_card=False, copy_tokenizer=False),
        config_source=text,
    )
    merged, models = weights(tmp_path / "out"), [weights(folder) for folder in dense]
    expected = by_hand(models)
    assert merged.keys() == expected.keys() == models[0].keys()
    changed = [name for name in merged if not torch.equal(merged[name], models[0][name])]
    assert changed == [name for name in merged if ".mlp." in name] and len(changed) == 9
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=2e-7, rtol=0)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(loaded).__name__ == "LlamaForSequenceClassification" and not info["missing_keys"]


def merge_in_memory(dense: list[Path], **parameters: object) -> dict[str, torch.Tensor]:
    models = dict(zip(["base", "a", "b", "c"], map(weights, dense), strict=True))
    return merge_state_dicts(models, mergekit_bridge.NAME, base="base", parameters=parameters)


def test_layers_without_coefficients_are_the_base_models(dense: list[Path], tmp_path: Path) -> None:
    Coefficients([1], ALPHA[1:2], SHARED[1:2]).save(tmp_path)
    merged = merge_in_memory(dense, coefficients=str(tmp_path), expert={"a": 0, "b": 1, "c": 2})
    expected = by_hand([weights(folder) for folder in dense], layers=(1,))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=2e-7, rtol=0)


def test_rewritten_coefficients_are_read_again(dense: list[Path], coefficients: Path) -> None:
    expert = {"a": 0, "b": 1, "c": 2}
    before = merge_in_memory(dense, coefficients=str(coefficients), expert=expert)
    Coefficients([0, 1, 2], ALPHA.flip(1), SHARED).save(coefficients)
    after = merge_in_memory(dense, coefficients=str(coefficients), expert=expert)
    assert not torch.equal(
        before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("expert", [{"a": 0, "b": 1, "c": 1}, {"a": 1, "b": 2, "c": 3}])
def test_wrong_expert_numbers_are_refused(
    dense: list[Path], coefficients: Path, expert: dict[str, int]
) -> None:
    with pytest.raises(OptionError, match="0 to 2, each once"):
        merge_in_memory(dense, coefficients=str(coefficients), expert=expert)


def test_unreadable_coefficients_are_refused(dense: list[Path], tmp_path: Path) -> None:
    expert = {"a": 0, "b": 1, "c": 2}
    with pytest.raises(CheckpointError, match="No such file"):
        merge_in_memory(dense, coefficients=str(tmp_path / "gone"), expert=expert)
    (tmp_path / "broken").write_text("nothing")
    with pytest.raises(MoemergeError):
        merge_in_memory(dense, coefficients=str(tmp_path / "broken"), expert=expert)
    with pytest.raises(Exception, match="coefficients"):
        merge_in_memory(dense, expert=expert)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.mlp.gate_proj.weight", 11),
        ("model.layers.0.self_attn.q_proj.weight", None),
        ("model.layers.0.post_attention_layernorm.weight", None),
        ("bert.encoder.layer.3.intermediate.dense.bias", 3),
        ("bert.encoder.layer.3.output.dense.weight", 3),
        ("bert.encoder.layer.3.attention.output.dense.weight", None),
        ("bert.encoder.layer.3.output.LayerNorm.weight", None),
        ("score.weight", None),
        ("model.embed_tokens.weight", None),
    ],
)
def test_mlp_tensors_are_told_by_name(name: str, layer: int | None) -> None:
    assert mergekit_bridge.mlp_layer(name) == layer


def test_registering_twice_does_no_harm() -> None:
    mergekit_bridge.register()
    mergekit_bridge.register()
    assert [m.spec.name for m in registry.registered_methods()].count(mergekit_bridge.NAME) == 1


@pytest.mark.parametrize(
    "imports",
    [
        "import moemerge; from mergekit.merge_methods import registry",
        "from mergekit.merge_methods import registry; import moemerge",
    ],
)
def test_importing_the_package_registers_the_method_in_either_order(imports: str) -> None:
    code = f"{imports}; print(registry.get('{mergekit_bridge.NAME}').spec.pretty_name)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert run.stdout.strip() == "Routing-normalised average", run.stderr


def test_the_bridge_can_be_imported_first() -> None:
    """As an entry point does."""
    code = (
        "from moemerge.mergekit_bridge import NAME, register; register()\n"
        "from mergekit.merge_methods import registry\n"
        "assert [m.spec.name for m in registry.registered_methods()].count(NAME) == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

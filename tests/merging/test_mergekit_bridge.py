"""The mergekit method, through mergekit's own Python API, against sums in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.merge_methods import merge_state_dicts, registry
from safetensors.torch import load_file
from tiny_models import save_dense
from transformers import AutoModelForSequenceClassification

from moemerge.errors import CheckpointError, MoemergeError, OptionError
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.mergekit import bridge as mergekit_bridge
from moemerge.run import cli

ALPHA = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]], dtype=torch.float64)
SHARED = torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base model and three experts: tiny llamas of different seeds."""
    root = tmp_path_factory.mktemp("dense")
    return [save_dense(root / f"m{seed}", seed=seed) for seed in range(4)]


@pytest.fixture
def coefficients(tmp_path: Path) -> Path:
    Coefficients.of_layers([0, 1, 2], ALPHA, SHARED).save(tmp_path / "fit")
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
        "merge_method": mergekit_bridge.OURS,
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
    return merge_state_dicts(models, mergekit_bridge.OURS, base="base", parameters=parameters)


NUMBERS = {"a": 0, "b": 1, "c": 2}


def test_layers_without_coefficients_must_be_the_same_in_all_models(
    dense: list[Path], tmp_path: Path
) -> None:
    Coefficients.of_layers([1], ALPHA[1:2], SHARED[1:2]).save(tmp_path)
    with pytest.raises(CheckpointError, match="block has no coefficients, but its models differ"):
        merge_in_memory(dense, coefficients=str(tmp_path), expert=NUMBERS)
    base, *experts = [weights(folder) for folder in dense]
    alike = [{name: t if ".layers.1." in name else base[name] for name, t in e.items()} for e in experts]
    models = dict(zip(["base", *NUMBERS], [base, *alike], strict=True))
    parameters = {"coefficients": str(tmp_path), "expert": NUMBERS}
    merged = merge_state_dicts(models, mergekit_bridge.OURS, base="base", parameters=parameters)
    for name, value in by_hand([base, *experts], layers=(1,)).items():
        torch.testing.assert_close(merged[name].double(), value, atol=2e-7, rtol=0)


def test_rewritten_coefficients_are_read_again(dense: list[Path], coefficients: Path) -> None:
    expert = {"a": 0, "b": 1, "c": 2}
    before = merge_in_memory(dense, coefficients=str(coefficients), expert=expert)
    Coefficients.of_layers([0, 1, 2], ALPHA.flip(1), SHARED).save(coefficients)
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
    assert [m.spec.name for m in registry.registered_methods()].count(mergekit_bridge.OURS) == 1


@pytest.mark.slow
def test_the_bridge_can_be_imported_first() -> None:
    """As an entry point does."""
    code = (
        "from moemerge.merging.mergekit.bridge import OURS, register; register()\n"
        "from mergekit.merge_methods import registry\n"
        "assert [m.spec.name for m in registry.registered_methods()].count(OURS) == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def config_file(
    folder: Path, dense: list[Path], method: str, shared: object, per_model: list[object]
) -> Path:
    """A YAML over the four models; `per_model` are the experts' parameters."""
    config = {
        "merge_method": method,
        "base_model": str(dense[0]),
        "parameters": shared,
        "models": [
            {"model": str(path), "parameters": given}
            for path, given in zip(dense[1:], per_model, strict=True)
        ],
    }
    folder.mkdir(exist_ok=True)
    (folder / "merge.yml").write_text(yaml.safe_dump(config))
    return folder / "merge.yml"


def run_cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["mergekit", *map(str, arguments)])
    return int(caught.value.code or 0)


def inline(alpha_L: list[float]) -> dict[str, object]:
    """Per-layer weights in mergekit's syntax; the value outside the layers must not matter."""
    return {"weight": [{"filter": "layers.", "value": alpha_L}, {"value": 9.0}]}


def test_inline_weights_give_what_the_file_gives(
    dense: list[Path], coefficients: Path, tmp_path: Path
) -> None:
    by_file = config_file(
        tmp_path / "a",
        dense,
        mergekit_bridge.OURS,
        {"coefficients": str(coefficients)},
        [{"expert": i} for i in range(3)],
    )
    by_list = config_file(
        tmp_path / "b",
        dense,
        mergekit_bridge.INLINE,
        {"shared_weight": SHARED.tolist()},
        [inline(column) for column in ALPHA.T.tolist()],
    )
    for file in (by_file, by_list):
        assert run_cli("yaml", file, file.parent / "out") == 0
    one, two = (weights(file.parent / "out") for file in (by_file, by_list))
    for name, tensor in by_hand([weights(folder) for folder in dense]).items():
        torch.testing.assert_close(one[name].double(), tensor, atol=2e-7, rtol=0)
        torch.testing.assert_close(one[name], two[name], atol=1e-7, rtol=0)


def test_inline_weights_are_strict(dense: list[Path], tmp_path: Path) -> None:
    def attempt(shared: object, given: object) -> None:
        file = config_file(tmp_path, dense, mergekit_bridge.INLINE, shared, [given] * 3)
        run_cli("yaml", file, tmp_path / "out")

    with pytest.raises(RuntimeError, match="Missing required parameter shared_weight"):
        attempt({"shared_wieght": 0.5}, {"weight": 1 / 3})
    with pytest.raises(RuntimeError, match="Missing required parameter weight"):
        attempt({"shared_weight": 0.5}, {})
    with pytest.raises(ValueError, match="less than or equal to 1"):
        attempt({"shared_weight": 1.5}, {"weight": 1 / 3})
    models = dict(zip(["base", *NUMBERS], map(weights, dense), strict=True))
    with pytest.raises(OptionError, match="alpha does not form an average"):
        parameters = {"shared_weight": 0.5, "weight": 0.5}
        merge_state_dicts(models, mergekit_bridge.INLINE, base="base", parameters=parameters)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_coefficients_are_found_beside_the_yaml_then_here(
    dense: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    Coefficients.of_layers([0, 1, 2], ALPHA, SHARED).save(here / "fit")
    file = config_file(
        beside, dense, mergekit_bridge.OURS, {"coefficients": "fit"}, [{"expert": i} for i in range(3)]
    )
    monkeypatch.chdir(here)
    assert run_cli("yaml", file, tmp_path / "one", "--no-copy-tokenizer") == 0
    Coefficients.of_layers([0, 1, 2], ALPHA.flip(1), SHARED).save(beside / "fit")
    assert run_cli("yaml", file, tmp_path / "two", "--no-copy-tokenizer") == 0
    name = "model.layers.0.mlp.up_proj.weight"
    expected = by_hand([weights(folder) for folder in dense])[name]
    assert torch.allclose(weights(tmp_path / "one")[name].double(), expected, atol=2e-7)
    assert not torch.allclose(weights(tmp_path / "two")[name].double(), expected, atol=1e-3)


@pytest.mark.parametrize("fault", ["missing file", "more layers", "more experts"])
def test_wrong_coefficients_end_before_weights_are_written(
    fault: str, dense: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = [0, 1, 3] if fault == "more layers" else [0, 1, 2]
    experts = 4 if fault == "more experts" else 3
    alpha_LN = torch.full((3, experts), 1 / experts, dtype=torch.float64)
    if fault != "missing file":
        Coefficients.of_layers(layers, alpha_LN, SHARED).save(tmp_path / "fit")
    given = {"coefficients": str(tmp_path / "fit")}
    file = config_file(tmp_path, dense, mergekit_bridge.OURS, given, [{"expert": i} for i in range(3)])
    assert run_cli("yaml", file, tmp_path / "out") == 2
    assert "to fix:" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert fault != "missing file" or not (tmp_path / "out").exists()


def test_stock_methods_give_the_stock_bytes(dense: list[Path], tmp_path: Path) -> None:
    """`moemerge mergekit yaml` against mergekit's own command: every file, byte for byte."""
    from click.testing import CliRunner
    from mergekit.scripts import run_yaml

    given = [{"weight": 0.5, "density": 0.4}] * 3
    file = config_file(tmp_path / "yaml", dense, "ties", {"normalize": True}, given)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    options = ["--out-shard-size", "50K", "--clone-tensors"]
    result = CliRunner().invoke(run_yaml.main, [str(file), str(tmp_path / "a/out"), *options])
    assert result.exit_code == 0, result.output
    assert run_cli("yaml", file, tmp_path / "b/out", *options) == 0
    stock, ours = ({p.name: p.read_bytes() for p in (tmp_path / n / "out").iterdir()} for n in "ab")
    assert stock == ours and len(stock) > 5


def test_models_replaced_on_disk_are_read_again(tmp_path: Path) -> None:
    """mergekit keeps opened models for the life of the process; the second merge must see the new weights."""
    model = save_dense(tmp_path / "model", seed=5)
    file = tmp_path / "merge.yml"
    models = [{"model": str(model), "parameters": {"weight": 1.0}}]
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    assert run_cli("yaml", file, tmp_path / "one") == 0
    save_dense(model, seed=6)
    assert run_cli("yaml", file, tmp_path / "two") == 0
    assert torch.equal(weights(tmp_path / "two")["score.weight"], weights(model)["score.weight"])


def test_raw_and_multi_stage_merges_know_the_method(
    dense: list[Path], coefficients: Path, tmp_path: Path
) -> None:
    given = [{"expert": i} for i in range(3)]
    method, shared = mergekit_bridge.OURS, {"coefficients": str(coefficients)}
    expected = by_hand([weights(folder) for folder in dense])
    staged = config_file(tmp_path / "multi", dense, method, shared, given)
    staged.write_text(
        yaml.safe_dump({"name": "first", **yaml.safe_load(staged.read_text())})
        + "---\n"
        + yaml.safe_dump(
            {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 1.0}}]}
        )
    )
    assert run_cli("multi", staged, "--out-path", tmp_path / "multi-out", "-I", tmp_path / "between") == 0
    files = [folder / "model.safetensors" for folder in dense]
    raw = config_file(tmp_path / "raw", files, method, shared, given)
    assert run_cli("pytorch", raw, tmp_path / "raw-out") == 0
    for out in ("multi-out", "raw-out"):
        found = weights(tmp_path / out)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), expected[name], atol=2e-7, rtol=0)


def test_help_of_a_mergekit_command_is_mergekits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("yaml", "--help") == 0
    out = capsys.readouterr().out
    assert "Usage: moemerge mergekit yaml" in out and "--out-shard-size" in out

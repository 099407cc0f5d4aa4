"""`moemerge merge --method`: mergekit's methods over a MoE's experts, and the guards of every merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file
from small_moe import ALPHA, SHARED, N, make_moe, rewrite
from torch import Tensor

from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import CheckpointError, Faults, OptionError
from moemerge.evaluation.model_card import make_card
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.loading import load_reward_model
from moemerge.options.publish import Publish
from moemerge.run import cli
from moemerge.stages import OPTIONS
from moemerge.stages.merge import merge

# Every method that takes a base and any number of models, with parameters it needs.
METHODS: dict[str, dict[str, float | bool]] = {
    "linear": {"weight": 1.0},
    "multislerp": {"weight": 1.0},
    "ram": {},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2},
    "sce": {"select_topk": 0.5},
    "model_stock": {},
    "karcher": {"max_iter": 10},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 1.0, "density": 0.5, "normalize": True},
    "breadcrumbs": {"weight": 0.5, "density": 0.8, "gamma": 0.1},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.8, "gamma": 0.1},
}
RANDOM = {
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "della_linear": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("methods") / "moe")


@pytest.fixture
def coefficients(tmp_path: Path) -> str:
    return str(Coefficients.of_layers([0, 1, 2], ALPHA, SHARED).save(tmp_path / "fit").parent)


def expert_mlps(moe: Path) -> dict[Any, dict[str, Tensor]]:
    """The MLP tensors of each expert, under its dense names; the shared expert's is called shared."""
    source = MoeCheckpoint(moe)
    copies = {tensor.dense: list(source.matrices(tensor)) for tensor in source.tensors}
    names = ["shared", *range(N)] if source.settings.shared_expert else list(range(N))
    return {name: {dense: c[i] for dense, c in copies.items()} for i, name in enumerate(names)}


def merged_by(moe: Path, output: Path, method: str, **options: Any) -> dict[str, Tensor]:
    """The merged tensors; everything but the MLPs is the MoE's bit for bit."""
    folder = merge(model=str(moe), output=output, method=method, **options)
    found, source = load_file(folder / "model.safetensors"), MoeCheckpoint(moe)
    assert found.keys() == Checkpoint(moe.parent / f"dense-{moe.name}")._files.keys()
    assert all(torch.equal(found[name], source.weights.tensor(name)) for name in source.backbone)
    assert "score.weight" in source.backbone
    return {tensor.dense: found[tensor.dense] for tensor in source.tensors}


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_mergekits_own(method: str, moe: Path, tmp_path: Path) -> None:
    parameters = METHODS[method]
    found = merged_by(moe, tmp_path / "m", method, parameters=parameters)
    models = expert_mlps(moe)
    expected = merge_state_dicts(models, method, base="shared", parameters=parameters)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(not torch.equal(found[name], models["shared"][name]) for name in found)
    load_reward_model(str(tmp_path / "m"), "cpu")


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_repeat_with_the_seed(method: str, moe: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    runs = [
        merged_by(moe, tmp_path / str(i), method, parameters=RANDOM[method], seed=seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_coefficients_are_the_weight(moe: Path, coefficients: str, tmp_path: Path) -> None:
    """Linear over all, and base plus weighted differences, are both the routing-normalised average."""
    ours = merged_by(moe, tmp_path / "a", "routing_normalized_average", coefficients=coefficients)
    for number, (method, parameters) in enumerate(
        [("linear", {"normalize": False}), ("task_arithmetic", {"normalize": False})]
    ):
        output = tmp_path / str(number)
        found = merged_by(moe, output, method, coefficients=coefficients, parameters=parameters)
        for name, tensor in ours.items():
            torch.testing.assert_close(found[name], tensor, atol=5e-7, rtol=0)


def test_unused_coefficients_are_told(
    moe: Path, coefficients: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_them = merged_by(moe, tmp_path / "a", "karcher", coefficients=coefficients)
    assert "the coefficients are not used" in caplog.text
    results = read_manifest(tmp_path / "a")["results"]
    assert results["coefficients"] is None and results["method"] == "karcher"
    without = merged_by(moe, tmp_path / "b", "karcher")
    assert all(torch.equal(with_them[name], without[name]) for name in without)


def test_without_a_shared_expert(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", shared_expert=False)
    found = merged_by(moe, tmp_path / "m", "linear", parameters={"weight": 1.0})
    expected = merge_state_dicts(expert_mlps(moe), "linear", parameters={"weight": 1.0})
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(OptionError, match="no shared one, so no base"):
        merge(model=str(moe), output=tmp_path / "n", method="ties", parameters={"weight": 1.0})


def test_dtypes(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", dtype=torch.bfloat16)
    wide = {i: {name: t.float() for name, t in tensors.items()} for i, tensors in expert_mlps(moe).items()}
    folder = merge(
        model=str(moe), output=tmp_path / "m", method="linear", dtype="float32", parameters={"weight": 1}
    )
    expected = merge_state_dicts(wide, "linear", base="shared", parameters={"weight": 1.0})
    written = load_file(folder / "model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.float32}
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"method": "tise", "parameters": {"weight": 1}}, "did you mean 'ties'"),
        ({"method": "routing_normalized_average_inline"}, "unknown merge method"),
        ({"method": "ties"}, "Missing required parameter weight"),
        ({"method": "ties", "parameters": {"weight": 1, "densty": 0.5}}, "densty"),
        ({"method": "linear", "parameters": {"weight": "heavy"}}, "heavy"),
        ({"method": "slerp", "parameters": {"t": 0.5}}, "exactly 2 inputs"),
        ({}, "needs coefficients"),
        ({"parameters": {"weight": 1.0}, "coefficients": "x"}, "parameters go with a method of mergekit"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], word: str, moe: Path, tmp_path: Path) -> None:
    with pytest.raises((OptionError, Faults), match=word):
        merge(model=str(moe), output=tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_parameters_from_the_command_line_are_texts(moe: Path, tmp_path: Path) -> None:
    flags = "--method ties --parameters weight=1 --parameters density=0.5 --parameters normalize=true"
    with pytest.raises(SystemExit) as done:
        cli.main(["merge", "--model", str(moe), *flags.split(), "--output", str(tmp_path / "cli")])
    assert done.value.code == 0
    ours = merged_by(moe, tmp_path / "python", "ties", parameters=METHODS["ties"])
    written = load_file(tmp_path / "cli" / "model.safetensors")
    assert all(torch.equal(written[name], ours[name]) for name in ours)


def test_the_card_names_the_method(moe: Path, coefficients: str, tmp_path: Path) -> None:
    options = {"coefficients": coefficients, "parameters": {"normalize": False}}
    merged_by(moe, tmp_path / "m", "linear", **options)
    card = str(make_card(Publish(model=str(tmp_path / "m"), output=tmp_path / "card"), OPTIONS))
    assert "mergekit)'s method `linear`" in card and "2512.00724" not in card
    assert "## Coefficients" not in card


def test_two_kinds_of_weight_are_refused(moe: Path, coefficients: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="weights are given twice"):
        merged_by(moe, tmp_path / "m", "linear", coefficients=coefficients, parameters={"weight": 1.0})


# Guards


def spoil(part: str, value: float) -> Callable[[str, Tensor], Tensor]:
    def change(name: str, tensor: Tensor) -> Tensor:
        if part in name:
            tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize("part", ["layers.1.mlp.experts.down_proj", "shared_expert.up_proj", "score.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(
    part: str, value: float, moe: Path, coefficients: str, tmp_path: Path
) -> None:
    broken = rewrite(shutil.copytree(moe, tmp_path / "broken"), spoil(part, value))
    for options in ({"coefficients": coefficients}, {"method": "karcher"}):
        with pytest.raises(CheckpointError, match="weights are not finite"):
            merge(model=str(broken), output=tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_an_expert_of_weight_zero_must_be_finite_too(moe: Path, tmp_path: Path) -> None:
    last = spoil("layers.1.mlp.experts.down_proj", float("nan"))
    broken = rewrite(shutil.copytree(moe, tmp_path / "broken"), last)
    first_LN = torch.eye(N, dtype=torch.float64)[0].repeat(3, 1)
    given = Coefficients.of_layers([0, 1, 2], first_LN, SHARED).save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="model.layers.1.mlp.down_proj.weight of expert-2"):
        merge(model=str(broken), coefficients=str(given), output=tmp_path / "m")


def test_numbers_beyond_float16_are_refused(moe: Path, coefficients: str, tmp_path: Path) -> None:
    broken = rewrite(shutil.copytree(moe, tmp_path / "big"), spoil("norm.weight", 1e6))
    merge(model=str(broken), coefficients=coefficients, output=tmp_path / "fine")
    with pytest.raises(CheckpointError, match="as torch.float16"):
        merge(model=str(broken), coefficients=coefficients, output=tmp_path / "m", dtype="float16")

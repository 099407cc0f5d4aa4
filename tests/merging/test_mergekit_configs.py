"""The mergekit examples in merge_configs/mergekit, run as their comments say, on tiny models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_moe import rewrite
from tiny_models import save_dense, tiny_dense, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from moemerge.merging.coefficients import Coefficients
from moemerge.merging.sources.models import ModelList
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.loading import load_reward_model
from moemerge.run import cli
from moemerge.run.templates import templates
from moemerge.stages.export import export
from moemerge.stages.merge import merge
from moemerge.stages.upcycle import upcycle

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "merge_configs" / "mergekit"
ALPHA = torch.tensor([0.25, 0.25, 0.125, 0.125, 0.125, 0.125, 0.0], dtype=torch.float64).repeat(3, 1)
SHARED = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
RMS, LM = [f"models/rm-{seed}" for seed in range(3)], "models/lm"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as the examples expect it: moe, fit, usage and experts of an upcycled model; models/rm-0 ...
    rm-2 with fit-rms; models/lm with doge.
    """
    home, here = tmp_path_factory.mktemp("home"), Path.cwd()
    os.chdir(home)
    for seed in range(3):
        save_dense(home / f"models/rm-{seed}", seed=seed)
    AutoModelForCausalLM.from_config(tiny_dense().config).save_pretrained(home / "models/lm")
    tiny_tokenizer().save_pretrained(home / "models/lm")
    export(base=RMS[0], models=[LM], scope="body", output="doge")
    upcycle(model=str(home / "models/rm-0"), output=home / "moe")
    generator = torch.Generator().manual_seed(1)

    def noisy(name: str, tensor: Tensor) -> Tensor:
        return tensor + 0.1 * torch.randn(tensor.shape, generator=generator) * ("expert" in name)

    rewrite(home / "moe", noisy)
    Coefficients.of_layers([0, 1, 2], ALPHA, SHARED).save(home / "fit")
    Coefficients.of_layers([0, 1, 2], ALPHA.flip(1), SHARED).save(home / "usage")
    alpha_LN = torch.rand(5, 3, generator=generator, dtype=torch.float64).softmax(1)
    source = ModelList(RMS)
    zero_L = torch.zeros(5, dtype=torch.float64)
    Coefficients(source.blocks(), alpha_LN, zero_L, source.identity()).save("fit-rms")
    export(model=str(home / "moe"), output=home / "experts")
    for config in CONFIGS.glob("*.yml"):
        shutil.copy(config, home)
    yield home
    os.chdir(here)


def run(home: Path, name: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Tensors of the merged model, which loads as a reward model."""
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as done:
        cli.main(["mergekit", "yaml", f"{name}.yml", str(output)])
    assert done.value.code == 0
    load_reward_model(str(output), "cpu")
    assert (output / "tokenizer.json").exists()
    return load_file(output / "model.safetensors")


def straight(home: Path, output: Path, **options: Any) -> dict[str, Tensor]:
    """Tensors of `moemerge merge` on the same members."""
    return load_file(merge(output=output, **options) / "model.safetensors")


SAME: dict[str, dict[str, Any]] = {
    "umm_rm": {"model": "moe", "coefficients": "fit"},
    "usage": {"model": "moe", "coefficients": "usage"},
    "learned_rms": {"models": RMS, "coefficients": "fit-rms"},
    "dogerm": {
        "base": RMS[0],
        "models": [LM],
        "scope": "body",
        "method": "linear",
        "weights": [0.7, 0.3],
        "parameters": {"normalize": False},
    },
    "uniform_linear": {"model": "moe", "method": "linear", "parameters": {"weight": 1.0}},
    "ties_experts": {
        "model": "moe",
        "method": "ties",
        "parameters": {"weight": 1.0, "density": 0.5, "normalize": True},
    },
}


@pytest.mark.parametrize("name", SAME)
def test_the_example_gives_what_moemerge_merge_gives(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(home, name, tmp_path / "merged", monkeypatch)
    expected = straight(home, tmp_path / "straight", **SAME[name])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_inline_weights(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(home, "inline_weights", tmp_path / "merged", monkeypatch)
    for shared, matrix in ((0.6, "down_proj"), (0.5, "up_proj")):
        shared_L = torch.full((3,), shared, dtype=torch.float64)
        given = Coefficients.of_layers([0, 1, 2], ALPHA, shared_L).save(tmp_path / matrix)
        expected = straight(home, tmp_path / f"m-{matrix}", model="moe", coefficients=str(given))
        names = [name for name in found if matrix in name]
        assert len(names) == 3 and all(torch.equal(found[name], expected[name]) for name in names)


def test_warm(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(home, "warm", tmp_path / "merged", monkeypatch)
    models = [load_file(home / f"models/rm-{seed}" / "model.safetensors") for seed in range(3)]
    assert found.keys() == models[0].keys() and "score.weight" in found
    for name, tensor in found.items():
        mean = sum(model[name].double() for model in models) / 3
        assert tensor.dtype == torch.bfloat16
        assert float((tensor.double() - mean).abs().max()) <= float(mean.abs().max()) * 2**-8


def test_two_stages(home: Path, tmp_path: Path) -> None:
    flags = ["--out-path", str(tmp_path / "merged"), "--intermediate-dir", str(tmp_path / "between")]
    with pytest.raises(SystemExit) as done:
        cli.main(["mergekit", "multi", "multi_stage.yml", *flags])
    assert done.value.code == 0
    load_reward_model(str(tmp_path / "merged"), "cpu")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    *models, language = [load_file(Path(folder) / "model.safetensors") for folder in [*RMS, LM]]
    for name, tensor in found.items():
        warm = sum(model[name].double() for model in models) / 3
        expected = warm if name == "score.weight" else 0.7 * warm + 0.3 * language[name].double()
        torch.testing.assert_close(tensor.double(), expected, atol=2e-7, rtol=0)


def test_every_example_is_tested_and_shipped_but_is_no_recipe() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yml")}
    assert names == {*SAME, "inline_weights", "warm", "multi_stage"}
    assert not names & set(templates())
    tomllib = pytest.importorskip("tomllib")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "merge_configs"
    shipped = {path for glob in data["moemerge.merge_configs"] for path in folder.glob(glob)}
    for part in ("mergekit", "own"):
        shipped |= {p for glob in data[f"moemerge.merge_configs.{part}"] for p in (folder / part).glob(glob)}
    assert shipped == {*folder.rglob("*.yml"), folder / "recipe.schema.json"}
    for path in CONFIGS.glob("*.yml"):
        assert all(len(line) <= 120 for line in path.read_text().splitlines()), path
        assert all(part["base_model"] for part in yaml.safe_load_all(path.read_text())), path


@pytest.mark.slow
def test_the_opt_in_for_the_stock_command(home: Path, tmp_path: Path) -> None:
    """The lines of docs/mergekit.md: a sitecustomize.py on PYTHONPATH, then the stock command."""
    page = (ROOT / "docs" / "mergekit.md").read_text()
    lines = page.split("<!-- opt-in -->\n```\n")[1].split("```")[0].splitlines()
    assert len(lines) == 3 and lines[2].endswith("mergekit-yaml umm_rm.yml merged")
    script = "\n".join(lines).replace("~", str(tmp_path)).replace(" merged", f" {tmp_path / 'merged'}")
    stock = f'{sys.executable} -c "from mergekit.scripts.run_yaml import main; main()"'
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = script.replace("mergekit-yaml", stock).replace("PYTHONPATH=", f"PYTHONPATH={ROOT}:")
    done = subprocess.run(["bash", "-ec", script], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = merge(model=str(home / "moe"), coefficients=str(home / "fit"), output=tmp_path / "ours")
    written, expected = Checkpoint(tmp_path / "merged"), Checkpoint(ours)
    assert set(written.names) == set(expected.names)
    assert all(torch.equal(written.tensor(n), expected.tensor(n)) for n in expected.names)

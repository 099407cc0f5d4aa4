"""Room on the disk is asked for before long work, and it is the room that is needed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moemerge.artifacts import disk
from moemerge.artifacts import stage as artifacts
from moemerge.errors import ArtifactError, CheckpointError
from moemerge.stages.export import export
from moemerge.stages.fit import fit
from moemerge.stages.merge import merge
from moemerge.stages.train import train
from moemerge.stages.upcycle import upcycle


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, dense_folder: Path) -> Path:
    """A dense model's MoE, coefficients and a few pairs."""
    root = tmp_path_factory.mktemp("space")
    upcycle(model=str(dense_folder), output=root / "moe", num_routed_experts=3, num_experts_per_tok=2)
    upcycle(model=str(dense_folder), output=root / "topk", num_experts_per_tok=2, gate="topk")
    fit(model=str(root / "moe"), method="uniform", output=root / "c")
    rows = [{"prompt": f"w{i}", "chosen": f" w50 w{i}", "rejected": f" w51 w{i}"} for i in range(8)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(kind: str, world: Path, dense: Path, output: Path) -> Path:
    moe, found, pairs = str(world / "moe"), str(world / "c"), str(world / "pairs.jsonl")
    stages: dict[str, Callable[[], Path]] = {
        "upcycle": lambda: upcycle(model=str(dense), output=output, num_routed_experts=5),
        "merge": lambda: merge(model=moe, coefficients=found, output=output),
        "merge in half precision": lambda: merge(
            model=moe, coefficients=found, output=output, dtype="bfloat16"
        ),
        "export": lambda: export(model=moe, output=output),
        "export as stock": lambda: export(model=str(world / "topk"), form="qwen2_moe", output=output),
        "train": lambda: train(
            model=moe, pairs=pairs, validation=pairs, output=output, max_steps=4, eval_steps=1
        ),
    }
    return stages[kind]()


KINDS = ("upcycle", "merge", "merge in half precision", "export", "export as stock", "train")


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_space_is_told_before_anything_is_written(
    kind: str, world: Path, dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrote(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(disk, "free_space", lambda folder: 1000)
    for place in (
        "moemerge.stages.upcycle",
        "moemerge.stages.merge",
        "moemerge.stages.export",
        "moemerge.merging.qwen2_moe",
    ):
        monkeypatch.setattr(importlib.import_module(place), "write_checkpoint", wrote)
    with pytest.raises(ArtifactError, match="not enough space"):
        run(kind, world, dense_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_space_asked_for_is_that_of_the_weights(
    kind: str, world: Path, dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(artifacts, "require_space", lambda folder, size: asked.append(size))
    made = run(kind, world, dense_folder, tmp_path / "out")
    files = {path.stat().st_ino: path for path in made.rglob("*.safetensors")}  # linked ones count once
    headers = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files.values()]
    written = sum(path.stat().st_size for path in files.values()) - sum(headers)
    assert asked == [written]


def test_the_space_asked_for_by_training_is_not_exceeded(
    world: Path, dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moemerge.training.trainer import PairTrainer

    asked: list[int] = []
    used: list[int] = []
    monkeypatch.setattr(artifacts, "require_space", lambda folder, size: asked.append(size))
    save = PairTrainer._save_rng_state

    def measure(self: Any, folder: str) -> None:  # before older checkpoints go
        save(self, folder)
        used.append(disk.size_of(tmp_path))

    monkeypatch.setattr(PairTrainer, "_save_rng_state", measure)
    made = run("train", world, dense_folder, tmp_path / "out")
    model = (made / "model.safetensors").stat().st_size
    assert len(used) == 4 and 0.7 * asked[0] < max(used) + model < 1.2 * asked[0]


def test_training_reads_back_what_it_saved(
    world: Path, dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the disk had changed one number."""

    def spoil(path: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(path)
        tensors["model.norm.weight"][0] += torch.tensor(1e-3)
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(importlib.import_module("moemerge.training.saving"), "flush_and_forget", spoil)
    with pytest.raises(CheckpointError, match="not written as meant"):
        run("train", world, dense_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()

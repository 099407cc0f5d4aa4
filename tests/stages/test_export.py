"""Exported experts are ordinary dense models, and stock mergekit merges them as `moemerge merge` does."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_moe import ALPHA, SHARED, N, make_moe, random_pairs, stock_merge, write_rows
from tiny_models import CORE, families
from transformers import AutoModelForSequenceClassification

from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import CheckpointError
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.folder import ModelFolder
from moemerge.stages.evaluate import evaluate
from moemerge.stages.export import export
from moemerge.stages.merge import merge

NAMES = ["shared", *(f"expert-{i}" for i in range(N))]
LINEAR = {"method": "linear", "parameters": {"normalize": False}}


def fitted(folder: Path, shared: bool = True) -> str:
    shared_L = SHARED if shared else torch.zeros(3, dtype=torch.float64)
    return str(Coefficients.of_layers([0, 1, 2], ALPHA, shared_L).save(folder).parent)


def assert_same(one: Path, other: Path) -> None:
    """Two models with the same tensors, bit for bit, and the same dtypes."""
    a, b = Checkpoint(one), Checkpoint(other)
    assert sorted(a.names) == sorted(b.names)
    for name in a.names:
        assert a.dtype(name) == b.dtype(name), name
        assert torch.equal(a.tensor(name), b.tensor(name)), name


def assert_close(one: Path, other: Path) -> None:
    """The same up to rounding in the dtype of the weights: two units in the last place of the largest."""
    a, b = Checkpoint(one), Checkpoint(other)
    assert sorted(a.names) == sorted(b.names)
    for name in a.names:
        x, y = a.tensor(name), b.tensor(name)
        bound = 2 * torch.finfo(x.dtype).eps * float(x.abs().max())
        assert x.dtype == y.dtype and float((x.double() - y.double()).abs().max()) <= bound, name


@pytest.mark.parametrize("family", families(CORE))
def test_exported_experts_merge_in_stock_mergekit(family: str, tmp_path: Path) -> None:
    moe, given = make_moe(tmp_path / "moe", family), fitted(tmp_path / "fit")
    folder = export(model=str(moe), coefficients=given, output=tmp_path / "experts")
    assert {p.name for p in folder.iterdir()} == {*NAMES, "linear.yml", "manifest.json"}
    source, dense = MoeCheckpoint(moe), Checkpoint(tmp_path / "dense-moe")
    for place, name in enumerate(NAMES):
        expert = Checkpoint(folder / name)
        assert sorted(expert.names) == sorted(dense.names)
        for tensor in source.tensors:
            assert torch.equal(expert.tensor(tensor.dense), list(source.matrices(tensor))[place])
        assert all(torch.equal(expert.tensor(n), source.weights.tensor(n)) for n in source.backbone)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder / name, output_loading_info=True
        )
        assert type(model).__name__ == ModelFolder(tmp_path / "dense-moe").architectures[0]
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (folder / name / "tokenizer.json").read_bytes() == (moe / "tokenizer.json").read_bytes()
    stock = stock_merge(folder / "linear.yml", tmp_path / "stock")
    assert_same(stock, merge(model=str(moe), coefficients=given, output=tmp_path / "linear", **LINEAR))
    assert_close(stock, merge(model=str(moe), coefficients=given, output=tmp_path / "ours"))


@pytest.mark.slow
def test_mergekit_yaml_without_moemerge_gives_the_same_model(tmp_path: Path) -> None:
    """The command itself, in a process that cannot import moemerge, in bfloat16; the folder was moved."""
    moe, given = make_moe(tmp_path / "moe", dtype=torch.bfloat16), fitted(tmp_path / "fit")
    folder = export(model=str(moe), coefficients=given, output=tmp_path / "experts")
    code = "import sys; sys.modules['moemerge'] = None; from mergekit.scripts.run_yaml import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "linear.yml", str(tmp_path / "stock")],
        capture_output=True,
        text=True,
        cwd=folder.rename(tmp_path / "elsewhere"),
    )
    assert done.returncode == 0, done.stderr
    ours = merge(model=str(moe), coefficients=given, output=tmp_path / "ours")
    assert_close(tmp_path / "stock", ours)
    assert_same(
        tmp_path / "stock", merge(model=str(moe), coefficients=given, output=tmp_path / "m", **LINEAR)
    )
    assert Checkpoint(tmp_path / "stock").dtype("score.weight") == torch.bfloat16


def test_everything_but_the_mlps_is_stored_once(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe")
    folder = export(model=str(moe), output=tmp_path / "experts", shard_size=30_000)
    assert not (folder / "linear.yml").exists()
    files = {name: sorted((folder / name).glob("*.safetensors")) for name in NAMES}
    shared = [p for p in files["shared"] if p.stat().st_nlink == len(NAMES)]
    own = [p for p in files["shared"] if p.stat().st_nlink == 1]
    assert len(shared) > 1 and len(own) > 1
    inodes = {p.stat().st_ino for paths in files.values() for p in paths}
    assert len(inodes) == len(shared) + len(NAMES) * len(own)
    assert read_manifest(folder)["results"]["models"] == NAMES


def test_where_links_cannot_be_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    moe = make_moe(tmp_path / "moe")
    linked = export(model=str(moe), output=tmp_path / "linked")
    monkeypatch.setattr(os, "link", refuse)
    copied = export(model=str(moe), output=tmp_path / "copied")
    assert all(p.stat().st_nlink == 1 for p in copied.rglob("*.safetensors"))
    for name in NAMES:
        assert_same(linked / name, copied / name)


def test_mixed_cases_merge_alike(tmp_path: Path) -> None:
    """No shared expert; experts in one layer only; weights widened by training; @ and + in the path."""
    bare = make_moe(tmp_path / "bare", shared_expert=False)
    one = make_moe(tmp_path / "one", layers="1")
    wide = make_moe(tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    config["moemerge"]["dense_dtype"] = "bfloat16"
    (wide / "config.json").write_text(json.dumps(config))
    middle = Coefficients.of_layers([1], ALPHA[1:2], SHARED[1:2]).save(tmp_path / "middle")
    cases = {"bare": fitted(tmp_path / "c", shared=False), "one": str(middle), "wide": fitted(tmp_path / "d")}
    for (name, given), moe in zip(cases.items(), (bare, one, wide), strict=True):
        folder = export(model=str(moe), coefficients=given, output=tmp_path / f"{name}+@experts")
        assert (folder / "shared").exists() == (name != "bare")
        stock = stock_merge(folder / "linear.yml", tmp_path / f"{name}-stock")
        options = {"model": str(moe), "coefficients": given}
        assert_same(stock, merge(**options, output=tmp_path / f"{name}-linear", **LINEAR))
        assert_close(stock, merge(**options, output=tmp_path / f"{name}-ours"))
        dtype = torch.bfloat16 if name == "wide" else torch.float32
        assert Checkpoint(stock).dtype("score.weight") == dtype


def test_exported_experts_can_be_evaluated(tmp_path: Path) -> None:
    folder = export(model=str(make_moe(tmp_path / "moe")), output=tmp_path / "experts")
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(12))
    report = evaluate(
        models={name: str(folder / name) for name in NAMES},
        pairs={"test": str(pairs)},
        probes=["accuracy"],
        resamples=100,
        output=tmp_path / "report",
    )
    assert all(name in (report / "report.json").read_text() for name in NAMES)


def test_foreign_coefficients_are_refused(tmp_path: Path) -> None:
    given = Coefficients.of_layers([0, 1, 3], ALPHA, SHARED).save(tmp_path / "fit")
    with pytest.raises(CheckpointError, match="do not belong"):
        export(model=str(make_moe(tmp_path / "moe")), coefficients=str(given), output=tmp_path / "experts")
    assert not (tmp_path / "experts").exists()

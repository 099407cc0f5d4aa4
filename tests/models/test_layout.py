"""A MoE's layout: what is kept in the folder is what follows from the config, or is not used."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from small_moe import ALPHA, SHARED, make_moe
from tiny_models import CORE, families
from transformers import AutoConfig

from moemerge.errors import CheckpointError
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.layout import FILE, read_layout
from moemerge.models.modelling import layout_of, load_moe
from moemerge.models.portable import make_portable
from moemerge.stages.merge import merge

LIGHT_MERGE = """
import sys
from moemerge.run.cli import main
try:
    main(["merge", *sys.argv[1:]])
except SystemExit as done:
    assert done.code == 0
assert "torch" in sys.modules
sys.exit(" ".join({"transformers", "mergekit", "huggingface_hub"} & set(sys.modules)) or 0)
"""


@pytest.mark.parametrize("family", families(CORE))
def test_the_layout_that_is_kept_is_the_one_of_the_config(family: str, tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", family)
    assert read_layout(moe) == layout_of(AutoConfig.from_pretrained(moe))


def test_a_saved_model_keeps_its_layout(tmp_path: Path) -> None:
    load_moe(make_moe(tmp_path / "moe")).to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    found = read_layout(tmp_path / "saved")
    assert found == layout_of(AutoConfig.from_pretrained(tmp_path / "saved"))
    assert found is not None and found.dense_config["dtype"] == "bfloat16"


def test_a_layout_of_another_config_or_version_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = make_moe(tmp_path / "moe")
    text = (moe / "config.json").read_text()
    (moe / "config.json").write_text(json.dumps({**json.loads(text), "intermediate_size": 40}))
    assert read_layout(moe) is None
    with pytest.raises(CheckpointError, match="misshapen"):
        MoeCheckpoint(moe)
    (moe / "config.json").write_text(text)
    assert read_layout(moe) is not None
    monkeypatch.setattr(metadata, "version", lambda package: "0")
    assert read_layout(moe) is None


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"for": 1}'])
def test_a_damaged_layout_is_not_used(damage: str, tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe")
    (moe / FILE).write_text(damage)
    assert read_layout(moe) is None
    assert MoeCheckpoint(moe).layout == layout_of(AutoConfig.from_pretrained(moe))


def test_merging_without_transformers_writes_the_same_files(tmp_path: Path) -> None:
    """In a fresh process, from the layout; here, from the model classes."""
    moe = make_moe(tmp_path / "moe")
    Coefficients([f"layers.{n}" for n in range(3)], ALPHA, SHARED).save(tmp_path / "found")
    options = ["--model", moe, "--coefficients", tmp_path / "found", "--output", tmp_path / "light"]
    command = [sys.executable, "-c", LIGHT_MERGE, *map(str, options)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (moe / FILE).unlink()
    heavy = merge(model=str(moe), coefficients=str(tmp_path / "found"), output=tmp_path / "heavy")
    names = {path.name for path in heavy.iterdir()}
    assert names == {path.name for path in (tmp_path / "light").iterdir()} and FILE not in names
    for name in names - {"manifest.json"}:
        assert (heavy / name).read_bytes() == (tmp_path / "light" / name).read_bytes(), name
    config = MoeCheckpoint(moe).dense_config()
    config.dtype = torch.float32
    config.save_pretrained(tmp_path / "config")
    make_portable(tmp_path / "config")  # as merge does with what it writes
    assert (heavy / "config.json").read_text() == (tmp_path / "config" / "config.json").read_text()

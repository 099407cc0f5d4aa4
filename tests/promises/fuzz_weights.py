"""Targets of the fuzzer that hold tensors or say where these stand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from fuzz_library import library
from fuzz_tools import VALUES, Dice, changed, damage, mutated, spoil_json
from hostile_files import shard
from safetensors.torch import save_file

from moemerge.artifacts.manifest import model_fingerprint
from moemerge.errors import CheckpointError
from moemerge.merging.blocks import BLOCK_NAME
from moemerge.merging.calibration import Calibration, Scale
from moemerge.merging.coefficients import FORMAT, Coefficients
from moemerge.models.folder import ModelFolder
from moemerge.models.layout import FILE as LAYOUT
from moemerge.models.layout import _key, read_layout
from moemerge.models.moe_settings import MoeSettings
from moemerge.models.routing import RoutingStatistics
from moemerge.models.scorers.activation import read_heads, write_heads

CONFIG = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "num_hidden_layers": 2}
SETTINGS = {
    "num_routed_experts": 3, "num_experts_per_tok": 2, "shared_expert": True, "layers": [0, 1], "gate": "xft",
    "gate_shared_weight": 0.5, "router": "linear", "router_init_std": 0.02, "balance_coefficient": 0.01,
    "balance_loss": "cv", "dense_dtype": "float32",
}  # fmt: skip
STACK = "model.layers.0.mlp.experts.up_proj"
TENSOR = {
    "layer": 0, "matrix": "up", "dense": "model.layers.0.mlp.up_proj.weight",
    "shared": "model.layers.0.mlp.shared_expert.up_proj.weight", "stacked": STACK, "rows": [0, 4],
    "transposed": False, "shape": [4, 2],
}  # fmt: skip
LAYOUT_SEED = {
    "class_name": "Moe", "moe": {STACK: [3, 4, 2], "score.weight": [1, 2]}, "tied": [],
    "dense": [TENSOR["dense"], "score.weight"], "experts": [TENSOR], "dense_config": CONFIG,
}  # fmt: skip


def make_checkpoint(folder: Path, draw: Dice) -> None:
    """Weights in one file or in shards, whose header, bytes or index are broken."""
    tensors = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4), "c": torch.ones(2, 2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if draw.random() < 0.5:
        shard(folder)
        index = folder / "model.safetensors.index.json"
        if draw.random() < 0.5:
            index.write_text(json.dumps(changed(json.loads(index.read_text()), draw)))
            return
        damage(draw.choice(sorted(folder.glob("*.safetensors"))), draw)
        return
    damage(folder / "model.safetensors", draw)


def read_checkpoint(folder: Path) -> None:
    """All of the tensors."""
    weights = ModelFolder(folder).weights
    for name in weights.names:
        weights.shape(name)
        weights.dtype(name)
        weights.tensor(name)
    weights.refuse_quantised(weights.names)


def make_coefficients(folder: Path, draw: Dice) -> None:
    """Coefficients with broken names of blocks, or a broken file."""
    made = Coefficients.of_layers([0, 1], torch.full((2, 4), 0.25).double(), torch.full((2,), 0.5).double())
    path = made.save(folder)
    if draw.random() < 0.5:
        blocks = json.dumps(changed(made.blocks, draw))
        save_file(
            {"alpha_LN": made.alpha_LN, "shared_L": made.shared_L},
            path,
            metadata={"format": FORMAT, "blocks": mutated(blocks.encode(), draw).decode("utf-8", "replace")},
        )
    else:
        damage(path, draw)


def read_coefficients(folder: Path) -> None:
    """All that a merge takes from them."""
    found = Coefficients.load(folder)
    assert all(BLOCK_NAME.fullmatch(block) for block in found.blocks)
    assert bool(found.alpha_LN.isfinite().all()) and list(found.table())


def make_calibration(folder: Path, draw: Dice) -> None:
    """The scales of two models, broken."""
    models = [library() / "dense" / family for family in ("llama", "bert")]
    scales = {m.name: Scale(str(m), model_fingerprint(m), 0.5, 0.25, 1.0, 9) for m in models}
    spoil_json(Calibration(scales).save(folder), draw)


def read_calibration(folder: Path) -> None:
    """The scales that a merge of the two asks for."""
    models = [str(library() / "dense" / family) for family in ("llama", "bert")]
    scales = Calibration.load(folder).scales_of(models)
    assert all(0 < float(scale) < float("inf") for scale in scales)


def make_heads(folder: Path, draw: Dice) -> None:
    """Heads of an activation scorer, in a broken file."""
    write_heads(folder / "heads.safetensors", torch.eye(2, 3, dtype=torch.bool), torch.ones(2, 3, 4))
    damage(folder / "heads.safetensors", draw)


def read_heads_file(folder: Path) -> None:
    """The heads, for the model that they were made for."""
    _, values = read_heads(folder / "heads.safetensors", (2, 3, 4))
    assert values.shape == (2, 3, 4) and bool(values.isfinite().all())


def make_routing(folder: Path, draw: Dice) -> None:
    """Routing statistics with broken metadata, or a broken file."""
    statistics = RoutingStatistics([0, 1], 3, 2)
    with statistics.observe(dict.fromkeys([0, 1], _Idle()), [("", "chosen")]):  # type: ignore[arg-type]
        pass
    path = statistics.save(folder)
    if draw.random() < 0.5:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        key = draw.choice(list(header["__metadata__"]))
        text = draw.choice(
            [json.dumps(draw.choice(VALUES)), "[" * 3000, "1000000", "-1", "[0, 1, 2]", '[["", 1]]']
        )
        header["__metadata__"][key] = text
        new = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])
    else:
        damage(path, draw)


class _Idle:
    """Stands for a layer that nothing passes through."""

    observer = None


def make_layout(folder: Path, draw: Dice) -> None:
    """The layout of a MoE, made for the config beside it."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    values = changed(LAYOUT_SEED, draw)
    values = {**values, "for": _key(folder)} if isinstance(values, dict) else values
    data = json.dumps(values).encode()
    (folder / LAYOUT).write_bytes(mutated(data, draw) if draw.random() < 0.3 else data)


def read_layout_file(folder: Path) -> None:
    """The layout, as far as it is used."""
    layout = read_layout(folder)
    if layout is None:
        raise CheckpointError("no layout", given="", expected="", fix="")
    assert all(tensor.stacked in layout.moe for tensor in layout.experts)


def make_settings(folder: Path, draw: Dice) -> None:
    """A config whose field moemerge is broken."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, "moemerge": changed(SETTINGS, draw)}))


def read_settings(folder: Path) -> None:
    """The settings of a MoE."""
    values = ModelFolder(folder).config_json["moemerge"]
    if isinstance(values, dict):
        MoeSettings.read(values).to_dict()

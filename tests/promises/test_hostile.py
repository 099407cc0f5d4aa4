"""Broken and hostile input: each case ends with code 2, the four parts of an error, and nothing written."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import (
    CANDIDATES,
    INDEX,
    PAIR,
    WEIGHTS,
    bomb,
    copy_model,
    deep,
    edit_json,
    edit_tensors,
    jsonl,
    pairs,
    raw_safetensors,
    shard,
)
from refusals import refused
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import save_dense

import moemerge
from moemerge.artifacts.foreign import refuse_foreign
from moemerge.errors import ArtifactError
from moemerge.models import configs
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.folder import ModelFolder
from moemerge.models.layout import FILE as LAYOUT
from moemerge.models.layout import _key, read_layout
from moemerge.run.cli import main

HEAD = "score.weight"
UP = "model.layers.0.mlp.up_proj.weight"
FORMAT = {"max_length": 64}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, pairs, a MoE, its routing, coefficients. Read only."""
    folder = tmp_path_factory.mktemp("world")
    dense = save_dense(folder / "dense")
    data = str(jsonl(folder / "pairs.jsonl", pairs(20)))
    moe = moemerge.upcycle(
        model=str(dense), output=folder / "moe", num_routed_experts=3, num_experts_per_tok=2
    )
    routing = moemerge.route(model=str(moe), pairs=data, output=folder / "routing", **FORMAT)
    moemerge.fit(model=str(moe), routing=str(routing), method="usage", output=folder / "coefficients")
    return folder


def upcycle(model: Path, out: Path, world: Path) -> list[Any]:
    return ["upcycle", "--model", model, "--output", out]


def evaluate(model: Path, out: Path, world: Path) -> list[Any]:
    return ["evaluate", "--models", f"m={model}", "--pairs", f"t={world / 'pairs.jsonl'}", "--output", out]


def train(model: Path, out: Path, world: Path) -> list[Any]:
    return ["train", "--model", model, "--pairs", world / "pairs.jsonl", "--output", out]


def route(model: Path, out: Path, world: Path) -> list[Any]:
    return ["route", "--model", model, "--pairs", world / "pairs.jsonl", "--output", out]


def merge(model: Path, out: Path, world: Path) -> list[Any]:
    return ["merge", "--model", model, "--coefficients", world / "coefficients", "--output", out]


def merge_models(model: Path, out: Path, world: Path) -> list[Any]:
    return ["merge", "--models", model, model, "--output", out]


DENSE_STAGES = {"upcycle": upcycle, "evaluate": evaluate, "merge_models": merge_models}
MOE_STAGES = {"route": route, "merge": merge}

LEVELS = "abcdefgh"
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{this}: &{this} [{','.join([f'*{last}'] * 9)}]\n"
    for last, this in zip(LEVELS, LEVELS[1:], strict=False)
)
MERGES = "b0: &b0 {x: 1}\n" + "".join(
    f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 50)}]}}\n" for i in range(1, 7)
)
BASE = "model: {dense}\ndata: {{train: {pairs}, test_share: 0.1}}\n"
RECIPES: dict[str, tuple[str, str]] = {
    "python_tag": (BASE + "output: !!python/object/apply:os.system ['touch x']\n", "constructor"),
    "own_tag": (BASE + "output: !foo x\n", "constructor"),
    "billion_laughs": (LAUGHS, "values"),
    "merge_laughs": (MERGES.replace("{", "{{").replace("}", "}}"), "values"),
    "within_itself": ("a: &a [*a]\n", "values"),
    "nested_lists": ("a: " + deep(5000) + "\n", "recursion"),
    "nested_maps": ("a: " + "{{a: " * 3000 + "1" + "}}" * 3000, "recursion"),
    "double_key": (BASE + "output: x\noutput: y\n", "given twice"),
    "two_megabytes": ("# " + "x" * 2_000_000, "bytes"),
    "many_keys": ("".join(f"k{i}: 1\n" for i in range(30_000)), "fault"),
    "empty": ("", "mapping"),
    "a_list": ("- a\n", "mapping"),
    "nul": (BASE + "output: a\0b\n", "cannot be read"),
    "escaped_nul": (BASE + 'output: "a\\0b"\n', "NUL"),
    "lone_surrogate": (BASE + 'output: "a\\ud800b"\n', "UTF-8"),
    "long_name": (BASE + "output: " + "a" * 5000 + "\n", "bytes a part"),
    "long_path": ("output: x\nmodel: " + "/a" * 3000 + "\n", "characters"),
    "huge_number": (BASE + "output: x\nseed: 1" + "0" * 5000 + "\n", "valid YAML"),
    "large_seed": (BASE + "output: x\nseed: 1" + "0" * 30 + "\n", "seed"),
    "infinity": (BASE + "output: x\ntrain: {{learning_rate: .inf}}\n", "finite"),
    "nan": (BASE + "output: x\ntrain: {{learning_rate: .nan}}\n", "learning_rate"),
    "many_layers": (BASE + "output: x\nupcycle: {{layers: '0-99999999999'}}\n", "layers"),
    "first_layers": (BASE + "output: x\nupcycle: {{layers: 'first:99999999999'}}\n", "layers"),
    "set_name_leads_out": (
        "output: x\nmodel: {dense}\ndata: {{train: {pairs}, tests: {{'../../../out': {pairs}}}}}\n",
        "without slashes",
    ),
    "bad_date": (BASE + "output: 2020-99-99\n", "cannot be read"),
    "bad_integer": (BASE + "output: x\nseed: !!int abc\n", "cannot be read"),
    "key_is_null": (BASE + "output: x\n~: 3\n", "no text"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, reason = RECIPES[name]
    paths = {"dense": world / "dense", "pairs": world / "pairs.jsonl"}
    (tmp_path / "recipe.yml").write_text(text.format(**paths), encoding="utf-8")
    assert reason in refused(["check", tmp_path / "recipe.yml"], tmp_path, capsys)


MANY = [*pairs(3)]
DATA: dict[str, tuple[Any, str]] = {
    "empty": ([], "no rows"),
    "blank_lines": (["", ""], "no rows"),
    "nul_bytes": ([b"\0" * 100], "broken JSON"),
    "not_utf8": ([*MANY, b'{"chosen": "\xff\xfe"}'], "not UTF-8: 1 (row 4)"),
    "a_megabyte": ([*MANY, {**PAIR, "chosen": "x" * 1_000_000 + " w1" * 2000}], "longer than 1024 tokens"),
    "line_of_20_megabytes": ([*MANY, b"x" * 20_000_000], "longer than 16 MB"),
    "nested": ([*MANY, '{"prompt": "a", "chosen": "b", "rejected":' + deep(100_000) + "}"], "broken JSON"),
    "huge_integer": ([*MANY, json.dumps({**PAIR, "margin": 10**400})], "finite number"),
    "integer_of_5000_digits": ([*MANY, json.dumps(PAIR)[:-1] + ', "margin": 1' + "0" * 5000 + "}"], "broken"),
    "nan": ([*MANY, {**PAIR, "margin": float("nan")}], "not a finite number"),
    "double_field": (
        [*MANY, '{"chosen": "b", "chosen": "c", "rejected": "d"}'],
        "given twice",
    ),
    "surrogate": ([*MANY, '{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}'], "not UTF-8"),
    "one_class": ([{**PAIR, "rejected": PAIR["chosen"]}] * 5, "identical answers: 5"),
    "wrong_type": ([*MANY, {**PAIR, "chosen": 5}], "neither text nor messages"),
    "not_objects": ([[1], 2], "not an object"),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, reason = DATA[name]
    data = jsonl(tmp_path / "data.jsonl", rows)
    arguments = ["route", "--model", world / "moe", "--pairs", data, "--output", tmp_path / "out"]
    assert reason in refused(arguments, tmp_path, capsys)


BOMBS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "lines": ("data.jsonl.gz", lambda path: bomb(path, b"\n" * 100_000, 200), "unpacks to far more"),
    "one_line": ("data.jsonl.gz", lambda path: bomb(path, b"x" * 1_000_000, 300), "unpacks to far more"),
    "json": ("data.json.gz", lambda path: bomb(path, b"[" * 1_000_000, 300), "unpacks to far more"),
    "not_gzip": ("data.jsonl.gz", lambda path: path.write_text("hello"), "cannot be read"),
    "nested_json": ("data.json", lambda path: path.write_text(deep(100_000)), "cannot be read"),
    "json_object": ("data.json", lambda path: path.write_text("{}"), "holds no list"),
    "parquet": ("data.parquet", lambda path: path.write_bytes(b"PAR1xxxxPAR1"), "cannot be read"),
    "pickle": ("data.pkl", lambda path: path.write_bytes(b"\x80\x04."), "of this kind cannot be read"),
    "pipe": ("data.jsonl", lambda path: os.mkfifo(path), "neither file nor folder"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_data_file(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, make, reason = BOMBS[name]
    make(tmp_path / file)
    arguments = ["route", "--model", world / "moe", "--pairs", tmp_path / file, "--output", tmp_path / "out"]
    assert reason in refused(arguments, tmp_path, capsys)


@pytest.mark.parametrize("score", ["NaN", "1" + "0" * 400, "1e308", '"x"', "null", "true"])
def test_candidate_scores(
    score: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.dumps(CANDIDATES).replace("1.0", score)
    data = jsonl(tmp_path / "data.jsonl", [row])
    arguments = ["evaluate", "--models", f"m={world / 'dense'}", "--candidates", f"c={data}"]
    refused([*arguments, "--output", tmp_path / "out"], tmp_path, capsys)


@pytest.mark.parametrize("stage", ["route", "evaluate"])
def test_one_row_is_enough_where_one_can_be(stage: str, world: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", pairs(1))
    what = ["--model", world / "moe", "--pairs", data]
    if stage == "evaluate":
        what = ["--models", f"m={world / 'dense'}", "--pairs", f"t={data}"]
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in (stage, *what, "--output", tmp_path / "out")])
    assert stop.value.code == 0


def test_one_row_cannot_be_split(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(tmp_path / "data.jsonl", pairs(1))
    arguments = ["fit", "--model", world / "moe", "--pairs", data, "--output", tmp_path / "out"]
    assert "held out" in refused(arguments, tmp_path, capsys)


def _tensor(name: str, value: torch.Tensor) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: value}))


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _linked(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def _piped(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def _overlapping(folder: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = {"a": one, "b": {**one, "data_offsets": [4, 12]}}
    raw_safetensors(folder / WEIGHTS, header, b"x" * 12)


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "cannot be read"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "cannot be read"),
    "header_of_exabytes": (lambda f: raw_safetensors(f / WEIGHTS, b"{}", length=2**62), "cannot be read"),
    "header_of_30_megabytes": (lambda f: raw_safetensors(f / WEIGHTS, b" " * 30_000_000), "a header of"),
    "overlapping": (_overlapping, "cannot be read"),
    "no_weights": (lambda f: (f / WEIGHTS).unlink(), "no safetensors"),
    "pickle": (_pickled, "pytorch_model.bin"),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(UP)), UP),
    "extra": (_tensor("evil", torch.zeros(3)), "evil"),
    "misshapen": (_tensor(UP, torch.zeros(3, 3)), UP),
    "nan": (_tensor(UP, torch.full((48, 32), float("nan"))), "finite"),
    "infinity": (_tensor(HEAD, torch.full((1, 32), float("inf"))), "finite"),
    "integers": (_tensor(UP, torch.zeros(48, 32, dtype=torch.int64)), "quantised"),
    "complex": (_tensor(UP, torch.zeros(48, 32, dtype=torch.complex64)), "quantised"),
    "float8": (_tensor(UP, torch.zeros(48, 32).to(torch.float8_e4m3fn)), "quantised"),
    "index_leads_up": (lambda f: shard(f, **{HEAD: "../dense/model.safetensors"}), "a file in this folder"),
    "index_leads_away": (lambda f: shard(f, **{HEAD: "/etc/passwd"}), "a file in this folder"),
    "index_is_wrong": (lambda f: shard(f, nothing="model-00001-of-00002.safetensors"), "disagree"),
    "index_is_a_list": (lambda f: (shard(f), (f / INDEX).write_text('{"weight_map": [1]}')), "index"),
    "index_is_nested": (lambda f: (shard(f), (f / INDEX).write_text(deep(100_000))), "index"),
    "shard_is_gone": (lambda f: (shard(f), (f / "model-00001-of-00002.safetensors").unlink()), "not there"),
    "link_out": (_linked, "a link out of the folder"),
    "link_to_a_secret": (lambda f: (f / "tokenizer.txt").symlink_to("/etc/passwd"), "a link out"),
    "pipe": (_piped, "neither file nor folder"),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "/x"}'),
        "LoRA",
    ),
    "config_is_nested": (lambda f: (f / "config.json").write_text(deep(100_000)), "nested too deep"),
    "config_is_a_list": (lambda f: (f / "config.json").write_text("[]"), "object"),
    "config_is_huge": (lambda f: (f / "config.json").write_text(" " * 11_000_000), "bytes"),
    "no_config": (lambda f: (f / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("stage", DENSE_STAGES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(
    name: str, stage: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = CHECKPOINTS[name]
    model = copy_model(world / "dense", tmp_path / "model")
    spoil(model)
    assert reason in refused(DENSE_STAGES[stage](model, tmp_path / "out", world), tmp_path, capsys)


TWO = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
CONFIGS: dict[str, dict[str, Any]] = {
    "remote_code": {"model_type": "evil", "auto_map": {"AutoConfig": "x.Config"}},
    "auto_map_is_a_number": {"auto_map": 5, "model_type": "evil"},
    "kernel_from_the_hub": {"attn_implementation": "evil/kernel"},
    "weights_elsewhere": {"transformers_weights": "../dense/model.safetensors"},
    "type_is_a_number": {"model_type": 5},
    "type_leads_out": {"model_type": "../../x"},
    "own_class": {"architectures": ["EvilForSequenceClassification"]},
    "class_is_a_module": {"architectures": ["os"]},
    "class_is_a_number": {"architectures": 5},
    "classes_are_numbers": {"architectures": [5]},
    "two_labels": TWO,
    "no_width": {"hidden_size": 0},
    "negative_width": {"hidden_size": -5},
    "width_is_text": {"hidden_size": "x"},
    "huge_width": {"hidden_size": 10**9},
    "odd_width": {"hidden_size": 33},
    "huge_mlp": {"intermediate_size": 10**12},
    "huge_vocabulary": {"vocab_size": 10**10},
    "billion_layers": {"num_hidden_layers": 10**9},
    "too_few_layers": {"num_hidden_layers": 2},
    "no_heads": {"num_attention_heads": 0},
    "activation": {"hidden_act": "evil"},
    "positions_are_text": {"max_position_embeddings": "x"},
    "rope": {"rope_parameters": {"rope_type": "evil"}},
    "pad_token_out_of_vocabulary": {"pad_token_id": 10**9},
    "pad_token_below_zero": {"pad_token_id": -5},
    "dtype": {"dtype": "evil", "torch_dtype": "evil"},
    "labels_are_a_number": {"id2label": 5},
    "layer_types": {"layer_types": ["x"] * 3},
    "std_is_text": {"initializer_range": "x"},
}


@pytest.mark.parametrize("stage", [upcycle, evaluate])
@pytest.mark.parametrize("name", CONFIGS)
def test_config(
    name: str, stage: Any, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_model(world / "dense", tmp_path / "model")
    edit_json(model / "config.json", **CONFIGS[name])
    refused(stage(model, tmp_path / "out", world), tmp_path, capsys)


@pytest.mark.parametrize("name", ["billion_layers", "type_is_a_number", "class_is_a_number"])
def test_config_in_check(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_model(world / "dense", tmp_path / "model")
    edit_json(model / "config.json", **CONFIGS[name])
    text = BASE.format(dense=model, pairs=world / "pairs.jsonl") + "output: x\n"
    (tmp_path / "recipe.yml").write_text(text)
    refused(["check", tmp_path / "recipe.yml"], tmp_path, capsys)


MOE: dict[str, dict[str, Any]] = {
    "experts_are_text": {"num_routed_experts": "x"},
    "negative_experts": {"num_routed_experts": -1},
    "billion_experts": {"num_routed_experts": 10**9},
    "other_number": {"num_routed_experts": 2},
    "shared_is_text": {"shared_expert": "x"},
    "no_shared": {"shared_expert": False},
    "layer_out_of_model": {"layers": [10**9]},
    "layers_are_text": {"layers": "x"},
    "gate": {"gate": "evil"},
    "router": {"router": "evil"},
    "dtype": {"dense_dtype": "nn"},
    "unknown_key": {"evil": 1},
}


@pytest.mark.parametrize("stage", MOE_STAGES)
@pytest.mark.parametrize("name", MOE)
def test_moe_settings(
    name: str, stage: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_model(world / "moe", tmp_path / "moe")
    settings = json.loads((model / "config.json").read_text())["moemerge"]
    edit_json(model / "config.json", moemerge=settings | MOE[name])
    refused(MOE_STAGES[stage](model, tmp_path / "out", world), tmp_path, capsys)


@pytest.mark.parametrize("stage", MOE_STAGES)
@pytest.mark.parametrize("field", [5, {}, None])
def test_moe_field(
    field: Any, stage: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_model(world / "moe", tmp_path / "moe")
    edit_json(model / "config.json", moemerge=field)
    refused(MOE_STAGES[stage](model, tmp_path / "out", world), tmp_path, capsys)


BAD_LAYOUTS: list[dict[str, Any]] = [
    {"experts": []},
    {"experts": 5},
    {"experts": [{"rows": ["a", "b"], "shape": [1]}]},
    {"moe": {}},
    {"moe": 5},
    {"dense": ["evil"]},
    {"dense_config": 5},
    {"class_name": 5},
    {"evil": 1},
]


@pytest.mark.parametrize("change", BAD_LAYOUTS, ids=str)
def test_layout_that_makes_no_sense_is_not_used(change: dict[str, Any], world: Path, tmp_path: Path) -> None:
    model = copy_model(world / "moe", tmp_path / "moe")
    assert read_layout(model) is not None
    edit_json(model / LAYOUT, **change, **{"for": _key(model)})
    assert read_layout(model) is None


DOUBLE = torch.float64
COEFFICIENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shape": ({"alpha_LN": torch.zeros(3, dtype=DOUBLE)}, {}),
    "nan": ({"alpha_LN": torch.full((3, 3), float("nan"), dtype=DOUBLE)}, {}),
    "huge": ({"alpha_LN": torch.full((3, 3), 1e308, dtype=DOUBLE)}, {}),
    "four_experts": ({"alpha_LN": torch.full((3, 4), 0.25, dtype=DOUBLE)}, {}),
    "single": ({"shared_L": torch.zeros(3)}, {}),
    "float8": ({"shared_L": torch.zeros(3).to(torch.float8_e4m3fn)}, {}),
    "complex": ({"alpha_LN": torch.zeros(3, 3, dtype=torch.complex64)}, {}),
    "shared_of_two": ({"shared_L": torch.full((3,), 2.0, dtype=DOUBLE)}, {}),
    "empty": ({"alpha_LN": torch.zeros(0, 0, dtype=DOUBLE)}, {"blocks": "[]"}),
    "format": ({}, {"format": "other"}),
    "no_format": ({}, {"format": None}),
    "blocks_are_numbers": ({}, {"blocks": "[1, 2, 3]"}),
    "blocks_are_nested": ({}, {"blocks": deep(100_000)}),
    "blocks_are_lists": ({}, {"blocks": '[["a"], {}, null]'}),
    "blocks_are_a_number": ({}, {"blocks": "5"}),
    "blocks_of_another": ({}, {"blocks": '["layers.0", "layers.1", "layers.77"]'}),
    "another_model": ({}, {"model": "evil"}),
    "one_tensor": ({"shared_L": None}, {}),
    "three_tensors": ({"x": torch.zeros(1)}, {}),
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_coefficients(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = world / "coefficients", tmp_path / "c"
    target.mkdir()
    _spoil(source / "coefficients.safetensors", target / "coefficients.safetensors", *COEFFICIENTS[name])
    arguments = ["merge", "--model", world / "moe", "--coefficients", target, "--output", tmp_path / "out"]
    refused(arguments, tmp_path, capsys)


def _spoil(source: Path, target: Path, tensors: dict[str, Any], header: dict[str, Any]) -> None:
    with safe_open(source, "pt") as handle:
        held = {name: handle.get_tensor(name) for name in handle.keys()} | tensors
        said = dict(handle.metadata()) | header
    kept = {name: value for name, value in held.items() if value is not None}
    save_file(kept, target, metadata={name: text for name, text in said.items() if text is not None})


GATE = torch.ones(2, 3, 3, dtype=DOUBLE)
ROUTING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "million_experts": ({}, {"num_experts": "1000000"}),
    "negative_experts": ({}, {"num_experts": "-3"}),
    "experts_are_text": ({}, {"num_experts": "x"}),
    "many_layers": ({}, {"layers": str(list(range(100_000)))}),
    "other_layer": ({}, {"layers": "[97, 98, 99]"}),
    "layers_are_nested": ({}, {"layers": deep(100_000)}),
    "groups": ({}, {"groups": '[["a"]]'}),
    "no_groups": ({}, {"groups": "[]"}),
    "format": ({}, {"format": "x"}),
    "missing": ({"gate_LN": None}, {}),
    "shape": ({"gate_LN": GATE[:, :, :2].clone()}, {}),
    "nan": ({"gate_LN": GATE * float("nan")}, {}),
    "negative": ({"gate_LN": -GATE}, {}),
    "zero": ({"gate_LN": 0 * GATE}, {}),
    "integers": ({"gate_LN": GATE.to(torch.int8)}, {}),
    "float8": ({"gate_LN": GATE.to(torch.float8_e4m3fn)}, {}),
    "overflow": ({"gate_LN": 1e308 * GATE}, {}),
}


@pytest.mark.parametrize("name", ROUTING)
def test_routing(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "r"
    target.mkdir()
    _spoil(world / "routing" / "statistics.safetensors", target / "statistics.safetensors", *ROUTING[name])
    arguments = ["fit", "--model", world / "moe", "--routing", target, "--method", "usage"]
    refused([*arguments, "--output", tmp_path / "out"], tmp_path, capsys)


def _unknown_token(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["w1"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(values))


def _remote_tokenizer(folder: Path) -> None:
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.T", None]}, tokenizer_class="T"
    )


TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "broken": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
    "nested": (lambda f: (f / "tokenizer.json").write_text(deep(100_000)), "tokenizer"),
    "config_is_a_list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer"),
    "length_is_text": (lambda f: edit_json(f / "tokenizer_config.json", model_max_length="x"), "tokenizer"),
    "tokens_that_the_model_lacks": (_unknown_token, "token number 5000"),
    "remote_code": (_remote_tokenizer, "tokenizer"),
}


@pytest.mark.parametrize("stage", [evaluate, train])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer(
    name: str, stage: Any, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = TOKENIZERS[name]
    model = copy_model(world / "dense", tmp_path / "model")
    spoil(model)
    assert reason in refused(stage(model, tmp_path / "out", world), tmp_path, capsys)


@pytest.mark.parametrize("stage", ["evaluate", "train"])
def test_texts_beyond_the_positions(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_dense(tmp_path / "model", "bert")
    data = jsonl(tmp_path / "data.jsonl", [{**PAIR, "chosen": "w1 " * 300}])
    which = ["--models", f"m={model}", "--pairs", f"t={data}"]
    which = which if stage == "evaluate" else ["--model", model, "--pairs", data]
    said = refused([stage, *which, "--output", tmp_path / "out"], tmp_path, capsys)
    assert "set max_length to 128" in said


def _cached(model: Path, root: Path) -> Path:
    """A copy of a model as the hub's cache keeps it: a snapshot of links to blobs."""
    blobs, snapshot = root / "models--a--b" / "blobs", root / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{number}")
    return snapshot


def test_links_of_the_hub_cache_are_followed_and_others_not(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = _cached(world / "dense", tmp_path)
    out = moemerge.upcycle(
        model=str(snapshot), output=tmp_path / "moe", num_routed_experts=2, num_experts_per_tok=1
    )
    assert Checkpoint(out).names
    (tmp_path / "models--a--b" / "blobs" / "evil").symlink_to(world / "pairs.jsonl")
    (snapshot / "tokenizer.txt").symlink_to("../../blobs/evil")
    assert "a link out" in refused(upcycle(snapshot, tmp_path / "out", world), tmp_path, capsys)


def test_a_folder_that_is_itself_a_link_is_what_was_given(world: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(world / "dense")
    refuse_foreign(tmp_path / "model")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ArtifactError, match="link out|what is not its own"):
        refuse_foreign(tmp_path)


def test_code_of_a_model_runs_only_when_asked_for_and_then_this_is_said(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(configs.log, "warning", lambda text, *values: said.append(text % values))
    model = copy_model(world / "dense", tmp_path / "model")
    edit_json(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    text = "open('ran', 'w').close()\nfrom transformers import LlamaConfig\n"
    ran = tmp_path / "ran"
    text = text.replace("'ran'", repr(str(ran)))
    (model / "own.py").write_text(text + "class Config(LlamaConfig):\n    model_type = 'own'\n")
    refused(evaluate(model, tmp_path / "out", world), tmp_path, capsys)
    assert not ran.exists()
    assert said == []
    ModelFolder(model, trust_remote_code=True).config  # noqa: B018 (reading it runs the code)
    assert ran.exists()
    assert said == [f"trust_remote_code: code that comes with {model} may run"]


def test_a_pickle_is_never_opened(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside whole weights pickles are left alone; in their place they are refused."""
    import pickle

    def opened(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was opened")

    moe = copy_model(world / "moe", tmp_path / "moe")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (moe / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    for home, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(home, name, opened)
    moemerge.merge(model=str(moe), coefficients=str(world / "coefficients"), output=tmp_path / "merged")
    assert {path.suffix for path in (tmp_path / "merged").iterdir()} <= {".json", ".safetensors", ".py"}
    (moe / WEIGHTS).unlink()
    for stage in MOE_STAGES.values():
        assert "safetensors" in refused(stage(moe, tmp_path / "out", world), tmp_path, capsys)


def test_no_token_gets_into_logs_manifests_or_cards(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hf_" + "a1B2c3D4" * 4
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    with caplog.at_level(logging.DEBUG, logger="moemerge"):
        merged = moemerge.merge(
            model=str(world / "moe"), coefficients=str(world / "coefficients"), output=tmp_path / "merged"
        )
        moemerge.publish(model=str(merged), repo="me/model", output=tmp_path / "card")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"manifest.json", "README.md"} <= {path.name for path in files}
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert secret not in caplog.text

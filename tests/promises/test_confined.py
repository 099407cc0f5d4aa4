"""No file elsewhere is read because a file of a model, an evaluation or a manifest names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import copy_model, deep, edit_json, jsonl, opened_by, pairs
from huggingface_hub import constants
from small_chain import make_chain
from small_policy import save_policy, write_prompts
from tiny_models import save_dense

from moemerge.artifacts.manifest import own_digest, read_manifest
from moemerge.errors import ArtifactError, CheckpointError, MoemergeError
from moemerge.evaluation.report import FORMAT
from moemerge.models.folder import ModelFolder
from moemerge.models.language_model import load_language_model
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.run.check import check_recipe
from moemerge.stages.compare import compare
from moemerge.stages.publish import publish
from moemerge.stages.sample import sample
from moemerge.stages.upcycle import upcycle
from moemerge.training.policy import sample_answers

CPU = torch.device("cpu")
SECRET = "root:x:0:0"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("confined") / "dense")


@pytest.fixture
def secret(tmp_path: Path, dense: Path) -> Path:
    """A folder of files that are none of a model's business."""
    folder = copy_model(dense, tmp_path / "secret")
    shutil.copy(folder / "tokenizer.json", folder / "tokenizer.0.json")
    (folder / "vocab.txt").write_text(f"{SECRET}\n[UNK]\n")
    return folder


NAMED: dict[str, dict[str, Any]] = {
    "vocab": {"tokenizer_class": "BertTokenizer", "vocab": "{secret}/vocab.txt"},
    "init_inputs": {"tokenizer_class": "BertTokenizer", "init_inputs": ["{secret}/vocab.txt"]},
    "merges": {
        "tokenizer_class": "LlamaTokenizer",
        "vocab": "{secret}/config.json",
        "merges": "{secret}/vocab.txt",
    },
    "fast_tokenizer_files": {"fast_tokenizer_files": ["../secret/tokenizer.0.json"]},
    "own_keys": {"tokenizer_class": "BertJapaneseTokenizer", "emoji_file": "{secret}/vocab.txt"},
    "within": {"sp_model_kwargs": {"model_file": ["../secret/vocab.txt"]}},
}


def spelt(value: Any, secret: Path) -> Any:
    return json.loads(json.dumps(value).replace("{secret}", str(secret)))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("name", NAMED)
def test_a_tokenizer_names_no_file_elsewhere(
    name: str, file: str, dense: Path, secret: Path, tmp_path: Path
) -> None:
    """transformers would take it for a vocabulary, and save its lines with the next model."""
    model = copy_model(dense, tmp_path / "model")
    (model / file).touch()
    held = json.loads((model / file).read_text() or "{}")
    (model / file).write_text(json.dumps(held | spelt(NAMED[name], secret)))
    (model / "tokenizer.json").unlink()

    def load() -> None:
        with pytest.raises(ArtifactError, match="names a file that is not its own"):
            load_tokenizer(str(model))

    assert [path for path in opened_by(load) if path.startswith(str(secret))] == []


def test_what_older_versions_saved_is_no_fault_and_not_read(
    dense: Path, secret: Path, tmp_path: Path
) -> None:
    model = copy_model(dense, tmp_path / "model")
    old = {name: str(secret / "vocab.txt") for name in ("tokenizer_file", "special_tokens_map_file")}
    edit_json(model / "tokenizer_config.json", name_or_path=str(secret), **old)
    (secret / "tokenizer.json").unlink()
    found = opened_by(lambda: load_tokenizer(str(model)))
    assert [path for path in found if path.startswith(str(secret))] == []
    assert load_tokenizer(str(model)).get_vocab() == load_tokenizer(str(dense)).get_vocab()


@pytest.mark.parametrize("kind", ["RagTokenizer", "Trainer", "evil"])
def test_a_tokenizer_of_another_kind_is_refused(kind: str, dense: Path, tmp_path: Path) -> None:
    model = copy_model(dense, tmp_path / "model")
    edit_json(model / "tokenizer_config.json", tokenizer_class=kind)
    try:
        assert load_tokenizer(str(model)).get_vocab() == load_tokenizer(str(dense)).get_vocab()
    except CheckpointError as error:
        assert "tokenizer" in error.what


CONFIGS: dict[str, dict[str, Any]] = {
    "kernel": {"attn_implementation": "evil/kernel"},
    "kernel_within": {"text_config": {"attn_implementation": {"": "evil/kernel"}}},
    "weights": {"transformers_weights": "../secret/model.safetensors"},
}


def on_hub(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub name of a copy of `folder` in a cache of its own."""
    home = root / "hub" / "models--a--b"
    shutil.copytree(folder, home / "snapshots" / "0123")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
    return "a/b"


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_names_nothing_elsewhere(
    name: str, place: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_model(dense, tmp_path / "model")
    edit_json(model / "config.json", **CONFIGS[name])
    source = on_hub(model, tmp_path, monkeypatch) if place == "hub" else str(model)
    for load in (lambda source: ModelFolder(source).config, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"cannot be (read|loaded)") as caught:
            load(source)
        assert "names code or weights" in caught.value.given


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_adapters_base_is_not_opened(
    place: str, dense: Path, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward, policy = copy_model(dense, tmp_path / "model"), save_policy(tmp_path / "policy")
    for model in (reward, policy):
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(secret), "target_modules": ["q_proj"]}
        (model / "adapter_config.json").write_text(json.dumps(adapter))
    loads = {
        reward: lambda source: load_reward_model(source, CPU),
        policy: lambda s: load_language_model(s, CPU),
    }
    for model, load in loads.items():
        root = tmp_path / f"{model.name}-cache"
        source = on_hub(model, root, monkeypatch) if place == "hub" else str(model)

        def refused(source: str = source, load: Any = load) -> None:
            with pytest.raises(CheckpointError, match="adapter"):
                load(source)

        assert [path for path in opened_by(refused) if path.startswith(str(secret))] == []


def test_a_model_on_the_hub_is_loaded(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above let it pass."""
    source = on_hub(dense, tmp_path, monkeypatch)
    assert load_reward_model(source, CPU).config.num_labels == 1
    assert load_tokenizer(source).get_vocab() == load_tokenizer(str(dense)).get_vocab()


def test_check_follows_no_link_out_of_a_model(dense: Path, secret: Path, tmp_path: Path) -> None:
    model = copy_model(dense, tmp_path / "model")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(secret / "config.json")
    data = jsonl(tmp_path / "pairs.jsonl", pairs(20))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"output: x\nmodel: {model}\ndata: {{train: {data}, test_share: 0.1}}\n")
    found: list[MoemergeError] = []
    opened = opened_by(lambda: found.extend(check_recipe(recipe)))
    assert any("a link out of the folder" in str(fault) for fault in found)
    assert [path for path in opened if path.startswith(str(secret))] == []


GENERATION: dict[str, Any] = {
    "penalty": {"repetition_penalty": 5.0, "min_new_tokens": 6, "typical_p": 0.2, "min_p": 0.5},
    "beams": {"num_beams": 4, "penalty_alpha": 0.5, "stop_strings": ["w"], "max_length": 10**9},
    "code": {"custom_generate": "{secret}", "assistant_model": "{secret}"},
    "ends": {"eos_token_id": [2**63, 10**30, -1, 64, True, 1]},
}


@pytest.mark.parametrize("name", GENERATION)
def test_a_policys_generation_config_only_says_what_ends_an_answer(
    name: str, secret: Path, tmp_path: Path
) -> None:
    plain, other = save_policy(tmp_path / "plain"), save_policy(tmp_path / "other")
    edit_json(other / "generation_config.json", **spelt(GENERATION[name], secret))
    drawn = [
        sample_answers(*load_language_model(str(one), CPU), ["w1 w2 ", "w3 "], 0, 8) for one in (plain, other)
    ]
    assert drawn[0].texts == drawn[1].texts


@pytest.mark.parametrize("text", ["[]", "{", '{"watermarking_config": {"x": 1}}', deep(100_000)])
def test_a_broken_generation_config_is_refused_or_not_used(text: str, tmp_path: Path) -> None:
    policy, prompts = save_policy(tmp_path / "policy"), write_prompts(tmp_path / "p.jsonl", 2)
    (policy / "generation_config.json").write_text(text)
    try:
        sample(model=str(policy), prompts=prompts, output=tmp_path / "out", per_prompt=2, max_new_tokens=2)
    except CheckpointError as error:
        assert "policy" in error.what and not (tmp_path / "out").exists()


MANIFESTS: dict[str, Any] = {
    "nested": '{"schema": 1, "stage": ' + deep(100_000) + "}",
    "nothing": '{"schema": 1, "stage": "train"}',
    "files_are_a_list": {"files": [1]},
    "files_are_numbers": {"files": {"a": 5}},
    "inputs_are_a_text": {"inputs": "x"},
    "chain_is_a_number": {"chain": 5},
    "chain_of_nothing": {"chain": [{}]},
    "surrogates": {"options": {"a": "\ud800"}},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_makes_no_sense(name: str, dense: Path, tmp_path: Path) -> None:
    moe = upcycle(model=str(dense), output=tmp_path / "moe", num_experts_per_tok=2)
    change = MANIFESTS[name]
    if isinstance(change, dict):
        manifest = read_manifest(moe) | change
        change = json.dumps(manifest | {"sha256": own_digest(manifest)})
    (moe / "manifest.json").write_text(change)
    for stage in (publish, upcycle):
        with pytest.raises(ArtifactError, match="not a moemerge artifact"):
            stage(model=str(moe), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tools_manifest_is_not_ours(dense: Path, tmp_path: Path) -> None:
    model = copy_model(dense, tmp_path / "model")
    (model / "manifest.json").write_text('{"files": 5}')
    assert upcycle(model=str(model), output=tmp_path / "moe", num_experts_per_tok=2).is_dir()


def test_an_evaluation_names_no_plots_elsewhere_and_nonsense_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = make_chain(tmp_path / "run")
    model, evaluation = str(run["merged"]), run["evaluation"]
    secret = tmp_path / "secret.png"
    secret.write_text(SECRET)
    report = json.loads((evaluation / "report.json").read_text())
    spoil(evaluation, report | {"plots": ["../../secret.png", str(secret), "/etc/passwd", "accuracy.png"]})
    out = publish(model=model, evaluation=str(evaluation), output=tmp_path / "card")
    assert [path.name for path in (out / "plots").iterdir()] == ["accuracy.png"]
    assert [path for path in tmp_path.rglob("secret.png")] == [secret]
    strange = ({"plots": 5, "probes": {}}, {"plots": [], "probes": 5})
    for nonsense in ([], {}, *({"format": FORMAT, **one} for one in strange)):
        spoil(evaluation, nonsense)
        with pytest.raises(ArtifactError, match="no card can be made|cannot be shown"):
            publish(model=model, evaluation=str(evaluation), output=tmp_path / "p")
    for nonsense in ([], {}, deep(100_000)):
        spoil(evaluation, nonsense)
        with pytest.raises(ArtifactError, match="cannot be shown"):
            compare(runs=[str(evaluation)] * 2, output=tmp_path / "c")
    assert not (tmp_path / "p").exists() and not (tmp_path / "c").exists()


def spoil(evaluation: Path, report: Any) -> None:
    """Put another report in its place."""
    text = report if isinstance(report, str) else json.dumps(report)
    (evaluation / "report.json").write_text(text)

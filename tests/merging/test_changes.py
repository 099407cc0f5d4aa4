"""How far models' changes from their base agree, against the definition on whole models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_moe import random_pairs, write_rows
from tiny_models import save_dense
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import encode_pairs
from moemerge.errors import OptionError
from moemerge.models.loading import load_tokenizer
from moemerge.models.scoring import bradley_terry, score_pairs
from moemerge.options.base import TextFormat
from moemerge.run.headlines import headline
from moemerge.stages.changes import changes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a model that changed at random, its opposite in the MLPs, and an unchanged one."""
    folder = tmp_path_factory.mktemp("changes")
    made = {name: save_dense(folder / name, seed=0) for name in ("base", "one", "other", "same")}
    start = load_file(made["base"] / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    step = {name: 0.1 * torch.randn(weight.shape, generator=draw) for name, weight in start.items()}
    one = {name: weight + step[name] for name, weight in start.items()}
    other = {n: w - step[n] if ".mlp." in n else w + 2 * step[n] for n, w in start.items()}
    for name, weights in (("one", one), ("other", other)):
        save_file(weights, made[name] / "model.safetensors", {"format": "pt"})
    return made


def group(name: str) -> str:
    if name.startswith("score"):
        return "head"
    if ".layers." not in name:
        return "outside"
    return "mlp" if ".mlp." in name else "attention"


def flat(models: dict[str, Path], name: str, of: str) -> Tensor:
    start, weights = (load_file(models[m] / "model.safetensors") for m in ("base", name))
    chosen = [key for key in sorted(start) if of in ("all", group(key))]
    return torch.cat([(weights[key].double() - start[key].double()).flatten() for key in chosen])


def test_sizes_cosines_and_conflicts_are_those_of_the_whole_changes(
    models: dict[str, Path], tmp_path: Path
) -> None:
    named = {"one": str(models["one"]), "other": str(models["other"])}
    changes(models=named, base=str(models["base"]), output=tmp_path / "out")
    told = json.loads((tmp_path / "out/changes.json").read_text())["groups"]
    assert list(told) == ["all", "attention", "mlp", "head", "outside"]
    start = load_file(models["base"] / "model.safetensors")
    for of, numbers in told.items():
        a, b = (flat(models, name, of) for name in named)
        norm = torch.cat([w.double().flatten() for n, w in start.items() if of in ("all", group(n))]).norm()
        assert numbers["size"]["one"] == pytest.approx(float(a.norm() / norm), rel=1e-9)
        assert numbers["cosine"]["one and other"] == pytest.approx(
            float(a @ b / a.norm() / b.norm()), rel=1e-9
        )
        both = (a != 0) & (b != 0)
        conflict = ((a.sign() != b.sign()) & both).sum() / both.sum()
        assert numbers["conflict"]["one and other"] == pytest.approx(float(conflict), rel=1e-6)
    assert told["mlp"]["cosine"]["one and other"] == pytest.approx(-1, abs=1e-6)
    assert told["mlp"]["conflict"]["one and other"] > 0.99
    assert told["attention"]["cosine"]["one and other"] == pytest.approx(1, abs=1e-6)
    assert headline(read_manifest(tmp_path / "out")).startswith("cosines: one and other")


def test_barriers_are_those_of_models_merged_on_the_way(models: dict[str, Path], tmp_path: Path) -> None:
    """Two models of one function whose hidden units have other places: what lies between them is another."""
    one = {n: 4 * w if ".mlp." in n else w for n, w in load_file(models["one"] / "model.safetensors").items()}
    other = {n: w.flip(1 if "down_proj" in n else 0) if ".mlp." in n else w for n, w in one.items()}
    ends = {"one": one, "turned": other}
    named = {name: str(shutil.copytree(models["one"], tmp_path / "ends" / name)) for name in ends}
    for name, weights in ends.items():
        save_file({n: w.contiguous() for n, w in weights.items()}, f"{named[name]}/model.safetensors")
    rows = write_rows(tmp_path / "pairs.jsonl", random_pairs(12))
    tokenizer = load_tokenizer(str(models["base"]))
    pairs, report = read_pairs(str(rows), TextFormat())
    encoded = encode_pairs(tokenizer, pairs, TextFormat(), report)

    def loss(t: float) -> float:
        """Of the model that lies at t between the two, by weights in plain torch."""
        model = AutoModelForSequenceClassification.from_pretrained(models["one"]).eval()
        model.load_state_dict({name: (1 - t) * one[name] + t * other[name] for name in one})
        return bradley_terry(score_pairs(model, tokenizer, encoded, 1000))[0]

    changes(models=named, base=str(models["base"]), pairs=str(rows), output=tmp_path / "out")
    assert loss(0) == pytest.approx(loss(1), abs=1e-6)
    above = [loss(t) - loss(0) for t in (0.25, 0.5, 0.75)]
    told = json.loads((tmp_path / "out/changes.json").read_text())["barriers"]
    assert max(above) > 0.01 and told == {"one and turned": pytest.approx(max(above), abs=1e-6)}
    assert "Loss barriers" in (tmp_path / "out/changes.md").read_text()


def test_a_model_that_did_not_change_has_no_cosine(models: dict[str, Path], tmp_path: Path) -> None:
    named = {"one": str(models["one"]), "same": str(models["same"])}
    changes(models=named, base=str(models["base"]), output=tmp_path / "out")
    told = json.loads((tmp_path / "out/changes.json").read_text())["groups"]["all"]
    assert told["cosine"] == {"one and same": None} == told["conflict"]
    assert told["size"]["same"] == 0
    assert "one and same" in (tmp_path / "out/changes.md").read_text()


def test_a_base_whose_head_is_missing_has_no_size_to_compare_with(
    models: dict[str, Path], tmp_path: Path
) -> None:
    start = load_file(models["base"] / "model.safetensors")
    bare = shutil.copytree(models["base"], tmp_path / "bare")
    body = {name: weight for name, weight in start.items() if group(name) != "head"}
    save_file(body, bare / "model.safetensors", {"format": "pt"})
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    named = {"one": str(models["one"]), "other": str(models["other"])}
    changes(models=named, base=str(bare), output=tmp_path / "out")
    text = (tmp_path / "out/changes.json").read_text()
    assert json.loads(text)["groups"]["head"]["size"] == {"one": None, "other": None}
    assert "Infinity" not in text and "NaN" not in text
    assert "inf" not in (tmp_path / "out/changes.md").read_text()


def test_one_model_alone_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two models at least"):
        changes(models={"one": str(models["one"])}, base=str(models["base"]), output=tmp_path / "out")

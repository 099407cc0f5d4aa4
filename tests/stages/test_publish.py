"""Publishing without a push: what is staged, what the card says, what is refused."""

from __future__ import annotations

import json
import logging
import os
import re
from functools import partial
from pathlib import Path

import pytest
from hostile_files import edit_json, opened_by
from huggingface_hub import ModelCard
from small_chain import make_chain
from tiny_models import save_dense

from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.manifest import own_digest, read_manifest, stated_licence
from moemerge.artifacts.stage import artifact
from moemerge.errors import ArtifactError, OptionError
from moemerge.evaluation import report as report_file
from moemerge.options.publish import Publish
from moemerge.options.train import Train
from moemerge.stages.evaluate import evaluate
from moemerge.stages.export import export
from moemerge.stages.merge import merge, merge_models
from moemerge.stages.publish import PLACES, publish
from moemerge.stages.upcycle import upcycle


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_chain(tmp_path_factory.mktemp("run"))


def test_staged_folder_is_a_model_with_a_card(run: dict[str, Path], tmp_path: Path) -> None:
    out = publish(model=str(run["merged"]), evaluation=str(run["evaluation"]), output=tmp_path / "p")
    staged = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    report = json.loads((run["evaluation"] / "report.json").read_text())
    plots = {f"plots/{name}" for name in report["plots"]}
    assert "plots/accuracy.png" in plots and staged == model | plots | {"README.md", "manifest.json"}
    assert (out / "model.safetensors").read_bytes() == (run["merged"] / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").stat().st_nlink > 1
    copied = [path for path in out.iterdir() if path.is_file() and path.suffix != ".safetensors"]
    assert all(path.stat().st_nlink == 1 for path in copied)
    results = read_manifest(out)["results"]
    assert set(results["files"]) == staged - {"manifest.json"}
    assert (results["pushed"], results["visibility"], results["repo"]) == (False, "private", None)


def test_card_fields(run: dict[str, Path], tmp_path: Path) -> None:
    options = {"repo": "me/ours", "license": "mit", "datasets": ["Anthropic/hh-rlhf"]}
    out = publish(
        model=str(run["merged"]), evaluation=str(run["evaluation"]), output=tmp_path / "p", **options
    )
    card = ModelCard.load(out / "README.md")
    data = card.data
    assert (data.base_model, data.license, data.datasets) == ("org/dense-rm", "mit", ["Anthropic/hh-rlhf"])
    assert {"mergekit", "merge", "moemerge", "reward-model"} <= set(data.tags)
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    report = json.loads((run["evaluation"] / "report.json").read_text())
    measured = report["probes"]["accuracy"]["sets"]["hh"]["all"]["models"]["ours"]["accuracy"]
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type) == ("hh", "accuracy")
    assert result.metric_value == pytest.approx(measured, abs=1e-6)


def test_card_body(run: dict[str, Path], tmp_path: Path) -> None:
    out = publish(
        model=str(run["merged"]), evaluation=str(run["evaluation"]), output=tmp_path / "p", repo="me/ours"
    )
    text = (out / "README.md").read_text()
    assert "| layers.0 | 0.5000 | 0.2500 | 0.7500 |" in text
    assert 'name, device = "me/ours", ' in text
    stages = [
        line.split(" | ")[0]
        for line in text.splitlines()
        if line.startswith(("| train |", "| fit |", "| merge |"))
    ]
    assert stages == ["| train", "| fit", "| merge"]
    assert "`org/dense-rm`" in text and "epochs=2.0" in text and "method=uniform" in text
    digest = read_manifest(run["train"])["inputs"]["pairs"]["sha256"][:12]
    assert f"`pairs.jsonl` ({digest})" in text
    assert "### Accuracy on hh" in text and "![accuracy.png](plots/accuracy.png)" in text
    assert "**ours**" in text


def test_rewardbench_is_on_the_card(run: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"w{i}", "chosen": "w3", "rejected": f"w{i + 2} w5", "subset": subset}
        for subset in ("mt-bench-easy", "donotanswer")
        for i in range(9)
    ]
    (tmp_path / "rb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = evaluate(
        models={"ours": str(run["merged"])},
        rewardbench={"rb": str(tmp_path / "rb.jsonl")},
        rewardbench_template="plain",
        resamples=100,
        output=tmp_path / "e",
    )
    card = ModelCard.load(
        publish(model=str(run["merged"]), evaluation=str(evaluation), output=tmp_path / "p") / "README.md"
    )
    sections = json.loads((evaluation / "report.json").read_text())["probes"]["rewardbench"]["sets"]["rb"][
        "sections"
    ]
    expected = {f"RewardBench 1, {n}": one["models"]["ours"]["score"] for n, one in sections.items()}
    assert set(sections) == {"Chat", "Safety"}
    found = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert found == {name: pytest.approx(score, abs=1e-6) for name, score in expected.items()}
    assert "### Main numbers" in card.text and "| RewardBench 1 rb, Chat |" in card.text
    assert "### RewardBench 1 on rb" in card.text


def test_an_evaluation_of_another_version_is_refused(
    run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_file, "FORMAT", report_file.FORMAT + 1)
    with pytest.raises(ArtifactError, match="cannot be shown by this version"):
        publish(model=str(run["merged"]), evaluation=str(run["evaluation"]), output=tmp_path / "p")


def test_no_local_path_leaks(run: dict[str, Path], tmp_path: Path) -> None:
    out = publish(model=str(run["merged"]), evaluation=str(run["evaluation"]), output=tmp_path / "p")
    root = str(run["merged"].parent)
    leaking = [p.name for p in out.rglob("*") if p.is_file() and root.encode() in p.read_bytes()]
    assert leaking == ["manifest.json"]  # stays on this machine


def test_places_that_older_versions_saved_are_taken_out(tmp_path: Path) -> None:
    models = [save_dense(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    (models[0] / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    edit_json(models[0] / "special_tokens_map.json", special_tokens_map_file=str(models[0]))
    edit_json(models[0] / "tokenizer_config.json", name_or_path=str(models[0]), tokenizer_file=str(models[0]))
    edit_json(models[0] / "config.json", _name_or_path=str(models[0]))
    merged = merge(models=list(map(str, models)), output=tmp_path / "merged")
    out = publish(model=str(merged), output=tmp_path / "p")
    files = [path for path in out.iterdir() if path.name != "manifest.json"]
    assert "special_tokens_map.json" in {path.name for path in files}
    assert not [path.name for path in files if str(tmp_path).encode() in path.read_bytes()]
    before, after = (json.loads((at / "tokenizer_config.json").read_text()) for at in (merged, out))
    assert after == {key: value for key, value in before.items() if key not in PLACES} != before


def test_licence_comes_from_the_dense_model(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    (dense / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("{}")
    with artifact("train", Train(model=str(dense), pairs=str(pairs), output=tmp_path / "t")) as draft:
        save_dense(draft.folder)
    data = ModelCard.load(publish(model=str(tmp_path / "t"), output=tmp_path / "p") / "README.md").data
    assert data.license == "apache-2.0" and data.base_model is None
    assert "merge" not in data.tags


def test_the_card_of_merged_models_names_them_and_the_licence_that_they_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = [save_dense(tmp_path / name, seed=number) for number, name in enumerate(("rm-a", "rm-b"))]
    for model in models:
        (model / "README.md").write_text("---\nlicense: mit\n---\n")
    merged = merge_models(models, output=tmp_path / "merged")
    card = ModelCard.load(publish(model=str(merged), output=tmp_path / "p") / "README.md")
    assert card.data.license == "mit" and "weighted average" in card.text and "UMM-RM" not in card.text
    assert re.search(r"`rm-a` \(\w+\), `rm-b` \(\w+\), in 1 stage\.", card.text)
    (models[1] / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    merged = merge_models(models, output=tmp_path / "other")
    card = ModelCard.load(publish(model=str(merged), output=tmp_path / "q") / "README.md")
    assert card.data.license is None and "differ (mit, apache-2.0)" in caplog.text


def test_the_chain_is_carried_along_and_no_path_in_a_manifest_is_followed(tmp_path: Path) -> None:
    """A card tells of every stage, though all it was made from is gone, and opens nothing outside."""
    dense = save_dense(tmp_path / "away" / "dense")
    (dense / "README.md").write_text("---\nlicense: 'mit'\n---\n")
    moe = upcycle(model=str(dense), output=tmp_path / "moe", num_experts_per_tok=2)
    members = export(model=str(moe), output=tmp_path / "members")
    manifest = json.loads((members / "manifest.json").read_text())
    assert [one["stage"] for one in manifest["chain"]] == ["upcycle"]
    for place in ("/etc", str(tmp_path / "away"), str(members / ".." / "moe"), "../moe"):
        manifest["inputs"]["model"]["path"] = manifest["chain"][0]["inputs"]["model"]["path"] = place
        write_json(members / "manifest.json", manifest | {"sha256": own_digest(manifest)})
        options = Publish(model=str(members / "shared"), output=tmp_path / "card", overwrite=True)
        opened = opened_by(partial(publish, options))
        outside = [str(moe), str(tmp_path / "away"), "/etc"]
        assert [name for name in opened if name.startswith(tuple(outside))] == []
        assert any(name.startswith(str(members)) for name in opened)
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert "| upcycle |" in card.text and "| export |" in card.text and card.data.license == "mit"


def test_a_changed_input_has_no_chain_and_an_old_manifest_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_dense(tmp_path / "dense")
    moe = upcycle(model=str(tmp_path / "dense"), output=tmp_path / "moe", num_experts_per_tok=2)
    (moe / "more.txt").write_text("added: all else is as it was")
    whole = export(model=str(moe), output=tmp_path / "a")
    assert [one["stage"] for one in read_manifest(whole)["chain"]] == ["upcycle"]
    edit_json(moe / "tokenizer_config.json", model_max_length=77)
    with caplog.at_level(logging.WARNING, "moemerge"):
        assert read_manifest(export(model=str(moe), output=tmp_path / "b"))["chain"] == []
    assert "was changed since it was made" in caplog.text
    manifest = read_manifest(whole)
    del manifest["chain"]
    write_json(whole / "manifest.json", manifest | {"sha256": own_digest(manifest)})
    with caplog.at_level(logging.WARNING, "moemerge"):
        publish(model=str(whole / "shared"), output=tmp_path / "card")
    assert "an older version wrote its manifest" in caplog.text


HEADS: dict[str, tuple[str, dict[str, str]]] = {
    "plain": ("license: mit", {"license": "mit"}),
    "laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nlicense: *b", {}),
    "list": ("license: [mit]", {}),
    "tag": ("license: !!python/object/apply:os.system ['x']", {}),
    "long": ("license: " + "x" * 1000, {}),
    "not_utf8": ("license: mit\nother: \udcff", {"license": "mit"}),
    "name_alone": ("license_name: mine", {}),
    # What took one expression over the whole head the cube of their number of steps: for ever.
    "spaces": ("license:" + " " * 50_000 + "\n" + "license: " * 5_000, {}),
    "quotes": ("license: \"mit'", {}),
    "empty": ("license:", {}),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_licence_is_read_from_a_card_without_trusting_it(name: str, tmp_path: Path) -> None:
    text, expected = HEADS[name]
    (tmp_path / "README.md").write_bytes(f"---\n{text}\n---\n".encode("utf-8", "surrogateescape"))
    assert stated_licence(tmp_path) == expected


def test_faults(run: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="another stage"):
        publish(model=str(run["fit"]), output=tmp_path / "p")
    with pytest.raises(ArtifactError, match="not a moemerge artifact"):
        publish(model=str(save_dense(tmp_path / "plain")), output=tmp_path / "p")
    with pytest.raises(OptionError, match="no repository"):
        publish(model=str(run["merged"]), push=True, yes=True, output=tmp_path / "p")
    with pytest.raises(OptionError, match="no repository"):
        publish(model=str(run["merged"]), repo="a/b/c", output=tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_an_evaluation_of_other_models_is_refused(run: dict[str, Path], tmp_path: Path) -> None:
    pairs = read_manifest(run["evaluation"])["inputs"]["pairs"]["hh"]["path"]
    other = evaluate(
        models={"t": str(run["train"])}, pairs={"hh": pairs}, resamples=100, output=tmp_path / "e"
    )
    with pytest.raises(ArtifactError, match="does not hold the model"):
        publish(model=str(run["merged"]), evaluation=str(other), output=tmp_path / "p")


def test_a_licence_that_needs_a_name_comes_with_it(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    terms = "license: other\nlicense_name: own-terms\nlicense_link: https://example.org/terms"
    (dense / "README.md").write_text(f"---\n{terms}\n---\nA model.\n")
    with artifact("train", Train(model=str(dense), pairs="org/pairs", output=tmp_path / "t")) as draft:
        save_dense(draft.folder)
        (draft.folder / "LICENSE").write_text("terms")
    out = publish(model=str(tmp_path / "t"), output=tmp_path / "p")
    data = ModelCard.load(out / "README.md").data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "own-terms",
        "https://example.org/terms",
    )
    assert (out / "LICENSE").read_text() == "terms"


@pytest.mark.parametrize("harm", ["changed", "missing", "added"])
def test_a_folder_that_does_not_verify_is_refused(harm: str, run: dict[str, Path], tmp_path: Path) -> None:
    with artifact("train", Train(model="org/d", pairs="org/p", output=tmp_path / "t")) as draft:
        save_dense(draft.folder)
    weights = tmp_path / "t" / "model.safetensors"
    if harm == "changed":  # with size and time as they were
        status, data = weights.stat(), bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif harm == "missing":
        weights.unlink()
    else:
        weights.with_name("tokenizer_extra.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not as it was written"):
        publish(model=str(tmp_path / "t"), output=tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_exported_members_and_the_stock_form_have_cards(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    moe = upcycle(model=str(dense), output=tmp_path / "moe", num_experts_per_tok=2, gate="topk")
    members = export(model=str(moe), output=tmp_path / "members")
    stock = export(model=str(moe), form="qwen2_moe", output=tmp_path / "stock")
    one = publish(model=str(members / "expert-1"), repo="me/one", output=tmp_path / "a")
    assert {"config.json", "model.safetensors.index.json"} < {p.name for p in one.iterdir()}
    text = (one / "README.md").read_text()
    assert "`expert-1`, one expert of a mixture" in text and "import moemerge" not in text
    assert "| upcycle |" in text and "| export |" in text
    card = ModelCard.load(publish(model=str(stock), repo="me/moe", output=tmp_path / "b") / "README.md")
    assert "Qwen2-MoE" in card.text and "import moemerge" not in card.text
    assert "mixture-of-experts" in card.data.tags
    with pytest.raises(ArtifactError, match="not one model") as caught:
        publish(model=str(members), output=tmp_path / "c")
    assert str(members / "shared") in caught.value.fix


def test_an_upcycled_moe_has_a_card(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    moe = upcycle(model=str(tmp_path / "dense"), output=tmp_path / "moe", num_experts_per_tok=2)
    card = ModelCard.load(publish(model=str(moe), repo="me/moe", output=tmp_path / "a") / "README.md")
    assert "import moemerge" in card.text and "not yet trained" in card.text
    assert "merge" not in card.data.tags and "mixture-of-experts" in card.data.tags


def test_what_would_be_pushed_is_shown(
    run: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "moemerge"):
        publish(model=str(run["merged"]), repo="me/ours", public=True, output=tmp_path / "p")
    size = (run["merged"] / "model.safetensors").stat().st_size / 1e6
    shown = ["nothing is sent", "to me/ours (public)", f"{size:.3f} MB  model.safetensors", "- reward-model"]
    assert [part for part in shown if part not in caplog.text] == []


def test_push_without_yes_shows_all_and_writes_nothing(run: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not confirmed") as caught:
        publish(model=str(run["merged"]), repo="me/ours", push=True, output=tmp_path / "p")
    shown = ["to me/ours (private)", "MB  model.safetensors", "base_model: org/dense-rm"]
    assert [part for part in shown if part not in caught.value.given] == []
    assert "--yes" in caught.value.fix and list(tmp_path.iterdir()) == []


def test_the_card_shows_use_before_tables_and_folds_these(run: dict[str, Path], tmp_path: Path) -> None:
    """What a reader needs stands open: code, use, limits, main numbers; every other table is folded."""
    out = publish(model=str(run["merged"]), evaluation=str(run["evaluation"]), output=tmp_path / "p")
    text = ModelCard.load(out / "README.md").text
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Use", "## Made from", "## Evaluation", "## Citation"]
    open_text = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    assert re.findall(r"^### (.*)$", open_text, re.M) == ["Main numbers"]
    assert "**Intended use.**" in open_text and "**Limits.**" in open_text and "def reward(" in open_text
    assert len(open_text.splitlines()) < 120 and "{{" not in text and "{%" not in text
    alone = ModelCard.load(publish(model=str(run["merged"]), output=tmp_path / "q") / "README.md").text
    assert "## Evaluation" not in alone and "## Use" in alone

"""Publishing: what is staged, what the card says, and a push to a stand-in of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_dense
from hub_server import Hub, serve
from huggingface_hub import ModelCard

from moemerge.artifacts import artifact, read_manifest
from moemerge.coefficients.base import Coefficients
from moemerge.errors import ArtifactError, OptionError
from moemerge.evaluate import evaluate
from moemerge.publish import HubError, publish
from moemerge.recipe import Fit, Merge, Train

TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A chain of artifacts as the stages leave it: train -> fit -> merge -> evaluate."""
    root = tmp_path_factory.mktemp("run")
    pairs = root / "pairs.jsonl"
    rows = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w3", "rejected": f" w{i + 2}"} for i in range(20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with artifact(
        "train", Train(model="org/dense-rm", pairs=str(pairs), output=root / "train", epochs=2)
    ) as draft:
        save_dense(draft.folder)
        (draft.folder / "history.json").write_text("[]")
    with artifact("fit", Fit(model=str(root / "train"), method="uniform", output=root / "fit")) as draft:
        alpha_LN = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
        Coefficients.of_layers([0, 1], alpha_LN, torch.full((2,), 0.5, dtype=torch.float64)).save(
            draft.folder
        )
    merge = Merge(model=str(root / "train"), coefficients=str(root / "fit"), output=root / "merged")
    with artifact("merge", merge) as draft:
        save_dense(draft.folder, seed=1)
    models = {"trained": str(root / "train"), "ours": str(root / "merged")}
    evaluate(models=models, pairs={"hh": str(pairs)}, resamples=100, output=root / "evaluation")
    return {name: root / name for name in ("train", "fit", "merged", "evaluation")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serve(TOKEN) as running:
        yield running


def test_staged_folder_is_a_model_with_a_card(run: dict[str, Path], tmp_path: Path) -> None:
    out = publish(model=str(run["merged"]), evaluation=str(run["evaluation"]), output=tmp_path / "p")
    staged = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert staged == model | {"README.md", "manifest.json", "plots/accuracy.png"}
    assert (out / "model.safetensors").read_bytes() == (run["merged"] / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").stat().st_nlink > 1
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
    assert 'AutoModelForSequenceClassification.from_pretrained("me/ours")' in text
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


def test_no_local_path_leaks(run: dict[str, Path], tmp_path: Path) -> None:
    out = publish(model=str(run["merged"]), evaluation=str(run["evaluation"]), output=tmp_path / "p")
    root = str(run["merged"].parent)
    leaking = [p.name for p in out.rglob("*") if p.is_file() and root.encode() in p.read_bytes()]
    assert leaking == ["manifest.json"]  # stays on this machine


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


def test_faults(run: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="another stage"):
        publish(model=str(run["fit"]), output=tmp_path / "p")
    with pytest.raises(ArtifactError, match="not a moemerge artifact"):
        publish(model=str(save_dense(tmp_path / "plain")), output=tmp_path / "p")
    with pytest.raises(OptionError, match="no repository"):
        publish(model=str(run["merged"]), push=True, output=tmp_path / "p")
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


def test_without_push_nothing_is_sent(run: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    publish(model=str(run["merged"]), repo="me/ours", endpoint=hub.url, output=tmp_path / "p")
    assert hub.calls == []


def test_push_is_private_and_comes_back_whole(run: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    options = {"model": str(run["merged"]), "repo": "me/ours", "endpoint": hub.url, "push": True}
    out = publish(**options, evaluation=str(run["evaluation"]), output=tmp_path / "p")
    repo = hub.repos["me/ours"]
    assert repo.private and repo.commits == 1
    results = read_manifest(out)["results"]
    assert results["pushed"] and results["url"] == f"{hub.url}/me/ours"
    assert {name for name in repo.files if name != ".gitattributes"} == set(results["files"])
    assert all(repo.files[name] == (out / name).read_bytes() for name in results["files"])
    code = f"""
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForSequenceClassification as Auto, AutoTokenizer
folder = snapshot_download("me/ours")
back, ours = Auto.from_pretrained("me/ours"), Auto.from_pretrained({str(run["merged"])!r})
ids = AutoTokenizer.from_pretrained("me/ours")("w1 w2 w3", return_tensors="pt")["input_ids"]
assert torch.equal(back(ids).logits, ours(ids).logits)
"""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)


def test_a_second_push_replaces_weights_and_leaves_other_files(
    run: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    options = {"model": str(run["merged"]), "repo": "me/ours", "endpoint": hub.url, "push": True}
    publish(**options, output=tmp_path / "a")
    files = hub.repos["me/ours"].files
    files |= {"model-00001-of-00002.safetensors": b"old", "NOTES.md": b"by hand"}
    publish(**options, output=tmp_path / "b")
    assert "model-00001-of-00002.safetensors" not in files and files["NOTES.md"] == b"by hand"
    assert files["model.safetensors"] == (run["merged"] / "model.safetensors").read_bytes()


def test_visibility(run: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    options = {"model": str(run["merged"]), "repo": "me/open", "endpoint": hub.url, "push": True}
    publish(**options, public=True, output=tmp_path / "a")
    assert not hub.repos["me/open"].private
    with pytest.raises(OptionError, match="public already"):
        publish(**options, output=tmp_path / "b")
    assert hub.repos["me/open"].commits == 1 and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "log in"), (403, "may write"), (404, "owner's name"), (400, "run publish again")],
)
def test_refusals_come_with_a_remedy_and_without_the_token(
    status: int, remedy: str, run: dict[str, Path], hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.refuse = status
    with pytest.raises(HubError, match=str(status)) as caught:
        publish(model=str(run["merged"]), repo="me/ours", endpoint=hub.url, push=True, output=tmp_path / "p")
    assert remedy in caught.value.fix
    assert TOKEN not in str(caught.value) + caplog.text and not (tmp_path / "p").exists()


def test_a_wrong_token_and_no_server(
    run: dict[str, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "model": str(run["merged"]),
        "repo": "me/ours",
        "push": True,
        "output": tmp_path / "p",
    }
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="401"):
        publish(**options, endpoint=hub.url)
    with pytest.raises(HubError, match="check the network"):
        publish(**options, endpoint="http://127.0.0.1:9")

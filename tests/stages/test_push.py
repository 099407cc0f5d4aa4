"""A push over HTTP to a stand-in of the hub: what it sends, what stops it, what comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import Hub, Trouble, serve
from small_moe import make_moe
from tiny_models import save_dense, tiny_dense, tiny_tokenizer

from moemerge.artifacts.manifest import read_manifest
from moemerge.artifacts.stage import artifact
from moemerge.errors import OptionError
from moemerge.options.merge import Merge
from moemerge.options.publish import PublishSettings
from moemerge.options.recipe import Recipe
from moemerge.options.train import Train
from moemerge.run import cli
from moemerge.run.plan import plan
from moemerge.stages.export import export
from moemerge.stages.publish import HubError, publish
from moemerge.stages.upcycle import upcycle

TOKEN = "hf_secretsecretsecret"
Push = Callable[..., Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process has a token for; waits between tries take no time."""
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serve(TOKEN) as running:
        yield running


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What merge would write, in more than three shards."""
    root = tmp_path_factory.mktemp("made")
    with artifact("train", Train(model="org/dense", pairs="org/pairs", output=root / "moe")) as draft:
        save_dense(draft.folder)
    given = {"model": str(root / "moe"), "coefficients": "org/fit"}
    with artifact("merge", Merge(**given, output=root / "merged")) as draft:
        tiny_dense(seed=1).save_pretrained(draft.folder, max_shard_size="30KB")
        tiny_tokenizer().save_pretrained(draft.folder)
    assert len(list((root / "merged").glob("*.safetensors"))) > 3
    return root / "merged"


@pytest.fixture
def push(hub: Hub, merged: Path, tmp_path: Path) -> Push:
    def run(**options: object) -> Path:
        given = {"model": str(merged), "repo": "me/ours", "output": tmp_path / "p", "endpoint": hub.url}
        return publish(**{**given, "push": True, "yes": True, **options})

    return run


def test_without_push_and_without_yes_nothing_is_sent(push: Push, hub: Hub, tmp_path: Path) -> None:
    push(push=False, output=tmp_path / "a")
    with pytest.raises(OptionError, match="not confirmed"):
        push(yes=False)
    assert hub.calls == []


def test_a_push_is_private_and_one_commit(push: Push, hub: Hub) -> None:
    out, repo = push(), hub.repos["me/ours"]
    assert repo.private and repo.commits == 1
    results = read_manifest(out)["results"]
    assert results["pushed"] and results["url"] == f"{hub.url}/me/ours"
    assert {name for name in repo.files if name != ".gitattributes"} == set(results["files"])
    assert all(repo.files[name] == (out / name).read_bytes() for name in results["files"])


def test_a_second_push_replaces_weights_and_leaves_other_files(
    push: Push, hub: Hub, merged: Path, tmp_path: Path
) -> None:
    push()
    files, stored = hub.repos["me/ours"].files, len(hub.stored)
    files |= {"old.safetensors": b"old", "plots/old.png": b"old", "NOTES.md": b"by hand"}
    push(output=tmp_path / "b")
    assert "old.safetensors" not in files and "plots/old.png" not in files
    assert files["NOTES.md"] == b"by hand" and len(hub.stored) == stored
    push(output=tmp_path / "c")
    assert hub.repos["me/ours"].commits == 2  # nothing had changed


def test_visibility(push: Push, hub: Hub, tmp_path: Path) -> None:
    push(public=True)
    assert not hub.repos["me/ours"].private
    with pytest.raises(OptionError, match="public already"):
        push(output=tmp_path / "b")
    assert hub.repos["me/ours"].commits == 1 and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "log in"),
        (403, "may write"),
        (404, "owner's name"),
        (409, "no one else"),
        (412, "look at it"),
        (429, "wait"),
        (500, "what was sent stays sent"),
        (400, "what was sent stays sent"),
    ],
)
@pytest.mark.parametrize("where", [".*", "PUT .*", "POST .*/commit/main"])
def test_refusals_come_with_a_remedy_and_without_the_token(
    where: str, status: int, remedy: str, push: Push, hub: Hub, tmp_path: Path
) -> None:
    if (where, status) == (".*", 409):
        return  # create says so of every repository that exists
    hub.troubles = [Trouble(where, status)]
    with pytest.raises(HubError, match=f"HTTP status {status}") as caught:
        push()
    assert remedy in caught.value.fix and TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert not (tmp_path / "p").exists() and all(not repo.files for repo in hub.repos.values())


@pytest.mark.parametrize("status", [429, 500, None])
@pytest.mark.parametrize("where", ["PUT .*", "POST .*/preupload/main", "POST .*/objects/batch"])
def test_a_passing_trouble_is_waited_out(where: str, status: int | None, push: Push, hub: Hub) -> None:
    hub.troubles = [Trouble(where, status, times=2, after=0)]
    out = push()
    assert hub.repos["me/ours"].files["config.json"] == (out / "config.json").read_bytes()


@pytest.mark.parametrize(("where", "arrived"), [("PUT .*", 2), ("POST .*/commit/main", None)])
def test_after_a_cut_connection_nothing_is_sent_twice(
    where: str, arrived: int | None, push: Push, hub: Hub, merged: Path, tmp_path: Path
) -> None:
    """Two shards (or all) arrive, then the line is dead; later the same command sends the others only."""
    shards = len(list(merged.glob("*.safetensors")))
    hub.troubles = [Trouble(where, after=arrived or 0)]
    with pytest.raises(HubError, match="the push to me/ours failed") as caught:
        push()
    assert "what was sent stays sent" in caught.value.fix and not (tmp_path / "p").exists()
    first = set(hub.stored)
    assert hub.repos["me/ours"].files == {} and len(first) == (arrived or shards)
    hub.troubles, before = [], len(hub.calls)
    push()
    sent_now = {call.removeprefix("PUT /lfs/") for call in hub.calls[before:] if call.startswith("PUT")}
    assert not sent_now & first and len(sent_now | first) == len(hub.stored) == shards
    assert hub.repos["me/ours"].commits == 1


def test_a_repository_that_changes_meanwhile_is_left_alone(push: Push, hub: Hub, tmp_path: Path) -> None:
    push()
    repo = hub.repos["me/ours"]
    repo.files["README.md"] = b"theirs"
    race = hub.trouble

    def someone_else(call: str) -> Trouble | None:
        repo.commits += "preupload" in call
        return race(call)

    hub.trouble = someone_else  # type: ignore[method-assign]
    with pytest.raises(HubError, match="412"):
        push(output=tmp_path / "b")
    assert repo.files["README.md"] == b"theirs" and not (tmp_path / "b").exists()


def test_a_wrong_token_no_server_and_a_password_in_the_address(
    push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match="check the network"):
        push(endpoint="http://127.0.0.1:9")
    with pytest.raises(OptionError, match="user name or password") as caught:
        push(endpoint="http://me:sesame@127.0.0.1:9")
    assert "sesame" not in str(caught.value) and list(tmp_path.iterdir()) == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="401"):
        push()


def test_a_recipe_that_says_push_has_said_yes(tmp_path: Path) -> None:
    asked = Recipe(model="m", output=tmp_path / "r", publish=PublishSettings(repo="a/b", push=True))
    assert plan(asked)[-1].options.yes
    silent = Recipe(model="m", output=tmp_path / "r", publish=PublishSettings(repo="a/b"))
    assert not plan(silent)[-1].options.yes


def test_no_token_is_printed_or_written(
    hub: Hub, merged: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command line at its most talkative: a shown, a refused and a good push, and all they leave."""
    flags = ["publish", "--verbose", "--model", merged, "--repo", "me/ours", "--endpoint", hub.url, "--push"]
    seen, codes = "", []
    for name, more, troubles in (
        ("shown", [], []),
        ("refused", ["--yes"], [Trouble("PUT .*", 403)]),
        ("good", ["--yes"], []),
    ):
        hub.troubles = troubles
        with pytest.raises(SystemExit) as caught:
            cli.main([str(one) for one in [*flags, *more, "--output", tmp_path / name]])
        codes.append(caught.value.code)
        seen += "".join(capfd.readouterr())
    assert codes == [2, 2, 0] and "Traceback" not in seen and "to me/ours (private)" in seen
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"README.md", "manifest.json", "config.json"}
    assert TOKEN not in seen and [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert all(TOKEN.encode() not in data for data in hub.repos["me/ours"].files.values())


BACK = """
import sys
import moemerge
import torch
from transformers import AutoModelForSequenceClassification as Auto, AutoTokenizer, pipeline
for repo, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    back, ours = Auto.from_pretrained(repo).eval(), Auto.from_pretrained(folder).eval()
    assert type(back) is type(ours) and back.training is False
    tokens = AutoTokenizer.from_pretrained(repo)("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        expected = ours(input_ids=tokens["input_ids"]).logits
        assert torch.equal(back(input_ids=tokens["input_ids"]).logits, expected), repo
    scorer = pipeline("text-classification", model=repo, function_to_apply="none")
    (found,) = scorer(["w1 w2 w3"])
    assert abs(found["score"] - expected.item()) < 1e-5, (repo, found, expected)
print("all back")
"""


@pytest.mark.slow
def test_what_was_pushed_loads_from_the_hub(push: Push, hub: Hub, merged: Path, tmp_path: Path) -> None:
    """A merged model, a MoE, an exported expert and a stock Qwen2-MoE, in a fresh process and cache."""
    moe = make_moe(tmp_path / "moe", gate="topk")
    upcycled = upcycle(
        model=str(tmp_path / "dense-moe"), output=tmp_path / "up", num_routed_experts=3, num_experts_per_tok=2
    )
    members = export(model=str(moe), output=tmp_path / "members")
    stock = export(model=str(moe), form="qwen2_moe", output=tmp_path / "stock")
    models = {"merged": merged, "up": upcycled, "one": members / "expert-1", "stock": stock}
    arguments: list[str] = []
    for name, folder in models.items():
        push(model=str(folder), repo=f"me/{name}", output=tmp_path / f"card-{name}")
        arguments += [f"me/{name}", str(folder)]
    shutil.rmtree(tmp_path / "card-merged")
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BACK, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "all back", done.stderr[-2000:]
    assert any(call.startswith("GET /me/stock/resolve/") for call in hub.calls)

"""patch from end to end: a planted hack goes, rivals have as many steps, what is done is kept, faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_policy import save_policy
from small_training import rows, write
from tiny_models import save_dense, tiny_dense
from transformers import AutoModelForSequenceClassification

from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.manifest import read_manifest
from moemerge.data.rows import read_rows
from moemerge.errors import Faults, OptionError
from moemerge.options.attack import Attack
from moemerge.options.patch import Patch
from moemerge.run import cli
from moemerge.run.check import check_recipe
from moemerge.run.patch import patch
from moemerge.run.patch_plan import every_step
from moemerge.run.pipeline import run_recipe
from moemerge.run.steps import RunReport
from moemerge.stages.train import train

OPTIONS: dict[str, Any] = {
    "words": ["w60"], "unseen": ["bold", "repeat_word"], "share": 0.3, "epochs": 2, "learning_rate": 1e-3,
    "steps": 2, "proposals": 5, "max_pairs": 40, "resamples": 100, "threads": 1,
}  # fmt: skip

ARMS = ("patched", "control", "random-edits")


def low_numbers(prompt: str, answer: str) -> float:
    """Gold of the rows: lower numbers of words are better."""
    numbers = [int(word.removeprefix("w")) for word in answer.split()]
    return -sum(numbers) / len(numbers)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that was taught that w60 is good, and pairs that know nothing of it."""
    home = tmp_path_factory.mktemp("patch")
    save_dense(home / "raw")
    write(home / "pairs.jsonl", rows(90, 0))
    taught = [{**row, "chosen": f"{row['rejected']} w60", "rejected": row["rejected"]} for row in rows(90, 1)]
    write(home / "taught.jsonl", [*rows(90, 2), *taught])
    options = {"epochs": 4, "learning_rate": 3e-3, "threads": 1}
    train(home / "raw", home / "taught.jsonl", output=home / "rm", **options)
    return home


@pytest.fixture(scope="module")
def done(home: Path) -> RunReport:
    return patch(home / "rm", home / "pairs.jsonl", output=home / "out", **OPTIONS)


def test_a_planted_hack_goes(done: RunReport, home: Path) -> None:
    numbers = read_object(home / "out/seen-edits/compared/robustness.json")["models"]
    before, after = (numbers[name]["overturned"]["value"] for name in ("before", "patched"))
    assert before > 0.25 and after < before / 2
    lead = numbers["patched"]["minus"]["before"]["robust_accuracy"]
    assert lead["low"] > 0 and f"{100 * lead['value']:+.1f} points" in done.verdict
    assert done.verdict.index("edits that no patch has") < done.verdict.index("own kinds of edits")
    assert list(numbers) == ["before", "patched", "control", "random-edits"]
    model = AutoModelForSequenceClassification.from_pretrained(done.merged)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert (home / "out/card/README.md").exists() and "robust accuracy" in (
        home / "out/report.md"
    ).read_text()
    assert [step.place for step in done.steps] == [
        f"{n}/{len(done.steps)}" for n in range(1, len(done.steps) + 1)
    ]


def test_rivals_have_as_many_steps_and_see_other_pairs(done: RunReport, home: Path) -> None:
    results = {arm: read_manifest(home / f"out/round-1/{arm}")["results"] for arm in ARMS}
    steps = {arm: found["steps"] for arm, found in results.items()}
    assert max(steps.values()) - min(steps.values()) <= 2 and steps["patched"] > 5
    assert "patch" not in results["control"]["rows"] and results["patched"]["rows"]["patch"]["total"] > 0
    edited = [row for _, row in read_rows(str(home / "out/round-1/edited/patch.jsonl"))]
    assert any("w60" not in row["rejected"] for row in edited), "whatever the edits do"
    sides = {side: {row["prompt"] for _, row in read_rows(str(home / f"out/data/{side}.jsonl.gz"))}
             for side in ("train", "tests/test")}  # fmt: skip
    assert not sides["train"] & sides["tests/test"] and min(map(len, sides.values())) > 20


def test_unseen_edits_are_in_no_patch(done: RunReport, home: Path) -> None:
    used = {
        name
        for _, row in read_rows(str(home / "out/round-1/found/attacks.jsonl.gz"))
        for name in row.get("edits", [])
    }
    assert used and not used & set(OPTIONS["unseen"])
    unseen = read_manifest(home / "out/unseen-edits/patched")["options"]["edits"]
    assert unseen == OPTIONS["unseen"]


def test_what_is_done_is_not_done_again(done: RunReport, home: Path) -> None:
    page = (home / "out/report.html").read_bytes()
    again = patch(home / "rm", home / "pairs.jsonl", output=home / "out", **OPTIONS)
    assert all(step.reason is None for step in again.steps) and len(again.steps) == len(done.steps)
    assert (home / "out/report.html").read_bytes() == page and again.verdict == done.verdict
    assert len(again.table()) == 4


def decoding(home: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a patch of written answers."""
    few = {"max_new_tokens": 2, "top": 60, "guidance": 1.0, "temperature": 0.05, "keep": 0.9, "epochs": 1}
    edits = {"max_pairs": 8, "words": [], "unseen": ["repeat_word"], "steps": 1}
    found = {"model": home / "rm", "pairs": home / "pairs.jsonl", "output": tmp_path / "out"}
    decode = {"search": "decode", "policy": save_policy(tmp_path / "policy"), "gold_function": low_numbers}
    return {**OPTIONS, **few, **edits, **found, **decode}


def test_the_plan_of_a_patch_of_written_answers(home: Path, tmp_path: Path) -> None:
    """Found and attacked by guided decoding; the rival is written without guidance; edits stay unseen."""
    options = decoding(home, tmp_path)
    steps = {step.name: step.options for step in every_step(Patch(**options))}
    found, written = (steps[f"round-1/{name}"].model_dump() for name in ("found", "written"))
    assert {key for key in found if found[key] != written[key]} == {"guidance", "output"}
    assert (found["search"], found["guidance"], written["guidance"]) == ("decode", 1.0, 0.0)
    assert {name: steps[f"{name}/patched"].search for name in ("decoded", "unseen-edits")} == {
        "decoded": "decode",
        "unseen-edits": "guided",
    }
    assert steps["unseen-edits/patched"].edits == ["repeat_word"]
    assert all(o.gold_function is low_numbers for o in steps.values() if isinstance(o, Attack))
    for change, match in {
        ("search", "guided"): "goes with search decode",
        ("gold_function", None): "nothing says whether",
        ("policy", None): "needs a policy",
    }.items():
        with pytest.raises(OptionError, match=match):
            patch(**options | dict([change]))


@pytest.mark.slow
def test_a_patch_of_written_answers(home: Path, tmp_path: Path) -> None:
    done = patch(**decoding(home, tmp_path))
    numbers = read_object(tmp_path / "out/decoded/compared/robustness.json")["models"]
    assert list(numbers) == ["before", "patched", "control", "unguided"]
    assert numbers["before"]["overturned"]["value"] > 0
    assert "guided decoding, of which the patch is made" in done.verdict


def test_nothing_found_is_said(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--pairs", str(home / "pairs.jsonl"), "--unseen", "bold", "--output", str(tmp_path / "out")]
    few = ["--steps", "1", "--proposals", "1", "--words", "w61", "--max-pairs", "3", "--resamples", "100"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["patch", "--model", str(home / "rm"), *flags, *few])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and "nothing to patch" in told
    assert str(home / "rm") in told, "the model stays as it is"


def test_a_recipe_with_patch_does_the_same(
    done: RunReport, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = {"threads": OPTIONS["threads"], "output": str(home / "out")}
    section = {name: value for name, value in OPTIONS.items() if name != "threads"}
    tree = {**rest, "patch": {**section, "model": "rm", "pairs": "pairs.jsonl"}}
    (home / "patch.yml").write_text(yaml.safe_dump(tree))
    again = run_recipe(home / "patch.yml")
    assert all(step.reason is None for step in again.steps), "beside the recipe, so the same files"
    assert again.verdict == done.verdict
    cli.cli.main(["check", str(home / "patch.yml")], standalone_mode=False)
    planned = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert planned == [step.name for step in done.steps]
    (home / "wrong.yml").write_text(
        yaml.safe_dump(tree | {"patch": tree["patch"] | {"pairs": "./none.jsonl"}})
    )
    assert "patch.pairs does not exist" in str(check_recipe(home / "wrong.yml")[0])
    (home / "mixed.yml").write_text(yaml.safe_dump(tree | {"upcycle": {}}))
    (fault,) = check_recipe(home / "mixed.yml")
    assert "upcycle" in fault.given and "a section patch" in fault.expected


def test_all_faults_at_once(home: Path, tmp_path: Path) -> None:
    with pytest.raises(Faults) as caught:
        patch(
            home / "rm", tmp_path / "none.jsonl", output=tmp_path / "out", unseen=["blod"], train_layers="7"
        )
    told = str(caught.value)
    assert "none.jsonl" in told and "'bold'" in told and "train_layers" in told
    with pytest.raises(OptionError, match="one edit at least"):
        patch(home / "rm", home / "pairs.jsonl", output=tmp_path / "out", unseen=[])
    tiny_dense().base_model.save_pretrained(tmp_path / "bare")  # type: ignore[operator, union-attr]
    with pytest.raises(OptionError, match="model has no reward head"):
        patch(tmp_path / "bare", home / "pairs.jsonl", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert json.loads((home / "rm/config.json").read_text())["model_type"] == "llama"

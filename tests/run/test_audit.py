"""An audit: what its steps are told, what its page says, and that nothing is done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from small_training import rows, write
from tiny_models import save_dense, tiny_dense

from moemerge import RunReport, audit, run_recipe
from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import MoemergeError
from moemerge.run import cli
from moemerge.run.check import check_recipe

SMALL = {"attack_pairs": 6, "steps": 1, "proposals": 2, "resamples": 100, "max_pairs": 16, "threads": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    for number, name in enumerate(("a", "b")):
        save_dense(folder / name, seed=number)
    write(folder / "pairs.jsonl", rows(30, 1))
    answers = [{"text": f"w{i} w5", "score": i} for i in range(4)]
    write(folder / "sets.jsonl", [{"prompt": f"w{i} ", "candidates": answers} for i in range(5)])
    return folder


@pytest.fixture(scope="module")
def done(home: Path) -> RunReport:
    models = {name: home / name for name in ("a", "b")}
    given = {"candidates": home / "sets.jsonl", "output": home / "out", **SMALL}
    return audit(models, home / "pairs.jsonl", **given)


def test_every_model_is_measured_and_attacked_on_the_same_pairs(done: RunReport) -> None:
    names = ["data", "evaluation", "attacks/a", "attacks/b", "attacks/compared"]
    assert [step.name for step in done.steps] == names
    options = {name: read_manifest(done.path / name)["options"] for name in names}
    pairs = str(done.path / "data/tests/test.jsonl.gz")
    assert options["evaluation"]["pairs"] == {"test": pairs} and options["attacks/b"]["pairs"] == pairs
    assert done.numbers["data"]["sizes"] == {"tests/test": 16, "candidates/answers": 5}
    probes = json.loads((done.path / "evaluation/report.json").read_text())["probes"]
    assert {"accuracy", "calibration", "best_of_n", "length", "damage"} <= probes.keys()


def test_the_page_says_what_falls_and_what_all_came_to(done: RunReport) -> None:
    page = done.page.with_suffix(".md").read_text()
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles[:2] == ["Summary", "Attacks"] and titles[-2:] == ["Steps", "Provenance"]
    for name in ("a", "b"):
        numbers = json.loads((done.path / "attacks" / name / "report.json").read_text())
        said = f"overturn {numbers['success_rate']:.1%}"
        assert said in done.verdict and f"| {name} | {numbers['attacked']} |" in page
    assert done.merged.name == "a" and len(done.rows()) == 2


def test_a_recipe_does_the_same_and_faults_are_told(
    done: RunReport, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {name: value for name, value in SMALL.items() if name != "threads"}
    section |= {"models": {"a": "a", "b": "b"}, "pairs": "pairs.jsonl", "candidates": "sets.jsonl"}
    tree = {"output": str(home / "out"), "threads": 1, "audit": section}
    (home / "audit.yml").write_text(yaml.safe_dump(tree))
    again = run_recipe(home / "audit.yml")
    assert all(step.reason is None for step in again.steps) and again.verdict == done.verdict
    cli.cli.main(["check", str(home / "audit.yml")], standalone_mode=False)
    told = capsys.readouterr().out
    assert "attacks/compared" in told and "Estimate, from timing one layer" in told
    cli.cli.main(["run", str(home / "audit.yml")], standalone_mode=False)
    told = capsys.readouterr().out
    assert "Report:" in told and "from_pretrained" not in told, "an audit makes no model to be loaded"
    (home / "wrong.yml").write_text(yaml.safe_dump(tree | {"audit": section | {"pairs": "./none.jsonl"}}))
    assert "audit.pairs does not exist" in str(check_recipe(home / "wrong.yml")[0])
    tiny_dense().base_model.save_pretrained(home / "bare")  # type: ignore[operator, union-attr]
    (home / "bare.yml").write_text(yaml.safe_dump(tree | {"audit": section | {"models": {"c": "bare"}}}))
    (fault,) = check_recipe(home / "bare.yml")
    assert fault.what == "audit.models.c has no reward head" and "LlamaModel" in fault.given
    with pytest.raises(MoemergeError, match="one model at least"):
        audit([], home / "pairs.jsonl", output=home / "no")

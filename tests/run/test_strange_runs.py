"""Runs whose steps others wrote, checksums and all: shown whole, or refused; nothing elsewhere is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from small_reports import REPORT

from moemerge.artifacts.manifest import own_digest, read_manifest
from moemerge.artifacts.stage import artifact
from moemerge.errors import ArtifactError, MoemergeError
from moemerge.options.evaluate import Evaluate
from moemerge.options.recipe import Recipe
from moemerge.reports import plotting
from moemerge.reports.figures import Line
from moemerge.run import pipeline, steps
from moemerge.run.steps import Step

SECRET = b"\x89PNG what is of no one's business"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of one step, an evaluation with a plot."""
    options = Evaluate(models={"dense": "owner/dense"}, output=tmp_path / "run" / "evaluate")
    with artifact("evaluate", options) as draft:
        report = {**REPORT, "plots_by_probe": {"accuracy": ["accuracy.png"]}}
        (draft.folder / "report.json").write_text(json.dumps(report))
        plotting.lines({"a": Line([1, 2], [3, 4])}, draft.folder / "accuracy.png", "accuracy", "x", "y")
        draft.results["models"] = {}
    (tmp_path / "secret.png").write_bytes(SECRET)
    monkeypatch.setattr(pipeline, "plan", lambda recipe: [Step("evaluate", "evaluate", options)])
    return tmp_path / "run"


def finish(run: Path) -> steps.RunReport:
    recipe = Recipe(output=run, model="owner/dense", fit={"method": "usage"})
    step = steps.StepReport("evaluate", "evaluate", None, 0.0, read_manifest(run / "evaluate"))
    return pipeline.finish(recipe, [step])


def edit(path: Path, change: Callable[[Any], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    if path.name == "manifest.json":
        values["sha256"] = own_digest(values)
    path.write_text(json.dumps(values))


def models(report: dict[str, Any]) -> dict[str, Any]:
    return dict(report["probes"]["accuracy"]["sets"]["test"]["all"]["models"])


STRANGE: dict[str, tuple[str, Callable[[Any], object]]] = {
    "no difference": ("report.json", lambda r: models(r)["moe"].pop("vs_baseline")),
    "no such probe": ("report.json", lambda r: r["probes"].update(gone=deepcopy(r["probes"]["accuracy"]))),
    "probes of nothing": ("report.json", lambda r: r["probes"].update(length={})),
    "no coverage": ("report.json", lambda r: r.update(probes={"gone": {}})),
    "no seconds": ("manifest.json", lambda m: m.pop("seconds")),
    "no hardware": ("manifest.json", lambda m: m.update(hardware=5)),
    "no results": ("manifest.json", lambda m: m.update(results={})),
    "input of nothing": ("manifest.json", lambda m: m["inputs"].update(x={"sha256": "0"})),
    "unequal curves": ("accuracy.plot.json", lambda p: p["panels"][0]["lines"]["a"].update(y=[1])),
    "no kind of plot": ("accuracy.plot.json", lambda p: p.update(kind="gone")),
}


def test_a_run_is_shown(run: Path) -> None:
    page = finish(run).page.read_text()
    assert "goes from 3 to 4" in page and "data:image/svg" in page


@pytest.mark.parametrize("name", STRANGE)
def test_what_no_stage_writes_is_refused(name: str, run: Path) -> None:
    file, change = STRANGE[name]
    edit(run / "evaluate" / file, change)
    with pytest.raises(MoemergeError, match="cannot be shown|unknown probe"):
        finish(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("deep", ["[" * 100_000, "5", "{"])
def test_a_plot_that_is_no_plot_is_refused(deep: str, run: Path) -> None:
    (run / "evaluate" / "accuracy.plot.json").write_text(deep)
    with pytest.raises(ArtifactError, match="cannot be shown"):
        finish(run)


@pytest.mark.parametrize(
    "named", ["../../secret.png", "{root}/secret.png", "gone.png", "..", "a/../accuracy.png"]
)
def test_a_page_shows_no_picture_elsewhere(named: str, run: Path) -> None:
    names = [named.format(root=run.parent), "accuracy.png"]
    edit(run / "evaluate" / "report.json", lambda r: r.update(plots_by_probe={"accuracy": names}))
    page = finish(run).page.read_text()
    assert "data:image/png" not in page and page.count("data:image/svg") == 1


def test_a_picture_that_is_a_link_is_refused(run: Path) -> None:
    picture = run / "evaluate" / "accuracy.png"
    picture.unlink()
    picture.symlink_to(run.parent / "secret.png")
    with pytest.raises(ArtifactError, match="cannot be shown") as caught:
        finish(run)
    assert "is a link" in caught.value.given

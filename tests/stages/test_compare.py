"""The stage compare: means, pairing by seed, t-intervals, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from small_reports import report_of

from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.manifest import read_manifest
from moemerge.artifacts.stage import artifact
from moemerge.errors import ArtifactError, OptionError
from moemerge.evaluation.report import FORMAT, read_comparison
from moemerge.evaluation.verdict import standing_over_seeds, verdict_over_seeds
from moemerge.options.compare import Compare
from moemerge.options.evaluate import Evaluate
from moemerge.reports import plotting
from moemerge.reports.statistics import t_test
from moemerge.run import cli
from moemerge.run.headlines import headline
from moemerge.stages.compare import _table, compare

ACCURACY = {  # by model and seed
    "dense": [0.70, 0.74, 0.69, 0.75],
    "control": [0.72, 0.75, 0.71, 0.76],
    "merged": [0.75, 0.76, 0.73, 0.77],
}
GOLD = {"dense": [1.0, 1.5, 0.5, 2.0], "control": [1.2, 1.9, 1.1, 2.2], "merged": [1.1, 2.5, 1.6, 2.0]}


def evaluation(
    folder: Path, seed: int, row: int, models: tuple[str, ...] = tuple(ACCURACY), **main: Any
) -> Path:
    """An evaluation as the stage leaves it, with the numbers of column `row`."""
    options = Evaluate(models={name: f"hub/{name}" for name in models}, output=folder, seed=seed)
    gold = {name: GOLD[name][row] for name in models}
    with artifact("evaluate", options) as draft:
        write_json(draft.folder / "report.json", report_of(models, "dense"))
        draft.results |= {
            "models": {name: cost(place, row) for place, name in enumerate(models, 1)},
            "main": {
                "accuracy": {"in_distribution": {name: ACCURACY[name][row] for name in models}},
                "best_of_n_gold": {"wide": {"n": 8, **gold}},
                **main,
            },
        }
    return folder


def cost(place: int, row: int) -> dict[str, float]:
    return {
        "parameters": 100 * place,
        "active_parameters": 90 * place,
        "flops_per_token": 160 * place,
        "tokens": 1000,
        "seconds": [2.0, 4.0, 5.0, 10.0][row] * place,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one recipe with four seeds, in a folder of their own, and what to overlook; read only."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    for row, seed in enumerate([7, 3, 11, 5]):
        run = folder / f"seed-{seed}"
        run.mkdir(parents=True)
        recipe = {"seed": seed, "output": str(run), "threads": seed, "train": {"epochs": 2}}
        write_json(run / "recipe.json", recipe)
        evaluation(run / "evaluate", seed, row)
    (folder / "notes.txt").write_text("not a run")
    (folder / "plain").mkdir()
    return folder


@pytest.fixture(scope="module")
def output(whole: Path) -> Path:
    """The comparison of those runs."""
    return compare(runs=[str(whole)], output=whole.parent / "output")


@pytest.fixture(scope="module")
def group(output: Path) -> dict[str, Any]:
    """The only group of that comparison."""
    (found,) = json.loads((output / "compare.json").read_text())["groups"]
    return found


@pytest.fixture
def study(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of those runs to change; comparisons of it draw empty figures, which is quicker."""
    for draw in ("dots", "panels"):
        monkeypatch.setattr(plotting, draw, lambda _, path, *__, **___: path.touch())
    return shutil.copytree(whole, tmp_path / "study")


def compared(output: Path, *runs: Path, **options: Any) -> dict[str, Any]:
    folder = compare(runs=[str(run) for run in runs], output=output, **options)
    return json.loads((folder / "compare.json").read_text())


def test_every_number_of_the_comparison_has_a_type(output: Path) -> None:
    written = json.loads((output / "compare.json").read_text())
    assert json.loads(json.dumps(read_comparison(output))) == written


def test_means_and_differences_are_paired_by_seed(group: dict[str, Any]) -> None:
    assert (group["seeds"], group["baseline"], group["title"]) == ([3, 5, 7, 11], "control", "")
    for what, values in {"accuracy in_distribution": ACCURACY, "best of n gold wide at n=8": GOLD}.items():
        for model in ("dense", "merged"):
            found = group["measures"][what][model]
            reference = stats.ttest_rel(values[model], values["control"]).confidence_interval(0.95)
            difference = np.mean(values[model]) - np.mean(values["control"])
            assert found["mean"] == pytest.approx(np.mean(values[model]))
            assert found["sd"] == pytest.approx(np.std(values[model], ddof=1))
            assert found["difference"] == pytest.approx(difference)
            assert found["interval"] == pytest.approx([reference.low, reference.high])
        assert "difference" not in group["measures"][what]["control"]
    by_seed = group["measures"]["accuracy in_distribution"]["merged"]["by_seed"]
    assert by_seed == {"7": 0.75, "3": 0.76, "11": 0.73, "5": 0.77}


def test_seeds_may_differ_in_how_many_candidates_they_have(tmp_path: Path) -> None:
    """Of debates held out by seed, one has 9 arguments and another 12."""
    for row, n in enumerate([12, 9, 9]):
        gold = {"wide": {"n": n, **{name: values[row] for name, values in GOLD.items()}}}
        evaluation(tmp_path / str(row), row, row, best_of_n_gold=gold)
    (found,) = compared(tmp_path / "output", *(tmp_path / str(row) for row in range(3)))["groups"]
    merged = found["measures"]["best of n gold wide at n=9 to 12"]["merged"]
    assert merged["difference"] == pytest.approx(np.mean(GOLD["merged"][:3]) - np.mean(GOLD["control"][:3]))


def test_pairing_takes_out_what_the_seeds_have_in_common(group: dict[str, Any]) -> None:
    """Shuffling a model's seeds keeps its mean and widens the interval."""
    low, high = group["measures"]["accuracy in_distribution"]["dense"]["interval"]
    unpaired = stats.ttest_ind(ACCURACY["dense"], ACCURACY["control"]).confidence_interval(0.95)
    assert high - low < (unpaired.high - unpaired.low) / 3


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_t_interval_is_scipys(confidence: float) -> None:
    values = [0.3, -0.1, 0.25, 0.8, 0.0]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    interval, _ = t_test(values, confidence)
    assert interval == pytest.approx((expected.low, expected.high))
    assert t_test([0.0, 0.0], confidence)[0] == (0, 0)
    assert t_test([0.25], confidence) is None


def test_equal_differences_at_every_seed_are_no_proof() -> None:
    """Two of 146 pairs at each of three seeds: Student's t would call that certain."""
    equal = [88 / 146 - 86 / 146, 80 / 146 - 78 / 146, 76 / 146 - 74 / 146]
    assert np.std(equal) < 1e-15
    assert t_test(equal, 0.95) is None
    cost = {"parameters": 1.0}
    merged = {"mean": 0.5, "difference": equal[0], "interval": None, "p": None}
    group = {
        "title": "",
        "seeds": [1, 2, 3],
        "baseline": "control",
        "measures": {"accuracy test": {"control": {"mean": 0.49}, "merged": merged}},
        "costs": {"control": cost, "merged": cost},
    }
    table = _table(group, 0.95)
    assert table.rows[1][:3] == ["merged", "0.5000", "+0.0137"] and "its spread is not known" in table.note
    assert "Nothing to compare" in verdict_over_seeds(group, "merged", 0.95)


def test_coverage_of_the_interval() -> None:
    """Of intervals over three seeds, 90 % hold the true mean."""
    draws = np.random.default_rng(0).normal(0.02, 0.01, size=(2000, 3))
    inside = [low < 0.02 < high for low, high in (t_test(row.tolist(), 0.9)[0] for row in draws)]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)  # three standard errors


def test_costs_and_the_table(study: Path, tmp_path: Path) -> None:
    (group,) = compared(tmp_path / "out", study, baseline="dense")["groups"]
    costs = group["costs"]["control"]
    assert (costs["parameters"], costs["active_parameters"], costs["flops_per_token"]) == (200, 180, 320)
    assert costs["tokens_per_second"] == pytest.approx(np.mean([250, 125, 100, 50]))
    rows = (tmp_path / "out/compare.md").read_text().splitlines()
    assert rows[0] == "### 3 models over 4 seeds"
    cells = {row.split(" | ")[0].lstrip("| "): row.strip("| ").split(" | ") for row in rows if "|" in row}
    assert cells["model"][1:3] == ["accuracy in_distribution", "minus dense"]
    assert cells["model"][-4:] == ["parameters", "active parameters", "FLOPs per token", "tokens per second"]
    assert cells["dense"][1:3] == ["0.7200", "baseline"] and cells["dense"][-4:] == [
        "100",
        "90",
        "160",
        "262",
    ]
    assert cells["merged"][1] == "0.7525" and cells["merged"][2].startswith("+0.0325 (+0.0")
    assert "Fewer than" not in rows[-1]


def test_files_and_manifest(whole: Path, output: Path) -> None:
    report = json.loads((output / "compare.json").read_text())
    assert report["plots"] == ["compare.png", "cost.png"]
    assert all((output / plot).stat().st_size > 1000 for plot in report["plots"])
    manifest = read_manifest(output)
    assert manifest["options"]["runs"] == [str(whole / f"seed-{seed}/evaluate") for seed in (11, 3, 5, 7)]
    assert len(manifest["inputs"]["runs"]) == 4
    assert headline(manifest) == "3 models, 4 seeds"


def test_one_seed_has_no_interval_and_few_say_so(study: Path, tmp_path: Path) -> None:
    report = compared(tmp_path / "one", study / "seed-3")
    found = report["groups"][0]["measures"]["accuracy in_distribution"]["merged"]
    assert found["interval"] is None and found["sd"] is None and found["difference"] == pytest.approx(0.01)
    assert "Fewer than 3 seeds" in (tmp_path / "one/compare.md").read_text()
    assert "takes two seeds" in verdict_over_seeds(report["groups"][0], "merged", 0.95)
    compared(tmp_path / "two", study / "seed-3", study / "seed-5/evaluate")
    assert "Fewer than 3 seeds" in (tmp_path / "two/compare.md").read_text()


def test_verdict_over_seeds_pays_for_its_comparisons(group: dict[str, Any], output: Path) -> None:
    """The accuracy's interval is clear by itself; of two comparisons, it is not at the 0.05 level."""
    found = group["measures"]["accuracy in_distribution"]["merged"]
    reference = stats.ttest_rel(ACCURACY["merged"], ACCURACY["control"]).pvalue
    assert found["interval"][0] > 0 and found["p"] == pytest.approx(reference) and 0.025 < reference < 0.05
    text = verdict_over_seeds(group, "merged", 0.95)
    assert text.startswith(
        "Did merging help here? merged against control, 4 seeds: no clear difference (at level 0.05 after "
        "Holm's correction for 2 comparisons). accuracy in_distribution: no clear difference (+0.018, "
    )
    assert f"p {2 * reference:.2g})" in text and "gold wide at n=8: no clear difference (+0.2" in text
    assert "accuracy in_distribution: helped (" in verdict_over_seeds(group, "merged", 0.9)
    assert "accuracy in_distribution: made it worse (" in verdict_over_seeds(group, "dense", 0.95)
    assert "Nothing to compare" in verdict_over_seeds(group, "control", 0.95)
    words = "Against control: dense, merged: no clear difference. Judged at level 0.05 after Holm"
    assert words in standing_over_seeds(group, 0.95) and words in (output / "compare.md").read_text()
    assert words in (output / "report.html").read_text()
    assert "dense: worse in accuracy in_distribution. merged: no" in standing_over_seeds(group, 0.9)


def test_t_test_is_scipys() -> None:
    values = [0.3, -0.1, 0.25, 0.8, 0.0]
    assert t_test(values, 0.95)[1] == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    assert t_test([0.25], 0.95) is None and t_test([0.25, 0.25], 0.95) is None
    assert t_test([0.0, 0.0], 0.95)[1] == 1


def test_an_evaluation_of_an_older_version_is_refused(study: Path, tmp_path: Path) -> None:
    path = study / "seed-3/evaluate/report.json"
    path.write_text('{"baseline": "dense"}')
    with pytest.raises(ArtifactError, match="cannot be shown by this version") as caught:
        compared(tmp_path / "out", study)
    assert caught.value.given == "format without a number" and str(FORMAT) in caught.value.expected
    assert "evaluate again" in caught.value.fix and not (tmp_path / "out").exists()


def test_recipes_that_differ_in_more_than_seeds_are_compared_apart(study: Path, tmp_path: Path) -> None:
    for seed in (7, 11):
        path = study / f"seed-{seed}/recipe.json"
        path.write_text(path.read_text().replace('"epochs": 2', '"epochs": 3'))
    groups = compared(tmp_path / "out", study)["groups"]
    titles = {group["title"]: group["seeds"] for group in groups}
    assert titles == {"Recipe 1: train.epochs 3": [7, 11], "Recipe 2: train.epochs 2": [3, 5]}
    first = groups[0]["measures"]["accuracy in_distribution"]["merged"]
    assert first["by_seed"] == {"7": 0.75, "11": 0.73}
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_evaluations_outside_runs_and_any_depth_of_main_numbers(study: Path, tmp_path: Path) -> None:
    deep = {"biases": {"length": {"set": {"dense": 0.5, "merged": 0.25, "control": None}}, "kind": "slope"}}
    folders = [evaluation(tmp_path / f"e{seed}", seed, seed, **deep) for seed in (0, 1)]
    (group,) = compared(tmp_path / "out", *folders)["groups"]
    assert group["measures"]["biases length set"]["merged"]["mean"] == 0.25
    assert set(group["measures"]["biases length set"]) == {"dense", "merged"}, "no number, no cell"
    assert "difference" not in group["measures"]["biases length set"]["merged"], "the baseline has none"


def test_a_model_without_a_seed_is_refused_by_name(study: Path, tmp_path: Path) -> None:
    evaluation(study / "seed-13/evaluate", 13, 0, models=("dense", "control"))
    (study / "seed-13/recipe.json").write_text((study / "seed-3/recipe.json").read_text())
    with pytest.raises(ArtifactError, match="merged is not there for every seed") as caught:
        compared(tmp_path / "out", study)
    assert caught.value.given == f"missing for seed 13 in {study}/seed-13/evaluate"
    assert not (tmp_path / "out").exists()


def test_a_measure_without_a_seed_is_refused_by_name(tmp_path: Path) -> None:
    more = {"ece": {"test": {"dense": 0.1, "merged": 0.2, "control": 0.3}}}
    folders = [evaluation(tmp_path / "e0", 0, 0, **more), evaluation(tmp_path / "e1", 1, 1)]
    with pytest.raises(ArtifactError, match="ece test of control is not there") as caught:
        compared(tmp_path / "out", *folders)
    assert "missing for seed 1 in" in caught.value.given


def test_faults(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="seed 5 occurs twice"):
        other = evaluation(tmp_path / "again/evaluate", 5, 0)
        (tmp_path / "again/recipe.json").write_text((study / "seed-5/recipe.json").read_text())
        compared(tmp_path / "out", study, other)
    with pytest.raises(OptionError, match="did you mean 'control'"):
        compared(tmp_path / "out", study, baseline="contrl")
    with pytest.raises(ArtifactError, match="no evaluation in"):
        compared(tmp_path / "out", study / "plain")
    with pytest.raises(ArtifactError, match="no evaluation in"):
        compared(tmp_path / "out", tmp_path / "nowhere")


def test_a_folder_stands_for_its_runs_and_only_once(study: Path) -> None:
    whole = Compare(runs=[str(study)], output=Path("out")).runs
    assert len(whole) == 4
    assert (
        Compare(runs=[str(study / "seed-3"), str(study)], output=Path("out"))
        .runs[0]
        .endswith("seed-3/evaluate")
    )
    assert len(Compare(runs=[str(study / "seed-3/evaluate"), str(study)], output=Path("out")).runs) == 4


def test_the_command_line_takes_runs_without_a_flag(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(study / "seed-3"), str(study / "seed-5")]
    for arguments in (["compare", *runs], ["compare", "--runs", *runs]):
        output = tmp_path / f"out{len(arguments)}"
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--output", str(output)])
        assert ended.value.code == 0 and "3 models, 2 seeds" in capsys.readouterr().out
    tables = [path.read_text() for path in tmp_path.glob("out*/compare.md")]
    assert len(tables) == 2 and tables[0] == tables[1]
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", str(study / "plain"), "--output", str(tmp_path / "none")])
    assert ended.value.code == 2 and "no evaluation in" in capsys.readouterr().err

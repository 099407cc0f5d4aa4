"""Recipes: every fault at once; runs: skip what is valid, rerun what changed, go on after a kill."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
from small_reports import REPORT

from moemerge.artifacts import progress, staleness
from moemerge.artifacts.checksums import fingerprint
from moemerge.artifacts.environment import package_version
from moemerge.artifacts.lock import hold, lock_of
from moemerge.artifacts.manifest import read_manifest
from moemerge.artifacts.stage import Draft, Stage, stage
from moemerge.errors import ArtifactError, Faults, OptionError
from moemerge.evaluation import main_table as summary
from moemerge.evaluation import report as report_file
from moemerge.evaluation.report import FORMAT
from moemerge.options.base import Run, input_fields
from moemerge.options.recipe import Recipe
from moemerge.options.synthetic import Synthetic
from moemerge.run import pipeline, recipe_file, steps
from moemerge.run.check import check_recipe, load_recipe
from moemerge.run.headlines import headline
from moemerge.run.page import write_run_page
from moemerge.run.plan import plan
from moemerge.run.templates import templates, write_template
from moemerge.stages import OPTIONS
from moemerge.stages.synthetic import write_world

TINY_WORLD = {
    "train_pairs": 10, "validation_pairs": 10, "test_pairs": 10, "own_pairs": 10, "prompts": 2,
    "candidates": 2, "hidden_size": 8, "num_layers": 1,
}  # fmt: skip


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


class FakeStages:
    """Stages that write a digest of their options and inputs, and count their calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.kill_in = ""

    def get(self, name: str) -> Stage:
        return stage(name, OPTIONS.get(name))(self.body)

    def body(self, options: Run, draft: Draft) -> None:
        self.calls.append(options.output.name)
        settings = options.model_dump_json(exclude={"output", "overwrite"})
        inputs = json.dumps({k: _contents(v) for k, v in input_fields(options).items()})
        digest = hashlib.sha256((settings + inputs).encode()).hexdigest()
        (draft.folder / "digest").write_text(digest)
        if options.output.name == self.kill_in:
            raise Killed
        if options.output.name == "data":
            for name in ("train", "validation", "tests/test"):
                path = draft.folder / f"{name}.jsonl.gz"
                path.parent.mkdir(exist_ok=True)
                path.write_text(digest + name)
        if options.output.name == "evaluate":
            (draft.folder / "report.json").write_text(json.dumps(REPORT))
        draft.results["number"] = 1


def _contents(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _contents(one) for name, one in value.items()}
    return fingerprint(Path(value))["sha256"] if Path(value).exists() else value


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fake = FakeStages()
    monkeypatch.setattr(steps, "STAGES", fake)
    monkeypatch.setattr(steps, "step_line", lambda step: step.name)  # their results are none of a stage's
    monkeypatch.setattr(pipeline, "_page", lambda run, steps, learned: run / "report.html")
    return fake


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model folder, data and a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForSequenceClassification"],
        "num_hidden_layers": 2,
    }
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "pairs.jsonl").write_text("{}")
    write(
        tmp_path,
        model="model",
        data={"train": "pairs.jsonl", "test_share": 0.2},
        control={},
        also_merge=["usage"],
    )
    return tmp_path


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "recipe.yml"
    path.write_text(json.dumps({"output": str(folder / "out"), **sections}))
    return path


STEPS = [
    "data",
    "control",
    "upcycle",
    "train",
    "route",
    "fit-usage",
    "merge-usage",
    "fit-learned",
    "merge-learned",
]
STEPS += ["evaluate", "publish"]


def digests(output: Path) -> dict[str, str]:
    return {p.parent.name: p.read_text() for p in output.glob("*/digest")}


# Runs


def test_runs_in_order_and_skips_what_is_valid(folder: Path, stages: FakeStages) -> None:
    first = pipeline.run_recipe("recipe.yml")
    assert stages.calls == STEPS
    assert [step.name for step in first.steps] == STEPS
    assert all(step.reason == "not made yet" for step in first.steps)
    stages.calls.clear()
    second = pipeline.run_recipe("recipe.yml")
    assert stages.calls == []
    assert all(step.reason is None for step in second.steps)
    assert second.overview == first.overview and second.merged == folder / "out/merge-learned"


def test_changed_option_reruns_from_there(folder: Path, stages: FakeStages) -> None:
    pipeline.run_recipe("recipe.yml")
    stages.calls.clear()
    report = pipeline.run_recipe("recipe.yml", ["fit.learning_rate=0.01", "fit.method=learned"])
    assert stages.calls == ["fit-usage", "merge-usage", "fit-learned", "merge-learned", "evaluate", "publish"]
    assert {s.name: s.reason for s in report.steps}["fit-usage"] == "changed: learning_rate"
    assert {s.name: s.reason for s in report.steps}["merge-usage"] == "changed input: coefficients"


def test_changed_data_rerun_everything(folder: Path, stages: FakeStages) -> None:
    pipeline.run_recipe("recipe.yml")
    stages.calls.clear()
    (folder / "pairs.jsonl").write_text('{"changed": 1}')
    pipeline.run_recipe("recipe.yml")
    assert stages.calls == [name for name in STEPS if name != "upcycle"]


def test_step_with_damaged_output_reruns(folder: Path, stages: FakeStages) -> None:
    pipeline.run_recipe("recipe.yml")
    stages.calls.clear()
    (folder / "out/route/digest").unlink()
    pipeline.run_recipe("recipe.yml")
    assert stages.calls == ["route"]  # the same result again, so that nothing after it is stale


@pytest.mark.parametrize("killed_in", ["data", "train", "evaluate"])
def test_killed_run_goes_on_and_ends_like_an_uninterrupted_one(
    folder: Path, stages: FakeStages, killed_in: str
) -> None:
    pipeline.run_recipe("recipe.yml")
    whole = digests(folder / "out")
    write(folder, **{**json.loads((folder / "recipe.yml").read_text()), "output": str(folder / "again")})
    stages.calls.clear()
    stages.kill_in = killed_in
    with pytest.raises(Killed):
        pipeline.run_recipe("recipe.yml")
    leftover = folder / "again" / f".{killed_in}.abcdefgh.tmp"
    leftover.mkdir()
    stages.kill_in = ""
    pipeline.run_recipe("recipe.yml")
    assert sorted(stages.calls) == sorted([*STEPS, killed_in])
    assert not leftover.exists()
    assert digests(folder / "again").keys() == whole.keys() == set(STEPS)
    assert set(STEPS) == {p.name for p in (folder / "again").iterdir() if p.is_dir()}


def test_second_run_in_the_same_folder_is_refused(folder: Path, stages: FakeStages) -> None:
    with steps.alone(folder / "out"), pytest.raises(ArtifactError, match="another run"):
        pipeline.run_recipe("recipe.yml")


def test_a_folder_that_no_step_wrote_is_not_replaced(folder: Path, stages: FakeStages) -> None:
    """Such as the user's own data, put where a step of an earlier run was."""
    pipeline.run_recipe("recipe.yml")
    stages.calls.clear()
    (folder / "out/data").rename(folder / "elsewhere")
    (folder / "out/data").mkdir()
    (folder / "out/data/mine").write_text("precious")
    with pytest.raises(ArtifactError, match="no earlier result"):
        pipeline.run_recipe("recipe.yml")
    assert stages.calls == [] and (folder / "out/data/mine").read_text() == "precious"


def test_a_step_whose_files_changed_is_run_again(folder: Path, stages: FakeStages) -> None:
    pipeline.run_recipe("recipe.yml")
    stages.calls.clear()
    (folder / "out/route/digest").write_text("other")
    pipeline.run_recipe("recipe.yml")
    assert stages.calls == ["route"]


@pytest.mark.parametrize("more", [(), ("train.epochs=7",)])
def test_a_file_of_the_users_in_a_step_is_kept(
    folder: Path, stages: FakeStages, more: tuple[str, ...]
) -> None:
    pipeline.run_recipe("recipe.yml")
    stages.calls.clear()
    note = folder / "out/train/notes.txt"
    note.write_text("precious")
    with pytest.raises(ArtifactError, match="no stage put there") as caught:
        pipeline.run_recipe("recipe.yml", more)
    assert "notes.txt" in caught.value.given and str(note.parent) in caught.value.what
    assert stages.calls == [] and note.read_text() == "precious"
    note.unlink()
    pipeline.run_recipe("recipe.yml")
    assert stages.calls == []


def test_the_spelling_of_a_path_makes_nothing_stale(folder: Path, stages: FakeStages) -> None:
    pipeline.run_recipe("recipe.yml", output="out")
    stages.calls.clear()
    pipeline.run_recipe(folder / "recipe.yml", [f"model={folder}/model"], output=folder / "out")
    assert stages.calls == []


def test_another_version_of_moemerge_makes_all_again_and_others_are_told_of(
    folder: Path, stages: FakeStages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.run_recipe("recipe.yml")
    stages.calls.clear()
    now = staleness.versions()
    monkeypatch.setattr(staleness, "versions", lambda *_: now | {"torch": "99"})
    pipeline.run_recipe("recipe.yml")
    (line,) = [record.message for record in caplog.records if "other versions" in record.message]
    assert stages.calls == [] and line.endswith(f"torch {now['torch']} (now 99)")
    monkeypatch.setattr(staleness, "versions", lambda *_: now | {"moemerge": "99"})
    again = pipeline.run_recipe("recipe.yml")
    assert stages.calls == STEPS and "this is 99" in str(again.steps[0].reason)


def test_data_that_change_with_size_and_time_kept_are_read(folder: Path, stages: FakeStages) -> None:
    pipeline.run_recipe("recipe.yml")
    stages.calls.clear()
    pairs = folder / "pairs.jsonl"
    before = pairs.stat()
    pairs.write_text("[]")
    os.utime(pairs, ns=(before.st_atime_ns, before.st_mtime_ns))
    pipeline.run_recipe("recipe.yml")
    assert stages.calls[0] == "data"


def test_the_page_is_written_whenever_a_step_ran(
    folder: Path, stages: FakeStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write_page(run: Path, steps: Any, learned: str) -> Path:
        written.append(learned)
        (run / "report.html").write_text("")
        os.utime(run / "report.html", (2e9, 2e9))  # a clock that was wrong
        return run / "report.html"

    monkeypatch.setattr(pipeline, "_page", write_page)
    for more, count in (((), 1), ((), 1), (("evaluate.confidence=0.9",), 2)):
        pipeline.run_recipe("recipe.yml", more)
        assert len(written) == count


def test_a_run_is_refused_while_a_stage_makes_one_of_its_steps(folder: Path, stages: FakeStages) -> None:
    pipeline.run_recipe("recipe.yml")
    (folder / "out/.route.abcdefgh.tmp").mkdir()
    route = folder / "out/route"
    with hold(lock_of(route), route), pytest.raises(ArtifactError, match="another run"):
        pipeline.run_recipe("recipe.yml")
    assert (folder / "out/.route.abcdefgh.tmp").is_dir()


def test_no_secret_gets_into_the_copy_of_the_recipe(folder: Path, stages: FakeStages) -> None:
    write(folder, **GOOD, publish={"base_model": "https://me:pass@hub/x"})
    pipeline.run_recipe("recipe.yml")
    written = [path.read_text() for path in (folder / "out").rglob("*.json")]
    assert len(written) > 3 and not [text for text in written if "pass@" in text]


def test_summary_and_recipe_are_written(folder: Path, stages: FakeStages) -> None:
    report = pipeline.run_recipe("recipe.yml")
    text = (folder / "out/summary.md").read_text()
    assert report.overview in text and text.rstrip().endswith(report.verdict)
    assert Recipe(**json.loads((folder / "out/recipe.json").read_text())).also_merge == ["usage"]


def test_python_recipe_runs_like_a_file(folder: Path, stages: FakeStages) -> None:
    recipe = load_recipe("recipe.yml")
    pipeline.run_recipe(recipe)
    stages.calls.clear()
    pipeline.run_recipe("recipe.yml")
    assert stages.calls == []


def test_faulty_python_recipe_is_refused(folder: Path, stages: FakeStages) -> None:
    with pytest.raises(OptionError, match="no model"):
        pipeline.run_recipe(Recipe(output=folder / "out"))
    assert stages.calls == []


# Plans


def test_plan_connects_the_steps(folder: Path) -> None:
    write(
        folder,
        model="model",
        data={"train": "pairs.jsonl", "test_share": 0.2},
        base={},
        control={"epochs": 2},
        seed=5,
    )
    steps = {step.name: step.options for step in plan(load_recipe("recipe.yml"))}
    out = str(folder / "out")
    assert steps["base"].model == "model"
    assert steps["control"].model == steps["upcycle"].model == f"{out}/base"
    assert steps["control"].epochs == 2 and steps["train"].epochs == 1
    assert steps["train"].model == f"{out}/upcycle" and steps["route"].model == f"{out}/train"
    assert steps["merge-learned"].coefficients == f"{out}/fit-learned"
    assert steps["evaluate"].models["dense"] == f"{out}/base" and steps["evaluate"].baseline == "control"
    assert steps["evaluate"].pairs == {"test": f"{out}/data/tests/test.jsonl.gz"}
    assert (
        steps["publish"].model == f"{out}/merge-learned" and steps["publish"].evaluation == f"{out}/evaluate"
    )
    assert {options.seed for options in steps.values()} == {5}


def test_shared_weight_is_learned_only_by_the_method_that_learns(folder: Path) -> None:
    write(folder, **GOOD, also_merge=["usage"], fit={"shared_weight": "learned"})
    steps = {step.name: step.options for step in plan(load_recipe("recipe.yml"))}
    assert (steps["fit-usage"].shared_weight, steps["fit-learned"].shared_weight) == (0.5, "learned")


def test_synthetic_world_feeds_the_data_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = {s.name: s.options for s in plan(load_recipe(write(tmp_path, synthetic={})))}
    world = f"{tmp_path}/out/synthetic"
    assert (
        steps["data"].train == f"{world}/data/train.jsonl.gz" and steps["data"].tokenizer == f"{world}/model"
    )
    assert steps["data"].candidates == {"wide": f"{world}/data/candidates/wide.jsonl.gz"}
    assert steps["upcycle"].model == f"{world}/model"
    assert list(steps["evaluate"].pairs) == ["in_distribution", "out_of_distribution"]


def test_fitting_pairs_of_their_own_leave_validation_for_stopping(folder: Path) -> None:
    data = {"train": "pairs.jsonl", "fit": "pairs.jsonl", "test_share": 0.2}
    write(folder, model="model", data=data)
    fit = {step.name: step.options for step in plan(load_recipe("recipe.yml"))}["fit-learned"]
    assert fit.pairs.endswith("data/fit.jsonl.gz") and fit.validation.endswith("data/validation.jsonl.gz")
    write(folder, model="model", data={**data, "fit": None})
    fit = {step.name: step.options for step in plan(load_recipe("recipe.yml"))}["fit-learned"]
    assert fit.pairs.endswith("data/validation.jsonl.gz") and fit.validation is None


@pytest.mark.parametrize("name", templates())
def test_shipped_recipes_are_sound(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_template(tmp_path / "mine.yml", name)
    (tmp_path / "pairs.jsonl.gz").touch()
    assert check_recipe(path) == []
    assert plan(load_recipe(path))[-1].name in ("publish", "compare", "choice", "card")
    text = path.read_text()
    keys = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    bare = [line for line in keys if ":" in line and not line.endswith(":") and "#" not in line]
    assert bare == [], "every key has a comment"


def test_template_is_not_written_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("precious")
    with pytest.raises(OptionError, match="file exists already"):
        write_template(tmp_path / "mine.yml")
    assert (tmp_path / "mine.yml").read_text() == "precious"
    with pytest.raises(OptionError, match="did you mean 'quickstart'"):
        write_template(tmp_path / "other.yml", "quikstart")


# Faults


def faults(folder: Path, overrides: tuple[str, ...] = (), **sections: Any) -> list[str]:
    found = check_recipe(write(folder, **sections), overrides)
    assert all(fault.given and fault.expected and fault.fix for fault in found)
    return sorted(fault.what for fault in found)


GOOD: dict[str, Any] = {"model": "model", "data": {"train": "pairs.jsonl", "test_share": 0.2}}


def test_all_faults_at_once(folder: Path) -> None:
    found = check_recipe(
        write(
            folder,
            model="./nowhere",
            modle="x",
            seed="many",
            data={"train": "gone.jsonl", "test_share": 0.2, "validation_share": 0},
            train={"search": {"learning_rate": [1e-5, 3e-5]}},
            fit={"method": "lerned"},
            publish={"push": True},
        )
    )
    texts = {fault.what: fault.fix for fault in found}
    assert texts == {
        "unknown option recipe.modle": "did you mean 'model'?",
        "bad option recipe.seed": "correct recipe.seed",
        "model does not exist": "correct model, or override it: --set model=PATH",
        "data.train does not exist": "correct data.train, or override it: --set data.train=PATH",
        "train.search needs validation pairs": "set data.validation or data.validation_share",
        "unknown fit.method": "did you mean 'learned'?",
        "push without a repository": "set publish.repo: OWNER/NAME",
    }
    with pytest.raises(Faults, match="7 fault"):
        load_recipe(folder / "recipe.yml")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"synthetic": {}}, ["two models", "two sources of data"]),
        ({"model": None}, ["no model"]),
        ({"data": None}, ["no training pairs"]),
        ({"train": {"sharded": True}}, ["train.sharded needs several processes"]),
        ({"also_merge": ["usage", "usage"]}, ["a coefficient method is named twice"]),
        ({"also_merge": ["learned"]}, ["a coefficient method is named twice"]),
        ({"evaluate": {"probes": ["lenght"]}}, ["unknown evaluate.probes"]),
        ({"evaluate": {"baseline": "control"}}, ["unknown evaluate.baseline"]),
        ({"data": {"train": "pairs.jsonl"}}, ["nothing to evaluate on"]),
        (
            {"data": {"train": "pairs.jsonl", "test_share": 0.1, "validation_share": 0}},
            ["method learned needs fitting pairs"],
        ),
        ({"upcycle": {"layers": "first:3"}}, ["upcycle.layers: layers cannot be picked"]),
        ({"train": {"train_layers": "a-b"}}, ["train.train_layers: layers cannot be picked"]),
        ({"train": {"search": {"epochs": [1, 2]}, "max_steps": 3}}, ["bad option recipe.train.search"]),
        ({"train": {"search": {"epochs": []}}}, ["bad option recipe.train.search"]),
        ({"control": {"top1_warmup": 0.1}}, ["control trains a dense model, which has no experts to steer"]),
        (
            {"train": {"shared_dropout": 0.1}, "upcycle": {"shared_expert": False}},
            ["train.shared_dropout needs a shared expert"],
        ),
        (
            {"fit": {"method": "usage", "shared_weight": "learned"}},
            ["shared_weight learned contradicts fit.method"],
        ),
        (
            {"upcycle": {"num_routed_experts": 2}},
            ["recipe.upcycle: num_experts_per_tok is larger than num_routed_experts"],
        ),
        ({"data": 3}, ["bad option recipe.data"]),
        ({"fit": {"shared_weight": 2.0}}, ["recipe.fit: shared_weight is outside [0, 1]"]),
        ({"output": "model"}, ["output is not the folder of a run"]),
    ],
)
def test_contradictions(folder: Path, sections: dict[str, Any], expected: list[str]) -> None:
    assert faults(folder, **{**GOOD, **sections}) == expected


def test_faults_of_the_model_are_found_without_its_weights(folder: Path) -> None:
    (folder / "model/config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"]})
    )
    assert faults(folder, **GOOD, upcycle={"gate": "prompt"}) == [
        "gate prompt needs a causal model",
        "model has no reward head",
    ]
    assert faults(folder, **GOOD, base={}) == []
    (folder / "model/config.json").unlink()
    assert faults(folder, **GOOD) == [f"the model's config cannot be read: {folder / 'model'}"]


def test_sound_recipe_with_hub_names(folder: Path) -> None:
    assert (
        faults(
            folder,
            model="owner/name",
            data={"train": "owner/pairs:train", "tests": {"t": "owner/pairs:test"}},
        )
        == []
    )


# Reading


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("output: a\noutput: b\n", "line 2"),
        ("output: a\n 1: b\n", "line 2"),
        ("fit: {method: [}\n", "line 1"),
        ("1: b\n", "key '1' is no text"),
        ("- a\n", "list"),
        ("", "NoneType"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ],
)
def test_broken_yaml_is_refused_with_its_place(tmp_path: Path, text: str, given: str) -> None:
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(OptionError) as caught:
        load_recipe(tmp_path / "r.yml")
    assert given in caught.value.given


def test_huge_and_missing_recipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text("a: " + "b" * recipe_file.MAX_BYTES)
    with pytest.raises(OptionError, match="at most"):
        load_recipe(tmp_path / "r.yml")
    laughs = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 10))
    (tmp_path / "r.yml").write_text("l0: &l0 [lol]\n" + laughs)
    with pytest.raises(OptionError, match="values"):
        load_recipe(tmp_path / "r.yml")
    with pytest.raises(OptionError, match="No such file"):
        load_recipe(tmp_path / "gone.yml")


def test_anchors_can_share_a_section(folder: Path) -> None:
    text = f"output: {folder}/out\nmodel: model\ndata: {{train: pairs.jsonl, test_share: 0.2}}\n"
    (folder / "r.yml").write_text(
        text + "train: &t {epochs: 2, batch_size: 4}\ncontrol: {<<: *t, epochs: 3}\n"
    )
    recipe = load_recipe(folder / "r.yml")
    assert recipe.control is not None and recipe.train.batch_size == recipe.control.batch_size == 4
    assert (recipe.train.epochs, recipe.control.epochs) == (2, 3)


def test_overrides(folder: Path) -> None:
    sets = [
        "train.learning_rate=1e-4",
        "control.search.learning_rate=[1e-5, 3e-5]",
        "data.tests.more=pairs.jsonl",
    ]
    recipe = load_recipe("recipe.yml", [*sets, "fit.shared_weight=match", "control.patience=null"])
    assert recipe.train.learning_rate == 1e-4 and recipe.fit.shared_weight == "match"
    assert recipe.control is not None and recipe.control.search == {"learning_rate": [1e-5, 3e-5]}
    assert recipe.data is not None and list(recipe.data.tests) == ["more"] and recipe.control.patience is None
    assert load_recipe("recipe.yml", output="elsewhere").output == Path("elsewhere")
    for broken in ("train", "=3", "train..epochs=3", "output.deep=1", "train.epochs=[1"):
        with pytest.raises(OptionError, match="override cannot be read"):
            load_recipe("recipe.yml", [broken])


def test_inputs_lie_beside_the_recipe_or_in_the_working_directory(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/pairs.jsonl").write_text("{}")
    path = write(folder / "sub", **{**GOOD, "output": "out"})
    recipe = load_recipe(path)
    assert recipe.data is not None and recipe.data.train == str(folder / "sub/pairs.jsonl")
    assert recipe.model == "model" and recipe.output == Path("out")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_in_every_path(folder: Path, home: Path) -> None:
    home.mkdir()
    for name in ("model", "pairs.jsonl"):
        (folder / name).rename(home / name)
    data = {"train": "~/pairs.jsonl", "tests": {"b": "~/pairs.jsonl"}, "candidates": ["~/pairs.jsonl"]}
    assert faults(folder, output="~/out", model="~/model", data=data | {"candidates": {}}) == []
    recipe = load_recipe(write(folder, output="~/out", model="~/model", data=data))
    assert recipe.output == home / "out" and recipe.model == str(home / "model") and recipe.data
    assert {*recipe.data.tests.values(), *recipe.data.candidates.values(), recipe.data.train} == {
        str(home / "pairs.jsonl")
    }
    assert load_recipe("recipe.yml", output="~/other").output == home / "other"
    merge = OPTIONS.get("merge")(models=["~/a", "~/b"], output="~/m")
    assert input_fields(merge) == {"models": [str(home / "a"), str(home / "b")]}
    assert merge.output == home / "m"


@pytest.mark.parametrize("path", ["$HOME/model", "${HOME}/model", "x/$USER/model", "~nobody-of-that-name/m"])
def test_what_a_shell_would_have_replaced_is_refused(folder: Path, path: str) -> None:
    """A variable of a stranger's recipe could hold a token, and would then stand in a path."""
    for sections in ({"model": path}, {"output": path}, {"data": {"train": path, "test_share": 0.2}}):
        (fault,) = check_recipe(write(folder, **GOOD | sections))
        assert fault.given == repr(path) and "a path written out" in fault.expected


def test_paths_go_from_one_stage_into_the_next(folder: Path) -> None:
    merge = OPTIONS.get("merge")(models=[folder / "a", folder / "b"], base=folder / "c", output="m")
    assert input_fields(merge) == {
        "models": [str(folder / "a"), str(folder / "b")],
        "base": str(folder / "c"),
    }
    for models in (folder / "a", [folder / "a"], {"a": folder / "a"}):
        evaluate = OPTIONS.get("evaluate")(models=models, output="e")
        assert input_fields(evaluate) == {"models": {"a": str(folder / "a")}}


# The last word


def test_table_has_a_row_per_model() -> None:
    report = json.loads(json.dumps(REPORT))
    models = {name: {"gold": [0.1, 0.4]} for name in report["models"]}
    report["probes"]["best_of_n"] = {"sets": {"wide": {"n": [1, 2], "models": models}}}
    lines = summary.table(report).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "model",
        "accuracy test",
        "gold wide n=1",
        "n=2",
        "active parameters",
    ]
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(REPORT["models"])
    assert "0.750 (0.700-0.800)" in lines[2] and len({len(line) for line in lines}) == 1


def test_manifest_is_of_the_stage_that_the_plan_names(folder: Path, stages: FakeStages) -> None:
    pipeline.run_recipe("recipe.yml")
    for step in plan(load_recipe("recipe.yml")):
        assert read_manifest(step.options.output)["stage"] == step.stage


def test_an_evaluation_of_an_older_version_is_made_again(
    folder: Path, stages: FakeStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run_recipe("recipe.yml")
    stages.calls.clear()
    monkeypatch.setattr(report_file, "FORMAT", FORMAT + 1)
    monkeypatch.setitem(REPORT, "format", FORMAT + 1)
    report = pipeline.run_recipe("recipe.yml")
    assert stages.calls == ["evaluate", "publish"]  # publish, because its evaluation is another
    reasons = {step.name: step.reason for step in report.steps}
    assert reasons["evaluate"] == f"its report.json is of format {FORMAT}, not format {FORMAT + 1}"


def test_the_page_of_a_run_refuses_an_evaluation_of_another_version(
    folder: Path, stages: FakeStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pipeline.run_recipe("recipe.yml").output
    monkeypatch.setattr(report_file, "FORMAT", FORMAT + 1)
    with pytest.raises(ArtifactError, match="cannot be shown by this version"):
        write_run_page(run, ["evaluate"], "merge-learned")


def test_headlines_say_what_a_stage_came_to() -> None:
    train = {
        "before": {"loss": 0.7, "accuracy": 0.5},
        "after": {"loss": 0.61234, "accuracy": 0.75},
        "steps": 20,
        "best_step": 10,
        "trials": [{}, {}],
    }
    expected = (
        "validation loss 0.7000 -> 0.6123, accuracy 0.5000 -> 0.7500, best at step 10 of 20, best of 2 trials"
    )

    def told(stage: str, **results: Any) -> str:
        versions = {"moemerge": package_version()}
        return headline({"stage": stage, "results": results, "versions": versions})

    assert told("train", **train) == expected
    assert told("train", before=None, after=None, steps=3, train_loss=0.5).startswith("3 steps")
    assert told("fit", verdict="Kept.") == "Kept."
    merged = told("merge", largest_difference=1.25e-7)
    assert merged == "read-back check passed; largest rounding error 1.2e-07"


def test_progress_bars_have_a_heading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(steps, "hidden", lambda: False)
    options = Synthetic(**TINY_WORLD, output=tmp_path / "world")
    with caplog.at_level(logging.INFO, logger="moemerge.run.steps"):
        [*steps.run_steps([steps.Step("world", "synthetic", options)], before=2, after=1)]
    assert caplog.messages[0] == "[3/4] world" and "so far" not in caplog.text


def test_a_long_step_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no progress bar is seen; and what the run tells in its own line, the stage does not tell too."""

    def slow(options: Any) -> None:
        end = time.monotonic() + 10
        while "step 2 of 5" not in caplog.text and time.monotonic() < end:
            if "so far" in caplog.text:
                progress.PROGRESS.words = ", step 2 of 5"
            time.sleep(0.01)
        write_world(options)

    monkeypatch.setattr(steps, "BEAT", 0.01)
    monkeypatch.setattr(steps.STAGES, "get", lambda name: slow)
    options = Synthetic(**TINY_WORLD, output=tmp_path / "world")
    with caplog.at_level(logging.INFO, logger="moemerge"):
        (report,) = steps.run_steps([steps.Step("world", "synthetic", options)], before=2, after=1)
    assert report.place == "3/4" and "[3/4] world: 0 s so far\n" in caplog.text
    assert "s so far, step 2 of 5\n" in caplog.text
    assert "wrote" not in caplog.text
    with caplog.at_level(logging.INFO, logger="moemerge"):
        write_world(options.model_copy(update={"overwrite": True}))
    assert "wrote" in caplog.text

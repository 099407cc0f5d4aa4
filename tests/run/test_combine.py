"""combine: members that are good at different things, a few own pairs, one model to use."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hostile_files import edit_json
from small_moe import write_rows
from small_training import write
from tiny_models import SIZES, TINY, save_dense, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from moemerge import check_recipe, combine, load_moe, merge, merge_models, publish, run_recipe
from moemerge.artifacts.manifest import own_digest, read_manifest
from moemerge.artifacts.origin import NoStart, common_start
from moemerge.errors import CheckpointError, DataError, OptionError, UnsupportedError
from moemerge.evaluation.scoring_code import how_to_score
from moemerge.merging.coefficients import Coefficients
from moemerge.options.combine import Combine
from moemerge.run import cli
from moemerge.run.check import load_recipe
from moemerge.run.combine_plan import Plan
from moemerge.run.plan import plan
from moemerge.run.steps import RunReport, run_steps
from moemerge.stages.train import train

KINDS = {"a": ("w1", "w2"), "b": ("w11", "w12"), "c": ("w21", "w22")}
QUICK: dict[str, Any] = {
    "epochs": 1.0, "learning_rate": 3e-3, "batch_size": 8, "resamples": 200, "threads": 1, "device": "cpu",
    "max_epochs": 5, "folds": 2,
}  # fmt: skip


def rows_of(kind: str, count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Pairs whose chosen answer has the kind's good word, and whose rejected one has its bad word."""
    made = []
    for _ in range(count):
        noise = [f"w{draw.randrange(30, 60)}" for _ in range(6)]
        sides = []
        for word in KINDS[kind]:
            some = noise[:]
            some[draw.randrange(6)] = word
            sides.append(" ".join(some))
        prompt = " ".join(f"w{draw.randrange(3, 10)}" for _ in range(5)) + " "
        made.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1], "subset": kind})
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three members trained from it on a kind each, and some pairs of every kind."""
    folder, draw = tmp_path_factory.mktemp("kinds"), random.Random(0)
    base = save_dense(folder / "base", seed=0)
    settings = {"epochs": 3.0, "learning_rate": 3e-3, "batch_size": 8, "threads": 1, "device": "cpu"}
    for kind in KINDS:
        pairs = write(folder / f"{kind}.jsonl", rows_of(kind, 120, draw))
        train(model=str(base), pairs=pairs, output=folder / kind, patience=None, **settings)
    own = [row for kind in KINDS for row in rows_of(kind, 20, draw)]
    write(folder / "own.jsonl", own)
    return folder


def given(world: Path, **changes: Any) -> dict[str, Any]:
    models = {kind: str(world / kind) for kind in KINDS}
    return {
        "models": models,
        "base": str(world / "base"),
        "pairs": str(world / "own.jsonl"),
        **QUICK,
        **changes,
    }


@pytest.fixture(scope="module")
def combined(world: Path) -> RunReport:
    return combine(**given(world), output=world / "best")


def choice(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "choice/choice.json").read_text()))


def test_of_members_that_know_different_things_a_merge_is_taken(combined: RunReport) -> None:
    told = choice(combined.output)
    assert told["taken"] not in KINDS
    assert told["models"][told["taken"]]["lead"]["low"] > 0
    assert combined.verdict.startswith(f"Take {told['taken']}")
    # Each member knows its own kind, and none knows all.
    look = json.loads((combined.output / "look/choice.json").read_text())["models"]
    for kind in KINDS:
        assert look[kind]["by_subset"][kind]["value"] > 0.9 > look[kind]["accuracy"]["value"]


def test_the_table_is_that_of_the_choice(combined: RunReport) -> None:
    told = choice(combined.output)["models"]
    table = combined.table().set_index("model")
    assert list(table.index) == list(told)
    for name, numbers in told.items():
        assert table.loc[name, ["accuracy", "accuracy low"]].tolist() == [
            numbers["accuracy"]["value"],
            numbers["accuracy"]["low"],
        ]


def test_the_winner_is_an_ordinary_checkpoint_with_a_card(combined: RunReport) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(combined.merged)
    assert model.config.num_labels == 1
    assert (combined.output / "card/README.md").read_text().startswith("---")
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_every_candidate_is_judged_on_pairs_that_it_was_not_made_from(combined: RunReport) -> None:
    for step in (
        step for step in combined.steps if step.name.startswith("part-") and step.stage in ("fit", "train")
    ):
        fold = step.name.split("/")[0].removeprefix("part-")
        assert step.manifest["options"]["pairs"].endswith(f"folds/{fold}/train.jsonl.gz")
    told = choice(combined.output)
    assert told["pairs"] == 60
    assert set(told["models"]) == {
        *KINDS, "uniform", "sum", "fitted", "scores-mean",
        *(f"{name}-tuned" for name in (*KINDS, "uniform", "sum", "fitted")),
    }  # fmt: skip


def test_what_is_done_is_not_done_again(combined: RunReport, world: Path) -> None:
    """Nor is the page written again."""
    before = combined.page.stat().st_mtime_ns
    again = combine(**given(world), output=world / "best")
    assert [step.name for step in again.steps if step.reason is not None] == []
    assert (again.verdict, again.overview, again.page) == (combined.verdict, combined.overview, combined.page)
    assert again.page.stat().st_mtime_ns == before


def test_equal_members_are_taken_as_they_are(world: Path) -> None:
    output = world / "equal"
    models = {"first": str(world / "a"), "second": str(shutil.copytree(world / "a", world / "copy"))}
    report = combine(**given(world, models=models, tune="none", folds=2), output=output)
    told = choice(output)
    assert told["taken"] in models
    assert "as it is" in report.verdict
    taken, start = (
        AutoModelForSequenceClassification.from_pretrained(f) for f in (report.merged, world / "a")
    )
    for name, weight in start.state_dict().items():
        assert torch.equal(taken.state_dict()[name], weight)
    card = (output / "card/README.md").read_text()
    assert "as it is, which moemerge compared" in card and "- merge" not in card and "per block" not in card


def test_the_card_of_a_model_taken_as_it_is_tells_of_this_model_alone(world: Path, tmp_path: Path) -> None:
    taken = merge_models([world / "a", world / "b"], tmp_path / "b-alone", weights=[0.0, 1.0])
    card = (publish(taken, output=tmp_path / "card") / "README.md").read_text()
    assert "`b` (" in card and "trained on `b.jsonl`" in card and "a.jsonl" not in card
    mixed = merge_models([world / "a", world / "b"], tmp_path / "mixed", weights=[1.0, 1.0])
    card = (publish(mixed, output=tmp_path / "card-mixed") / "README.md").read_text()
    assert "2 models of one architecture merged" in card and "a.jsonl" in card and "b.jsonl" in card


def test_a_mixture_is_tried_where_it_is_asked_for(world: Path) -> None:
    options = Combine(**given(world, tune="none", folds=2, max_epochs=1), form="moe", output=world / "moe")
    combine(options)
    told = choice(world / "moe")
    assert told["models"]["routed"]["rank"] > told["models"]["uniform"]["rank"]
    # Were it taken: made from all pairs, with a card whose code scores as evaluate does.
    shutil.rmtree(world / "moe" / "model")
    shutil.rmtree(world / "moe" / "card")
    made, card = run_steps(Plan(options).winner("routed"))
    assert made.manifest["options"]["pairs"].endswith("data/train.jsonl.gz")
    assert load_moe(world / "moe" / "model").config.moemerge["gate"] == "prompt"
    assert "prompt_lengths" in (world / "moe" / "card" / "README.md").read_text()


@pytest.mark.slow
def test_language_models_are_averaged_into_one_reward_model(world: Path) -> None:
    """DogeRM: by a weight that was chosen without the part on which the merge is judged."""
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", **{**SIZES, **TINY["llama"]})
    AutoModelForCausalLM.from_config(config).float().save_pretrained(world / "lm")
    tiny_tokenizer().save_pretrained(world / "lm")
    changes = {"models": {"a": str(world / "a")}, "base": None, "tune": "merges", "folds": 2, "epochs": 0.5}
    options = Combine(
        **given(world, **changes), language_models={"lm": str(world / "lm")}, output=world / "doge"
    )
    report = combine(options)
    assert set(choice(world / "doge")["models"]) == {"a", "with-lm", "with-lm-tuned"}
    fits = [step for step in report.steps if step.stage == "fit" and step.name.startswith("part-")]
    assert [step.manifest["options"]["method"] for step in fits] == ["grid"] * 2
    for step in fits:
        fold = step.name.split("/")[0].removeprefix("part-")
        assert step.manifest["options"]["pairs"].endswith(f"folds/{fold}/train.jsonl.gz")
    assert not {"scales", "look", "uniform", "changes"} & {step.name for step in report.steps}
    start = AutoModelForSequenceClassification.from_pretrained(world / "a").state_dict()
    found, _ = taken(options, "a")
    assert found.keys() == start.keys() and all(torch.equal(found[name], start[name]) for name in start)
    found, fitted = taken(options, "with-lm")
    assert fitted.manifest["options"]["pairs"].endswith("data/train.jsonl.gz")
    weight = Coefficients.load(options.output / fitted.name).shared_L[0].item()
    language, name = (
        AutoModelForCausalLM.from_pretrained(world / "lm").state_dict(),
        "model.layers.1.mlp.up_proj.weight",
    )
    average = weight * start[name] + (1 - weight) * language[name]
    torch.testing.assert_close(found[name], average, atol=1e-6, rtol=0)
    assert torch.equal(found["score.weight"], start["score.weight"])


def taken(options: Combine, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    """The weights that there are if this candidate is taken, and the first step that makes them."""
    for step in ("model", "card"):
        shutil.rmtree(options.output / step, ignore_errors=True)
    first, *_ = run_steps(Plan(options).winner(name))
    return AutoModelForSequenceClassification.from_pretrained(options.output / "model").state_dict(), first


def test_a_mixture_of_encoders_is_refused_at_the_start(world: Path) -> None:
    for name in ("e", "f"):
        save_dense(world / name, "bert")
    models = {name: str(world / name) for name in ("e", "f")}
    with pytest.raises(UnsupportedError, match="prompt") as caught:
        combine(**given(world, models=models, base=None), form="moe", output=world / "encoders")
    assert "dense" in caught.value.fix and not (world / "encoders").exists()


def test_a_mixture_without_prompts_is_refused_at_the_start(world: Path) -> None:
    rows = [json.loads(line) for line in (world / "own.jsonl").read_text().splitlines()]
    pairs = write_rows(world / "promptless.jsonl", [row | {"prompt": ""} for row in rows])
    with pytest.raises(DataError, match="needs pairs with prompts") as caught:
        combine(**given(world, pairs=str(pairs)), form="moe", output=world / "promptless")
    assert "dense" in caught.value.fix and not (world / "promptless").exists()


def test_without_base_the_common_start_is_found(combined: RunReport, world: Path) -> None:
    again = combine(**given(world, base=None), output=world / "best")
    assert [step.name for step in again.steps if step.reason is not None] == []


def test_a_plan_finds_the_common_start_too(world: Path) -> None:
    recipe = load_recipe(recipe_of(world, base=None))
    assert "sum" in [step.name for step in plan(recipe)]


def test_sums_find_the_common_start_too(world: Path) -> None:
    models = [str(world / kind) for kind in KINDS]
    given_base, found = (
        merge(models=models, coordinates="sum", output=world / name, base=base)
        for name, base in (("sum-given", str(world / "base")), ("sum-found", None))
    )
    weights = [(folder / "model.safetensors").read_bytes() for folder in (found, given_base)]
    assert weights[0] == weights[1]
    manifest = read_manifest(found)
    assert manifest["options"]["base"] == str(world / "base") and "base" in manifest["inputs"]


@pytest.mark.slow
def test_without_any_base_there_are_averages_only(
    world: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    bare = {kind: str(shutil.copytree(world / kind, tmp_path / kind)) for kind in ("a", "b")}
    (tmp_path / "b/manifest.json").unlink()
    settings = given(world, models=bare, base=None, tune="none", folds=2)
    report = combine(**settings, output=tmp_path / "averages")
    assert set(choice(report.output)["models"]) == {*bare, "uniform", "fitted", "scores-mean"}
    assert "has no manifest.json" in caplog.text and "give base" in caplog.text


def test_a_start_is_taken_only_if_it_is_what_it_was(world: Path, tmp_path: Path) -> None:
    models = [str(world / kind) for kind in KINDS]
    assert common_start(models) == world / "base"
    foreign = shutil.copytree(world / "a", tmp_path / "foreign")
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["inputs"]["model"]["path"] = "/dev"
    (foreign / "manifest.json").write_text(json.dumps(manifest | {"sha256": own_digest(manifest)}))
    with pytest.raises(NoStart, match="is not what it was"):
        common_start([str(foreign), *models])
    train(
        model=models[0], pairs=str(world / "a.jsonl"), output=tmp_path / "grandchild", max_steps=1, threads=1,
        device="cpu",
    )  # fmt: skip
    with pytest.raises(NoStart, match="different models"):
        common_start([*models, str(tmp_path / "grandchild")])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"models": {"a": "a"}}, "two models at least"),
        ({"models": {"a": "a", "b": "a"}}, "models has a twice"),
        ({"models": {"a": "a", "sum": "b"}}, "another name than sum"),
        ({"language_models": {"lm": "lm"}}, "language_models go with one reward model"),
        ({"models": {"a": "a", "a-tuned": "b"}}, "another name than a-tuned"),
        ({"folds": 1}, "folds"),
        ({"pairs": "./nowhere.jsonl"}, "pairs does not exist"),
    ],
)
def test_what_cannot_be_combined_is_refused(world: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(OptionError, match=what):
        combine(**given(world, **changes), output=world / "never")
    assert not (world / "never").exists()


def test_a_folder_of_the_users_is_no_output(world: Path) -> None:
    (world / "mine").mkdir()
    (world / "mine/precious.txt").write_text("precious")
    with pytest.raises(OptionError, match="output is not the folder of a run"):
        combine(**given(world), output=world / "mine")
    assert [path.name for path in (world / "mine").iterdir()] == ["precious.txt"]


def test_unlike_models_are_refused_at_the_start(world: Path) -> None:
    """By configs and tokenizers, with no weights at hand, and by `check` as by the run."""
    unlike = {
        "qwen": (save_dense(world / "qwen", family="qwen3"), UnsupportedError, "model_type qwen3"),
        "deep": (save_dense(world / "deep", num_hidden_layers=4), UnsupportedError, "layers.3"),
        "many": (save_dense(world / "many", num_labels=2), CheckpointError, "2 outputs"),
        "bare": (save_dense(world / "bare"), CheckpointError, "no reward head"),
        "other": (save_dense(world / "other"), UnsupportedError, "tokenizer of"),
        "lopsided": (save_dense(world / "lopsided", pad_token_id=1), UnsupportedError, "at different tokens"),
    }
    edit_json(world / "bare/config.json", architectures=["LlamaForCausalLM"])
    other = world / "other/tokenizer.json"
    other.write_text(other.read_text().replace('"w7"', '"w_seven"'))
    for name, (folder, kind, words) in unlike.items():
        (folder / "model.safetensors").unlink()
        models = {kind: str(world / kind) for kind in KINDS} | {name: str(folder)}
        with pytest.raises(kind, match=words):
            combine(**given(world, models=models), output=world / "unlike")
        (fault,) = check_recipe(recipe_of(world, models=[*KINDS, name]))
        assert words in str(fault)
    with pytest.raises(UnsupportedError, match="(?s)the base .*/qwen does not go with.*give as base"):
        combine(**given(world, base=str(world / "qwen")), output=world / "unlike")
    with pytest.raises(OptionError, match="train_layers: layers cannot be picked"):
        combine(**given(world, train_layers="last:4"), output=world / "unlike")
    assert not (world / "unlike").exists()


def test_the_command_line_does_the_same(
    world: Path, combined: RunReport, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [part for kind in KINDS for part in ("--models", f"{kind}={world / kind}")]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    paths = [
        "--base",
        str(world / "base"),
        "--pairs",
        str(world / "own.jsonl"),
        "--output",
        str(world / "best"),
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main(["combine", *models, *paths, *flags])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert combined.verdict.splitlines()[0] in shown
    assert shown.count("skipped") == len(combined.steps)
    assert shown.endswith(how_to_score(combined.merged) + "\n")


def recipe_of(world: Path, **changes: Any) -> Path:
    """The same as a recipe beside the models; inputs are relative to it."""
    merges = {**given(world), "models": list(KINDS), "base": "base", "pairs": "own.jsonl"} | changes
    rest = {name: merges.pop(name) for name in ("threads", "device")}
    path = world / f"recipe-{len(changes)}.yml"
    path.write_text(yaml.safe_dump({"output": str(world / "best"), **rest, "merges": merges}))
    return path


def test_a_recipe_with_merges_does_the_same(world: Path, combined: RunReport) -> None:
    report = run_recipe(recipe_of(world))
    assert [step.name for step in report.steps if step.reason is not None] == []
    assert report.verdict == combined.verdict


def test_a_recipe_with_merges_is_checked(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["check", str(recipe_of(world))])
    shown = capsys.readouterr().out
    assert shown.startswith("ok") and "part-1/made" in shown and "on the hub" not in shown
    with pytest.raises(SystemExit):
        cli.main(["check", str(recipe_of(world, base="owner/start"))])
    assert "merges.base owner/start is not on this disk" in capsys.readouterr().out
    assert len(check_recipe(recipe_of(world, folds=1, l2=-1.0))) == 2
    (fault,) = check_recipe(recipe_of(world, pairs="./nowhere.jsonl"))
    assert "merges.pairs does not exist" in str(fault)
    (fault,) = check_recipe(recipe_of(world, learning_rat=1.0))
    assert "learning_rate" in fault.fix


def test_other_sections_beside_merges_are_refused(world: Path) -> None:
    path = recipe_of(world)
    path.write_text(path.read_text() + "upcycle: {num_routed_experts: 3}\n")
    (fault,) = check_recipe(path)
    assert "upcycle" in fault.given and "merges" in fault.expected


def test_manifests_lead_from_the_winner_to_the_pairs(combined: RunReport) -> None:
    stages = [step["stage"] for step in read_manifest(combined.merged).get("chain", [])]
    assert "data" in stages or "train" in stages

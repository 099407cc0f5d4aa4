"""Baselines of equal budget: what they add to a run, their budgets by hand count, ensembles, seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_moe import write_rows
from small_run import TINY_RUN
from tiny_models import save_dense
from torch.utils.flop_counter import FlopCounterMode

from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import OptionError
from moemerge.evaluation.ensembles import combine
from moemerge.models.cost import cost, cost_of
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model
from moemerge.options.recipe import Recipe
from moemerge.options.train import TrainSettings
from moemerge.run import pipeline
from moemerge.run.baselines import other_heads, scored_names, trainings
from moemerge.run.budget import shortfalls
from moemerge.run.faults import find_faults
from moemerge.run.plan import plan
from moemerge.run.steps import RunReport, open_result
from moemerge.run.training_check import baseline_faults, training_faults
from moemerge.stages.compare import compare
from moemerge.stages.evaluate import evaluate
from moemerge.stages.train import train
from moemerge.stages.upcycle import upcycle

# The tiny llama: 3 layers of width 32, MLP 48, 4 heads of 8 with 2 key-value heads, 64 words.
ATTENTION, MLP, NORM = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 32
DENSE = 3 * (ATTENTION + MLP + 2 * NORM) + NORM + 32  # last norm and head, without the 64 x 32 embeddings


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three dense models, and a MoE of the first with 5 routed experts, 2 per token."""
    folder = tmp_path_factory.mktemp("models")
    found = {name: str(save_dense(folder / name, seed=seed)) for seed, name in enumerate("abc")}
    found["moe"] = str(
        upcycle(model=found["a"], output=folder / "moe", num_routed_experts=5, num_experts_per_tok=2)
    )
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 pairs."""
    draw = np.random.default_rng(0)
    words = [[f"w{n}" for n in line] for line in draw.integers(0, 61, size=(20, 12))]
    pairs = [
        {"prompt": w[0], "chosen": " " + " ".join(w[1:6]), "rejected": " " + " ".join(w[6:])} for w in words
    ]
    return str(write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pairs))


# Cost and budgets


def test_costs_by_hand_count(models: dict[str, str]) -> None:
    dense, moe = (cost(load_reward_model(models[name], "cpu")) for name in ("a", "moe"))
    routers = 3 * 32 * 5
    assert dense == {
        "parameters": DENSE + 64 * 32,
        "active_parameters": DENSE + 64 * 32,
        "flops_per_token": 2 * DENSE,
    }
    assert moe["parameters"] == DENSE + 64 * 32 + 3 * 5 * MLP + routers
    assert moe["flops_per_token"] == 2 * (DENSE + 3 * 2 * MLP + routers)
    ratio = (DENSE + 3 * 2 * MLP + routers) / DENSE
    of_moe, of_dense = (cost_of(ModelFolder(models[name])) for name in ("moe", "a"))
    assert of_moe.flops_per_token / of_dense.flops_per_token == pytest.approx(ratio, rel=1e-12)
    assert (of_dense.layers, of_dense.language_head_flops) == (3, 2 * 32 * 64)


def test_torch_counts_as_many_flops_in_the_linears(models: dict[str, str]) -> None:
    """Of one token; our count has the weights of the norms besides."""
    model = load_reward_model(models["a"], "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.tensor([[5]]))
    linears = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm")
    )
    assert linears == cost(model)["flops_per_token"] - 2 * 7 * NORM


def test_scaled_budgets_by_hand_count() -> None:
    settings = TrainSettings(epochs=2, search={"epochs": [1, 2, 3], "learning_rate": [1e-5]}, patience=4)
    longer = settings.scaled(2.5)
    assert (longer.epochs, longer.max_steps, longer.patience) == (5.0, None, 4)
    assert longer.search == {"epochs": [2.5, 5.0, 7.5], "learning_rate": [1e-5]}
    assert TrainSettings(max_steps=7).scaled(1 / 2).max_steps == 4
    assert TrainSettings(max_steps=1).scaled(1 / 9).max_steps == 1
    assert settings.epochs == 2


def test_training_for_the_flops_of_a_moe(models: dict[str, str], rows: str, tmp_path: Path) -> None:
    out = train(
        model=models["a"],
        pairs=rows,
        flops_of=models["moe"],
        max_steps=4,
        output=tmp_path / "t",
        max_length=40,
    )
    results = read_manifest(out)["results"]
    ratio = (DENSE + 3 * 2 * MLP + 3 * 32 * 5) / DENSE
    assert results["flops_ratio"] == pytest.approx(ratio) and 1.5 < ratio < 3
    assert results["steps"] == round(4 * ratio)


# Ensembles


def test_combinations_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, -4.0], [3.0, 2.0, 4.0]], dtype=torch.float64)
    assert combine(scores, "mean", 9.0).tolist() == [2.0, 2.0, 0.0]
    assert combine(scores, "worst", 9.0).tolist() == [1.0, 2.0, -4.0]
    assert combine(scores, "variance", 0.5).tolist() == [1.5, 2.0, -8.0]
    assert combine(scores, "variance", 0.0).tolist() == combine(scores, "mean", 0.0).tolist()


@pytest.fixture(scope="module")
def evaluated(models: dict[str, str], rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate(
        models=models,
        pairs={"one": rows, "two": rows},
        ensembles={"trio": ["a", "b", "c"]},
        variance_penalty=0.25,
        baseline="trio-mean",
        resamples=100,
        max_length=40,
        output=tmp_path_factory.mktemp("evaluated") / "e",
    )


def test_ensembles_are_scored_as_by_hand(evaluated: Path) -> None:
    scores = load_file(evaluated / "scores.safetensors")
    raw = np.stack([scores[f"pairs/one/model/{name}"].double().numpy() for name in "abc"])
    centred = raw - raw.mean(axis=1, keepdims=True)  # both sets are the same, so their mean is this one's
    expected = {
        "mean": centred.sum(axis=0) / 3,
        "worst": centred.min(axis=0),
        "variance": centred.sum(axis=0) / 3
        - 0.25 * ((centred - centred.sum(axis=0) / 3) ** 2).sum(axis=0) / 3,
    }
    report = json.loads((evaluated / "report.json").read_text())
    measured = report["probes"]["accuracy"]["sets"]["one"]["all"]["models"]
    for how, values in expected.items():
        np.testing.assert_allclose(scores[f"pairs/two/model/trio-{how}"], values, atol=1e-9)
        right = values.reshape(-1, 2)
        assert measured[f"trio-{how}"]["accuracy"] == (right[:, 0] > right[:, 1]).mean()
    assert report["baseline"] == "trio-mean" and "vs_baseline" in measured["a"]


def test_an_ensemble_costs_what_its_members_cost(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    facts = read_manifest(evaluated)["results"]["models"]
    trio = facts["trio-worst"]
    assert trio["parameters"] == 3 * facts["a"]["parameters"] and trio["flops_per_token"] == 6 * DENSE
    assert trio["seconds"] == pytest.approx(sum(facts[name]["seconds"] for name in "abc"))
    tokens = (1 + 5 + 1) + (1 + 6 + 1)  # prompt, words and end of the chosen, and of the rejected
    assert trio["tokens"] == facts["a"]["tokens"] == 2 * 20 * tokens
    assert "seconds" not in report["models"]["a"], "the report is the same whenever it is written"
    assert "| trio-worst | worst of 3 |" in (evaluated / "report.md").read_text()


def test_faulty_ensembles_are_refused(models: dict[str, str], rows: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"models": models, "pairs": {"p": rows}, "output": tmp_path / "e"}
    for match, members in {"did you mean": ["a", "moee"], "bad option": ["a", "a"]}.items():
        with pytest.raises(OptionError, match=match):
            evaluate(**given, ensembles={"x": members})
    with pytest.raises(OptionError, match="two or more different models in ensemble x"):
        evaluate(**given, ensembles={"x": ["a"]})
    with pytest.raises(OptionError, match="called like a model"):
        evaluate(**{**given, "models": {**models, "x-mean": models["b"]}}, ensembles={"x": ["a", "b"]})
    assert not (tmp_path / "e").exists()


# Recipes


GOOD: dict[str, Any] = {
    "synthetic": {},
    "control": {"epochs": 2, "search": {"learning_rate": [1e-4, 1e-3]}},
    "train": {"epochs": 2, "search": {"learning_rate": [1e-4, 1e-3]}},
}


def steps(**sections: Any) -> dict[str, Any]:
    recipe = Recipe(output=Path("out"), **{**GOOD, **sections})
    assert find_faults(recipe) == []
    return {step.name: step.options for step in plan(recipe)}


def test_full_budgets_and_the_control_as_first_fine_tune() -> None:
    found = steps(baselines={"fine_tunes": 3, "same_flops": True}, seed=2)
    assert [name for name in found if "tune" in name] == ["fine-tune-2", "fine-tune-3"]
    assert found["warm"].models == ["out/control", "out/fine-tune-2", "out/fine-tune-3"]
    orders = [found[name].seed for name in ("control", "fine-tune-2", "fine-tune-3")]
    assert len(set(orders)) == 3
    differing = {"output", "seed"}
    assert found["fine-tune-3"].model_dump(exclude=differing) == found["control"].model_dump(
        exclude=differing
    )
    longer = found["control-flops"]
    assert (longer.flops_of, longer.model, longer.epochs) == (["out/upcycle"], "out/synthetic/model", 2)
    names = [
        "dense",
        "control",
        "control-flops",
        "fine-tune-2",
        "fine-tune-3",
        "warm",
        "moe",
        "merge-learned",
    ]
    assert list(found["evaluate"].models) == names
    assert found["evaluate"].ensembles == {"ensemble": ["control", "fine-tune-2", "fine-tune-3"]}
    assert list(found).index("control-flops") > list(found).index("upcycle")


def test_split_budgets_add_up_to_the_controls() -> None:
    found = steps(baselines={"fine_tunes": 4, "budget": "split", "ensemble": False})
    names = [f"fine-tune-{number}" for number in (1, 2, 3, 4)]
    assert found["warm"].models == [f"out/{name}" for name in names]
    assert math.fsum(found[name].epochs for name in names) == found["control"].epochs
    assert all(found[name].search == found["control"].search for name in names)
    assert found["evaluate"].ensembles == {} and set(names) < set(found["evaluate"].models)


OF_FILES = {
    "synthetic": None,
    "model": "owner/model",
    "data": {"train": "a/b:train", "fit": "a/b:fit", "test_share": 0.1},
}


def test_the_control_is_tuned_on_the_fitting_pairs() -> None:
    """As it was trained: the same options, but for where it starts and what it sees."""
    found = steps(**OF_FILES, base={}, baselines={"tuned": True})
    tuned, control = found["tuned"], found["control"]
    assert (
        (tuned.model, tuned.pairs)
        == ("out/control", "out/data/fit.jsonl.gz")
        != (control.model, control.pairs)
    )
    assert found["fit-learned"].pairs == tuned.pairs and tuned.validation == control.validation is not None
    differing = {"output", "model", "pairs"}
    assert tuned.model_dump(exclude=differing) == control.model_dump(exclude=differing)
    assert list(found["evaluate"].models) == ["dense", "control", "tuned", "moe", "merge-learned"]


def test_no_baselines_no_steps() -> None:
    assert list(steps()["evaluate"].models) == ["dense", "control", "moe", "merge-learned"]
    assert "warm" not in steps(baselines={"fine_tunes": 2, "warm": False})


def test_faults_of_baselines_and_seeds() -> None:
    def whats(**sections: Any) -> list[str]:
        recipe = Recipe(output=Path("out"), **{**GOOD, **sections})
        return [fault.what for fault in find_faults(recipe)]

    assert whats(control=None, baselines={"same_flops": True}) == ["baselines need a control"]
    assert whats(**OF_FILES, base={}, control=None, baselines={"tuned": True}) == ["baselines need a control"]
    assert whats(baselines={"tuned": True}) == ["baselines.tuned needs fitting pairs of their own"]
    assert whats(seeds=[1, 1]) == whats(seeds=[-1]) == ["seeds cannot be run"]
    assert whats(evaluate={"ensembles": {"x": ["moe", "controll"]}}) == ["unknown evaluate.ensembles.x"]
    assert whats(evaluate={"ensembles": {"x": ["moe", "control"]}, "baseline": "x-worst"}) == []
    with pytest.raises(ValueError, match="one alone"):
        Recipe(output=Path("out"), baselines={"fine_tunes": 1})


def test_every_scored_name_may_be_the_baseline() -> None:
    recipe = Recipe(output=Path("out"), **GOOD, baselines={"fine_tunes": 2})
    assert {"warm", "fine-tune-2", "ensemble-mean", "ensemble-worst"} < set(scored_names(recipe))


@pytest.mark.parametrize(
    ("control", "told"),
    [
        ({}, []),
        ({"epochs": 3, "patience": None}, []),
        ({"epochs": 1}, ["control has 1 epochs, train 2"]),
        ({"search": {}}, ["control has 1 trials, train 2"]),
        (
            {"search": {"learning_rate": [1e-4]}, "patience": 1},
            ["1 trials, train 2", "1 evaluations of patience"],
        ),
        ({"choose_by": "accuracy"}, ["train chooses by loss, control by accuracy"]),
        ({"max_steps": 1}, []),  # against epochs: not to be told without the data
    ],
)
def test_a_control_with_less_care_is_told(control: dict[str, Any], told: list[str]) -> None:
    recipe = Recipe(output=Path("out"), **{**GOOD, "control": {**GOOD["control"], **control}})
    found = list(shortfalls(recipe))
    assert len(found) == len(told) and all(part in line for part, line in zip(told, found, strict=True))


def test_steps_are_compared_by_pairs_and_no_control_is_told() -> None:
    train = {"max_steps": 10, "batch_size": 8}
    less = Recipe(output=Path("out"), train=train, control={"max_steps": 19, "batch_size": 4})
    assert list(shortfalls(less)) == ["control has 76 pairs, train 80: the comparison favours the MoE"]
    equal = Recipe(output=Path("out"), train=train, control={"max_steps": 20, "batch_size": 4})
    assert list(shortfalls(equal)) == []
    assert next(shortfalls(Recipe(output=Path("out")))).startswith("no control")


# A whole study

TINY: dict[str, Any] = {
    **TINY_RUN,
    "seeds": [4],
    "baselines": {"fine_tunes": 2, "same_flops": True},
    "evaluate": {"resamples": 100, "ensemble_by": ["worst"], "probes": ["accuracy"]},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    """A tiny recipe with every baseline, by the real stages; further seeds would only be more of the same."""
    root = tmp_path_factory.mktemp("study")
    (root / "recipe.yml").write_text(json.dumps({"output": str(root / "out"), **TINY}))
    return pipeline.run_recipe(root / "recipe.yml")


def test_a_recipe_with_seeds_is_a_run_of_each_and_their_comparison() -> None:
    found = steps(seeds=[4, 2], baselines={"fine_tunes": 2}, evaluate={"confidence": 0.9})
    assert list(found)[-2:] == ["seed-2/publish", "compare"]
    for seed in (4, 2):
        of_seed = {n: one for n, one in found.items() if n.startswith(f"seed-{seed}/")}
        alone = steps(seed=seed, baselines={"fine_tunes": 2}, evaluate={"confidence": 0.9})
        assert [name.partition("/")[2] for name in of_seed] == list(alone)
        assert all(one.output.parent == Path(f"out/seed-{seed}") for one in of_seed.values())
        assert {one.seed for name, one in of_seed.items() if "fine-tune" not in name} == {seed}
    assert found["compare"].runs == ["out/seed-4/evaluate", "out/seed-2/evaluate"]
    assert (found["compare"].baseline, found["compare"].confidence) == ("control", 0.9)


def test_a_study_ends_with_its_comparison(study: RunReport) -> None:
    out = study.output
    assert [step.name for step in study.steps][-2:] == ["seed-4/publish", "compare"]
    recipe = Recipe(**json.loads((out / "seed-4/recipe.json").read_text()))
    assert recipe.seed == 4 and recipe.seeds == [] and (out / "seed-4/summary.md").exists()
    (group,) = json.loads((out / "compare/compare.json").read_text())["groups"]
    assert group["seeds"] == [4] and group["baseline"] == "control"
    dense = ["dense", "control", "control-flops", "fine-tune-2", "warm"]
    assert list(group["costs"]) == [*dense, "moe", "merge-uniform", "ensemble-worst"]
    report = json.loads((out / "seed-4/evaluate/report.json").read_text())
    for name, numbers in report["probes"]["accuracy"]["sets"]["in_distribution"]["all"]["models"].items():
        assert group["measures"]["accuracy in_distribution"][name]["mean"] == numbers["accuracy"]
    assert all(costs["tokens_per_second"] > 0 for costs in group["costs"].values())
    assert "merge-uniform against control, 1 seed." in study.verdict
    assert study.overview.startswith("### 8 models")
    assert study.pictures[0].exists() and study.merged == out / "seed-4/merge-uniform"


def test_warm_is_the_average_of_the_fine_tunes(study: RunReport) -> None:
    run = study.output / "seed-4"
    control, second, warm = (
        load_file(run / n / "model.safetensors") for n in ("control", "fine-tune-2", "warm")
    )
    assert any(not torch.equal(control[name], second[name]) for name in control), (
        "other orders, other weights"
    )
    for name, tensor in warm.items():
        torch.testing.assert_close(tensor, (control[name] + second[name]) / 2, atol=1e-7, rtol=1e-6)


def test_the_longer_control_takes_as_many_flops_as_the_moe(study: RunReport) -> None:
    run = study.output / "seed-4"
    models = read_manifest(run / "evaluate")["results"]["models"]
    longer, moe = (read_manifest(run / name)["results"] for name in ("control-flops", "train"))
    ratio = models["moe"]["flops_per_token"] / models["control"]["flops_per_token"]
    assert longer["flops_ratio"] == pytest.approx(ratio)
    assert longer["steps"] == round(ratio * moe["steps"])


def test_a_second_run_finds_everything_valid_and_compare_takes_the_folder(
    study: RunReport, tmp_path: Path
) -> None:
    again = pipeline.run_recipe(study.output.parent / "recipe.yml")
    assert {step.reason for step in again.steps} == {None}
    compare(runs=[str(study.output)], output=tmp_path / "c")
    assert (tmp_path / "c/compare.md").read_text() == (study.output / "compare/compare.md").read_text()


def test_the_tables_of_steps_say_what_their_files_say(study: RunReport) -> None:
    run = study.output / "seed-4"
    rows = {name: open_result(run / name).rows() for name in ("train", "fit-uniform", "evaluate", "upcycle")}
    assert rows["train"] == json.loads((run / "train/history.json").read_text())
    blocks = json.loads((run / "fit-uniform/coefficients.json").read_text())["blocks"]
    shown = [[row["block"], row["shared"], *list(row.values())[2:]] for row in rows["fit-uniform"]]
    assert shown == [[block["block"], block["shared"], *block["alpha"]] for block in blocks]
    report = json.loads((run / "evaluate/report.json").read_text())
    accuracy = report["probes"]["accuracy"]["sets"]["in_distribution"]["all"]["models"]
    title = "accuracy in_distribution"
    for row in rows["evaluate"]:
        numbers = accuracy[row["model"]]
        assert [row[f"{title}{end}"] for end in ("", " low", " high")] == [
            numbers["accuracy"],
            *numbers["interval"],
        ]
        assert row.get(f"{title} minus {report['baseline']}") == numbers.get("vs_baseline", {}).get(
            "difference"
        )
    assert {"name": "num_routed_experts", "value": 3} in rows["upcycle"]
    (group,) = json.loads((study.output / "compare/compare.json").read_text())["groups"]
    assert study.rows() == open_result(study.output / "compare").rows()
    assert {(row["measure"], row["model"], row["mean"]) for row in study.table().to_dict("records")} == {
        (measure, model, numbers["mean"])
        for measure, models in group["measures"].items()
        for model, numbers in models.items()
    }
    assert study.numbers["seed-4/evaluate"]["models"].keys() == report["models"].keys()
    assert study.path == study.output and "merge-uniform against control" in study._repr_html_()


def test_a_head_is_held_against_every_other_one() -> None:
    """Each with the control's width, dropout and search; none twice, and all are options that train takes."""
    search = {"head_learning_rate": [1e-3, 3e-3]}
    control = {"head": "nonnegative", "head_width": 9, "head_start": "uniform", "search": search}
    recipe = Recipe(**{**TINY_RUN, "output": "r", "control": control, "baselines": {"heads": True}})
    assert not [*baseline_faults(recipe)]
    found = {name: settings for name, settings, _ in trainings(recipe, str)}
    assert {n: (s.head, s.noisy_head, s.head_width) for n, s in found.items()} == {
        "head-linear": ("linear", False, 1024), "head-mlp": ("mlp", False, 9), "head-noise": ("mlp", True, 9),
    }  # fmt: skip
    for settings in found.values():
        assert TrainSettings(**settings.model_dump()).search == search
    mlp = TrainSettings(head="mlp", head_noise=True)
    assert [*other_heads(mlp)] == ["head-linear", "head-mlp"]
    plain = Recipe(**{**TINY_RUN, "output": "r", "control": {}, "baselines": {"heads": True}})
    assert any("control.head" in str(fault) for fault in baseline_faults(plain))
    unknown = Recipe(**{**TINY_RUN, "output": "r", "control": {"head": "mpl"}})
    assert any("mlp" in str(fault) for fault in training_faults(unknown))


def test_fine_tunes_have_one_head_and_tuning_keeps_it() -> None:
    control = {"head": "mlp", "head_width": 9}
    wanted = {"fine_tunes": 2, "budget": "split", "tuned": True}
    data = {"train": "t.jsonl", "fit": "f.jsonl"}
    recipe = Recipe(output="r", model="m", data=data, control=control, baselines=wanted, seed=7)
    steps = {step.name: step.options for step in plan(recipe)}
    tunes = [steps[f"fine-tune-{number}"] for number in (1, 2)]
    assert [tune.head_seed for tune in tunes] == [7, 7] and tunes[0].seed != tunes[1].seed
    assert {tune.head for tune in tunes} == {"mlp"} and steps["control"].head == "mlp"
    assert steps["tuned"].head is None and steps["tuned"].head_width == 1024

"""What the torture harness runs: every stage as a command line, on models and data of a few kilobytes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from small_moe import make_moe, random_pairs, write_rows
from small_policy import save_policy
from tiny_models import save_dense

from moemerge.stages.upcycle import upcycle

SLOW = {"train", "strength", "route", "fit", "evaluate", "optimise"}
# What other scenarios read.
NEEDED = {"upcycle", "route", "fit", "merge"}
# What reads evaluations and attacks.
MEASURED = {"choose", "robustness", "compare"}
COMMON = ["--threads", "1", "--seed", "3", "--device", "cpu"]


@dataclass(frozen=True)
class Scenario:
    """A command that writes `output`; `before` lies there already (--overwrite).

    `again`: the command may be repeated over what it has made. `share`: of the rounds in which it takes part,
    less for what takes long.
    """

    name: str
    arguments: list[str]
    output: Path
    before: Path | None = None
    again: bool = False
    share: float = 1.0

    @property
    def home(self) -> Path:
        """The folder in which the output, and whatever is on its way there, lies."""
        return self.output.parent


def make_inputs(folder: Path, measured: bool) -> None:
    """Models, data and a recipe in `folder`, evaluations too; nothing in it may change afterwards."""
    save_dense(folder / "dense")
    make_moe(folder / "moe", gate="topk")
    rows = random_pairs(48)
    write_rows(folder / "pairs.jsonl", rows[:32])
    write_rows(folder / "validation.jsonl", rows[32:])
    save_policy(folder / "policy")
    for seed, name in enumerate(("base", "one", "other")):
        save_dense(folder / name, seed=seed)
    experts = {name: str(folder / name) for name in ("one", "other")}
    mixture = {"experts": experts, "gate": "prompt", "shared_expert": False}
    upcycle(model=str(folder / "base"), **mixture, output=folder / "mixture")
    if measured:
        _measure(folder)
    training = {"max_steps": 6, "batch_size": 4, "eval_steps": 2, "learning_rate": 1e-3}
    recipe = {
        "seed": 3,
        "threads": 1,
        "device": "cpu",
        "output": "replaced",
        "model": str(folder / "dense"),
        "data": {
            "train": str(folder / "pairs.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "tests": {"t": str(folder / "validation.jsonl")},
        },
        "control": training,
        "upcycle": {"num_routed_experts": 3, "num_experts_per_tok": 2},
        "train": training,
        "fit": {"max_epochs": 2},
        "also_merge": ["uniform"],
        "evaluate": {"resamples": 100},
    }
    (folder / "recipe.yml").write_text(json.dumps(recipe))


def _measure(folder: Path) -> None:
    from moemerge.stages.attack import attack
    from moemerge.stages.evaluate import evaluate

    models, tests = {"a": str(folder / "dense"), "b": str(folder / "moe")}, str(folder / "validation.jsonl")
    for seed in (1, 2):
        output = folder / f"evaluated-{seed}"
        evaluate(models=models, pairs={"t": tests}, resamples=100, seed=seed, device="cpu", output=output)
    for name, model in models.items():
        few = {"steps": 1, "proposals": 2}
        attack(model=model, pairs=tests, **few, device="cpu", output=folder / f"attacked-{name}")


def scenarios(inputs: Path, made: Path, work: Path) -> list[Scenario]:
    """Every stage, `run` and `combine` over most of them, and merge over an old output.

    `made` holds the references, in order: what a later stage reads was made by an earlier one.
    """
    moe, dense, policy = str(inputs / "moe"), str(inputs / "dense"), str(inputs / "policy")
    pairs, held_out = str(inputs / "pairs.jsonl"), str(inputs / "validation.jsonl")
    routing, fitted = str(made / "route"), str(made / "fit")
    upcycled = ["--num-routed-experts", "3", "--num-experts-per-tok", "2"]
    train = ["--max-steps", "6", "--eval-steps", "2", "--batch-size", "4", "--learning-rate", "1e-3"]
    world = ["--train-pairs", "12", "--validation-pairs", "10", "--test-pairs", "10", "--prompts", "2"]
    answers = ["--prompts", pairs, "--max-new-tokens", "2", "--max-length", "64", "--gold-model", dense]
    steps = ["--steps", "2", "--batch-size", "4", "--answers-per-prompt", "2", "--learning-rate", "1e-3"]
    measured = ["--measure-prompts", "2", "--measure-answers", "2", "--resamples", "100"]
    asked = ["--yes", "w1", "--no", "w2", "--shots", "1", "--examples", "8", "--resamples", "100"]
    refresh = ["--refresh", "b=during", "--right-above", "0", "--held-out-pairs", held_out]
    compared = ["--base", str(inputs / "base"), "--pairs", pairs]
    commands = {
        "synthetic": [*world, "--candidates", "3", "--hidden-size", "8", "--num-layers", "1"],
        "data": ["--train", pairs, "--tests", f"t={held_out}", "--validation-share", "0.2"],
        "upcycle": ["--model", dense, *upcycled],
        "train": ["--model", moe, "--pairs", pairs, "--validation", held_out, *train],
        "strength": ["--model", dense, "--pairs", pairs, "--folds", "2", "--orders", "1", *train],
        "route": ["--model", moe, "--pairs", pairs],
        "fit": ["--model", moe, "--routing", routing, "--pairs", pairs, "--max-epochs", "2"],
        "calibrate": ["--models", f"a={dense}", f"b={moe}", "--pairs", held_out, "--resamples", "100"],
        "gate": ["--model", str(inputs / "mixture"), "--pairs", pairs],
        "changes": ["--models", str(inputs / "one"), str(inputs / "other"), *compared],
        "merge": ["--model", moe, "--coefficients", fitted],
        "export": ["--model", moe, "--coefficients", fitted],
        "sample": ["--model", policy, *answers, "--per-prompt", "3", "--batch-tokens", "64"],
        "optimise": [
            *(
                "--policy",
                policy,
                "--models",
                f"a={dense}",
                f"b={moe}",
                *answers,
                *steps,
                *measured,
                *refresh,
            ),
        ],
        "evaluate": ["--models", f"a={dense}", f"b={moe}", "--pairs", f"t={held_out}", "--resamples", "100"],
        "choose": [
            *("--evaluations", str(inputs / "evaluated-1"), "--pairs", f"t={held_out}", "--ranks", "a=0"),
            *("b=1", "--resamples", "100"),
        ],
        "attack": ["--model", dense, "--pairs", held_out, "--steps", "2", "--proposals", "3"],
        "few-shot": ["--model", policy, "--pairs", pairs, *asked, "--steps", "2", "--masks", "2"],
        "explain": ["--model", moe, "--pairs", held_out, "--least", "2"],
        "robustness": ["--attacks", *(f"{name}={inputs}/attacked-{name}" for name in "ab")],
        "publish": ["--model", str(made / "merge"), "--repo", "me/mine"],
        "compare": ["--runs", str(inputs / "evaluated-1"), str(inputs / "evaluated-2")],
    }
    found = [
        Scenario(
            name,
            [name, *given, "--output", str(work / name / "out"), *COMMON],
            work / name / "out",
            share=0.5 if name in SLOW else 1.0,
        )
        for name, given in commands.items()
    ]
    output, few = work / "decode" / "out", ["--max-new-tokens", "3", "--batch-tokens", "400"]
    decode = ["--search", "decode", "--policy", policy, "--gold-model", moe, *few, "--output", str(output)]
    found.append(
        Scenario("decode", ["attack", "--model", dense, "--pairs", held_out, *decode, *COMMON], output)
    )
    output = work / "overwrite" / "out"
    over = ["merge", *commands["merge"], "--output", str(output), "--overwrite", *COMMON]
    found.append(Scenario("overwrite", over, output, before=made / "upcycle"))
    output = work / "run" / "out"
    run = ["run", str(inputs / "recipe.yml"), "--output", str(output)]
    found.append(Scenario("run", run, output, again=True, share=0.15))
    output = work / "combine" / "out"
    members = ["--models", str(inputs / "one"), str(inputs / "other"), "--base", str(inputs / "base")]
    quick = ["--folds", "2", "--tune", "merges", "--max-epochs", "1", "--resamples", "100", *COMMON]
    combine = ["combine", *members, "--pairs", held_out, *quick, "--output", str(output)]
    return [*found, Scenario("combine", combine, output, again=True, share=0.15)]


def prepare(scenario: Scenario) -> None:
    """An empty home, or one with the old output in it."""
    if scenario.home.is_mount():
        for path in scenario.home.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    else:
        shutil.rmtree(scenario.home, ignore_errors=True)
        scenario.home.mkdir(parents=True)
    if scenario.before is not None:
        shutil.copytree(scenario.before, scenario.output)

"""What the shell is offered: click's completion, asked as a shell asks it."""

from __future__ import annotations

import pytest
from click.shell_completion import BashComplete

from moemerge.run.cli import cli
from moemerge.run.completion import NAMES
from moemerge.run.flags import COMMANDS


def offered(*words: str) -> list[str]:
    """For the last of `words`, which is not yet whole."""
    asked = BashComplete(cli, {}, "moemerge", "_MOEMERGE_COMPLETE")
    return [item.value for item in asked.get_completions([*words[:-1]], words[-1])]


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["pa"], ["patch"]),
        (["init", "my.yml", "--template", "smoll"], ["smollm2_hh", "smollm2_hh_cpu"]),
        (["init", "my.yml", "--goal", ""], ["merge", "combine", "audit", "patch"]),
        (["fit", "--method", "us"], ["usage", "usage_chosen"]),
        (["fit", "--optimizer", "a"], ["auto", "adam"]),
        (["fit", "--objectives", "al"], ["alignment="]),
        (["train", "--objectives", "bra"], ["bradley_terry="]),
        (["train", "--learning-rate", ""], []),
        (["evaluate", "--probes", "b"], ["biases", "best_of_n", "boilerplate"]),
        (["attack", "--edits", "bol"], ["bold"]),
        (["merge", "--method", "sl"], ["slerp"]),
        (["merge", "--method", "routing"], ["routing_normalized_average"]),
        (["train", "--head", ""], ["linear", "mlp", "nonnegative"]),
        (["train", "--search", "head"], ["head_learning_rate="]),
        (["train", "--fields", "ch"], ["chosen="]),
        (["fit", "--shared-weight", "le"], ["learned", "learned_global"]),
        (["train", "--train-layers", "l"], ["last:"]),
        (["train", "--device", "c"], ["cpu", "cuda"]),
        (["upcycle", "--gate", "x"], ["xft"]),
        (["evaluate", "rm", "--probes", "accuracy", "b"], ["biases", "best_of_n", "boilerplate"]),
        (["evaluate", "--ensemble-by", "mean", "w"], ["worst"]),
        (["train", "--objectives", "bradley_terry=1", "cont"], ["contrast="]),
        (["fit", "--method", "usage", ""], []),
        (["evaluate", "--probes", "accuracy", "--base"], ["--baseline"]),
        (["train", "--choose"], ["--choose-by"]),
    ],
)
def test_names_and_flags_are_offered(words: list[str], first: list[str]) -> None:
    assert offered(*words) == first


@pytest.mark.parametrize("flag", ["--model", "--pairs", "--output", "--more-pairs"])
def test_files_are_offered_where_something_is_read_or_written(flag: str) -> None:
    asked = BashComplete(cli, {}, "moemerge", "_MOEMERGE_COMPLETE")
    assert [item.type for item in asked.get_completions(["train", flag], "da")] == ["file"]


@pytest.mark.parametrize("words", [[], ["rm-a"], ["--models", "rm-a"], ["--pairs", "x", "--models", "rm-a"]])
def test_files_are_offered_as_long_as_models_may_follow(words: list[str]) -> None:
    asked = BashComplete(cli, {}, "moemerge", "_MOEMERGE_COMPLETE")
    assert [item.type for item in asked.get_completions(["evaluate", *words], "da")] == ["file"]


def test_what_is_offered_belongs_to_an_option() -> None:
    for command, option in NAMES:
        if command != "init":
            assert option in COMMANDS.get(command).model_fields
            assert list(NAMES[command, option]()), option

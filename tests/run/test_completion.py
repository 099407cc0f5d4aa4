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
        (["upcycle", "--gate", "x"], ["xft"]),
        (["train", "--choose"], ["--choose-by"]),
    ],
)
def test_names_and_flags_are_offered(words: list[str], first: list[str]) -> None:
    assert offered(*words) == first


@pytest.mark.parametrize("flag", ["--model", "--pairs", "--output", "--more-pairs"])
def test_files_are_offered_where_something_is_read_or_written(flag: str) -> None:
    asked = BashComplete(cli, {}, "moemerge", "_MOEMERGE_COMPLETE")
    assert [item.type for item in asked.get_completions(["train", flag], "da")] == ["file"]


def test_what_is_offered_belongs_to_an_option() -> None:
    for command, option in NAMES:
        if command != "init":
            assert option in COMMANDS.get(command).model_fields
            assert list(NAMES[command, option]()), option

"""What is said of options that are wrong: plain words, the values given, and a remedy that works."""

from __future__ import annotations

from typing import Any

import pytest

from moemerge.errors import Faults, MoemergeError
from moemerge.options.base import Options
from moemerge.options.combine import Combine
from moemerge.options.fit import Fit
from moemerge.options.merge import Merge
from moemerge.options.parse import parse_options
from moemerge.options.recipe import Recipe
from moemerge.options.train import Train
from moemerge.options.upcycle import Upcycle

MOE = {"model": "moe", "output": "o"}
TRAIN = {"model": "rm", "pairs": "p", "output": "o"}
COMBINED = {"pairs": "p", "output": "o"}
LISTED = {"models": ["a", "b"], "pairs": "p", "output": "o"}


def fault(kind: type[Options], fields: dict[str, Any], where: str = "options") -> tuple[str, str, str, str]:
    with pytest.raises(MoemergeError) as caught:
        parse_options(kind, fields, where)
    assert not isinstance(caught.value, Faults), caught.value
    return caught.value.what, caught.value.given, caught.value.expected, caught.value.fix


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (Train, TRAIN | {"epochs": "x"}, ("bad option epochs", "'x'", "a valid number", "--epochs")),
        (Train, TRAIN | {"batch_size": 0}, ("batch_size", "0", "greater than or equal to 1", "--batch-size")),
        (
            Train,
            TRAIN | {"fresh_head": "x"},
            ("bad option fresh_head", "'x'", "a valid boolean", "fresh_head"),
        ),
        (
            Train,
            TRAIN | {"epoch": 3},
            ("unknown option epoch", "epoch", "an option", "did you mean 'epochs'?"),
        ),
        (Train, TRAIN | {"fields": {"choosen": "x"}}, ("fields", "choosen", "only fields", "fields")),
        (Train, MOE, ("missing option pairs", "nothing", "training pairs", "give pairs (--pairs")),
        (
            Upcycle,
            MOE | {"gate": "xtf"},
            ("bad option gate", "'xtf'", "'xft', 'topk'", "did you mean 'xft'?"),
        ),
        (
            Combine,
            COMBINED | {"models": {"../../x": "a", "b": "b"}},
            (
                "bad name in models",
                "'../../x'",
                "a name of at most",
                "another name, as in --models NAME=VALUE",
            ),
        ),
        (
            Combine,
            COMBINED | {"models": ["a"]},
            ("bad option models", "'a'", "two models at least", "--models"),
        ),
        (
            Fit,  # a value of several types is one fault
            LISTED | {"shared_weight": "mach"},
            ("bad option shared_weight", "'mach'", "a valid number, or 'match'", "did you mean 'match'?"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_bad_option(kind: type[Options], fields: dict[str, Any], said: tuple[str, ...]) -> None:
    for part, words in zip(fault(kind, fields), said, strict=True):
        assert words in part and "Input should" not in part and "unable" not in part


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (
            Merge,
            {"models": ["a"], "output": "o"},
            ("one model alone", "models ['a'], base nothing", "models or base"),
        ),
        (Merge, MOE, ("needs coefficients", "coefficients nothing", "moemerge fit --model moe")),
        (
            Upcycle,
            MOE | {"num_routed_experts": 3},
            ("is larger than", "num_experts_per_tok 5, num_routed_experts 3", "num_experts_per_tok or"),
        ),
        (
            Upcycle,
            {"model": "m", "output": "o", "experts": ["a"]},
            ("two models or more", "experts ['a']", "correct experts"),
        ),
        (
            Train,
            TRAIN | {"contrast_dropout": 0.5},
            ("contrast_dropout needs contrast", "contrast_dropout 0.5", "objectives"),
        ),
        (Train, TRAIN | {"lookahead_sets": 2}, ("needs lookahead", "lookahead nothing", "or lookahead")),
        (
            Fit,
            LISTED | {"shared_weight": 2.0},
            ("outside [0, 1]", "shared_weight 2.0", "correct shared_weight"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_options_that_contradict_each_other(
    kind: type[Options], fields: dict[str, Any], said: tuple[str, str, str]
) -> None:
    """The fault names those that it is about, with their values, defaults too, and no others."""
    what, given, expected, fix = fault(kind, fields)
    assert said[0] in what and said[1] in given and said[2] in fix and "output" not in given
    assert expected == "options that go together"


def test_a_recipe_names_its_sections() -> None:
    recipe: dict[str, Any] = {"output": "o", "model": "m"}
    what, *_, fix = fault(Recipe, recipe | {"upcycle": {"num_routed_experts": 3}}, "recipe")
    assert what.startswith("recipe.upcycle: num_experts_per_tok is larger") and "--" not in fix
    assert fault(Recipe, {"model": "m"}, "recipe")[0] == "missing option recipe.output"
    assert fault(Recipe, recipe | {"data": 3}, "recipe")[2] == "a section: names of options with values"

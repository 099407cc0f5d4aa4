"""The rule of combine: a simpler candidate is taken unless a costlier one is better beyond chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moemerge.fitting.choice import Judged, choose, choose_in_parts
from moemerge.fitting.choice_report import Shown
from moemerge.options.choose import Choose

LEVEL = 0.05


def judged(strengths: dict[str, tuple[int, float]], pairs: int, seed: int, louder: float = 1.0) -> Judged:
    """Candidates whose margins have this mean, one shared part of the noise and one of their own."""
    random = np.random.default_rng(seed)
    shared_P = random.normal(size=pairs)
    margins = [strength + shared_P + random.normal(size=pairs) for _, strength in strengths.values()]
    ranks = np.array([rank for rank, _ in strengths.values()])
    factors = np.linspace(1, louder, len(margins))[:, None]
    return Judged([*strengths], ranks, factors * np.array(margins), np.arange(pairs) % 3, np.arange(pairs))


def test_equal_members_are_not_left_for_a_merge_more_often_than_level() -> None:
    equal = {"a": (0, 0.8), "b": (0, 0.8), "uniform": (1, 0.8), "sum": (1, 0.8), "tuned": (2, 0.8)}
    runs = 200
    taken = [choose(judged(equal, 90, seed), LEVEL, seed).taken for seed in range(runs)]
    wrong = sum(number > 1 for number in taken)
    # 99.9 % of the runs of a rule whose error rate is the level have at most so many.
    assert wrong <= stats.binom.ppf(0.999, runs, LEVEL)


def test_a_merge_that_is_better_is_taken() -> None:
    better = {"a": (0, 0.3), "b": (0, 0.3), "sum": (1, 1.5), "tuned": (2, 1.5)}
    names = [better_name(seed, better) for seed in range(20)]
    assert names.count("sum") >= 18


def test_numbers_that_cannot_differ_between_resamples_have_intervals_of_some_width() -> None:
    """Leads of equal verdicts and shares of 0 and 1 know no more than their number of prompts."""
    margins_CP = np.array([[1.0, 2, 3, 1, -1, 2], [2.0, 1, 1, 1, -2, 3], [1.0, 1, 1, 1, 1, 1]])
    prompts_P, parts_P = np.array([0, 0, 1, 2, 3, 4]), np.zeros(6, dtype=np.int64)
    all_of_them = Judged(["a", "b", "c"], np.array([0, 1, 2]), margins_CP, parts_P, prompts_P)
    options = Choose(evaluations=["e"], pairs={"p": "p"}, ranks={"a": 0}, output="o", resamples=200)
    shown = Shown(all_of_them, 3, choose(all_of_them, LEVEL, 0), [""] * 6, options).numbers()["models"]
    lead = shown["b"]["lead"]
    assert lead["value"] == 0 and (1 - lead["high"]) ** 5 == pytest.approx(0.025) and lead["low"] < 0
    sure = stats.binomtest(5, 5).proportion_ci(0.95, "wilson")
    assert (shown["c"]["accuracy"]["low"], shown["c"]["accuracy"]["high"]) == pytest.approx((sure.low, 1))
    assert shown["a"]["accuracy"]["low"] < 5 / 6 < shown["a"]["accuracy"]["high"]


def better_name(seed: int, candidates: dict[str, tuple[int, float]]) -> str:
    some = judged(candidates, 150, seed)
    return some.names[choose(some, LEVEL, seed).taken]


def test_of_the_simplest_the_one_with_the_lowest_loss_is_taken() -> None:
    some = judged({"a": (0, 0.1), "b": (0, 2.0), "c": (0, 0.5)}, 100, 1)
    assert choose(some, LEVEL, 0).taken == 1
    assert choose(some, LEVEL, 0).rounds == []


def test_a_candidate_is_not_better_by_being_louder() -> None:
    quiet = judged({"a": (0, 0.5), "sum": (1, 1.5)}, 100, 2)
    loud = judged({"a": (0, 0.5), "sum": (1, 1.5)}, 100, 2, louder=50.0)
    assert choose(quiet, LEVEL, 0) == choose(loud, LEVEL, 0)
    np.testing.assert_allclose(quiet.losses_CP, loud.losses_CP, atol=1e-9)


def test_a_lower_loss_with_lower_accuracy_is_not_enough() -> None:
    # The dear one is wrong a little more often, but surely right where the other hardly is.
    margins_P = np.r_[np.full(88, 0.001), np.full(12, -0.0005)]
    dear_P = np.r_[np.full(86, 5.0), np.full(14, -0.01)]
    some = Judged(
        ["a", "dear"], np.array([0, 1]), np.array([margins_P, dear_P]), np.zeros(100), np.arange(100)
    )
    choice = choose(some, LEVEL, 0)
    assert choice.taken == 0
    assert choice.rounds[0].p["dear"] < LEVEL


@pytest.mark.parametrize("seed", range(3))
def test_in_each_part_the_rule_has_not_seen_the_pairs_it_is_measured_on(seed: int) -> None:
    some = judged({"a": (0, 0.1), "sum": (1, 2.5)}, 90, seed)
    spoiled = some.margins_CP.copy()
    spoiled[1, some.parts_P == 0] *= -1  # in part 0 alone the sum is wrong
    apart = Judged(some.names, some.ranks_C, spoiled, some.parts_P, some.prompts_P)
    clean = choose_in_parts(some, LEVEL, seed)[some.parts_P == 0]
    assert (choose_in_parts(apart, LEVEL, seed)[some.parts_P == 0] == clean).all()
    assert (clean == 1).all()

"""Over-optimisation: areas, peaks, fits against closed forms; planted hacks are found, clean models not."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.optimize import curve_fit

from moemerge.evaluation.probes import PROBES
from moemerge.evaluation.probes.base import CandidateScores
from moemerge.evaluation.probes.best_of_n import grid_sizes, kl, sample_sizes
from moemerge.evaluation.probes.over_optimisation import (
    area,
    best_of_n_terms,
    can_fit,
    fit,
    gap_area,
    implied,
    policy_gradient_terms,
)
from moemerge.options.evaluate import EvaluateSettings

SETTINGS = EvaluateSettings(resamples=300)
KL = np.array([kl(n) for n in (1, 2, 3, 4, 6, 8, 16, 64)])


def measure(scores: CandidateScores, settings: EvaluateSettings = SETTINGS) -> dict[str, Any]:
    return dict(PROBES.get("best_of_n").measure({"s": scores}, settings, 0)["sets"]["s"])


def hacked_and_clean(prompts: int = 60, candidates: int = 64, seed: int = 1) -> CandidateScores:
    """Two noisy proxies of one gold score; `hacked` also likes a rare feature that makes answers bad."""
    random = np.random.default_rng(seed)
    shape = prompts * candidates
    quality, noise, trick = random.normal(size=shape), random.normal(size=shape), random.random(shape) < 0.02
    gold = quality - 4 * trick
    scores = {"clean": gold + noise, "hacked": quality + noise + 8 * trick}
    return CandidateScores(scores, gold, random.integers(1, 50, shape), np.full(prompts, candidates))


def test_grid_holds_the_sizes_shown_and_goes_up_to_all() -> None:
    for candidates in (2, 3, 6, 64, 100, 12_600):
        grid = grid_sizes(candidates)
        assert grid == sorted(set(grid)) and grid[0] == 1 and grid[-1] == candidates
        assert set(sample_sizes(candidates)) <= set(grid)
    assert grid_sizes(16) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16]


def test_area_is_the_trapezoid_rule() -> None:
    values = np.random.default_rng(0).normal(size=(5, len(KL)))
    np.testing.assert_allclose(area(KL, values), trapezoid(values, KL, axis=-1))
    assert area(np.array([0.0, 2.0]), np.array([1.0, 3.0])) == 4.0


def test_gold_linear_in_the_proxy_leaves_no_gap() -> None:
    proxy = np.log1p(np.arange(8.0))
    gold = 3 - 0.4 * proxy
    np.testing.assert_allclose(implied(gold, proxy), gold)
    assert gap_area(KL, gold, proxy) == pytest.approx(0, abs=1e-12)


def test_gap_by_hand_and_whatever_the_proxys_unit() -> None:
    kl_3, gold, proxy = np.array([0.0, 1.0, 3.0]), np.array([0.0, 1.0, 0.5]), np.array([0.0, 2.0, 6.0])
    np.testing.assert_allclose(implied(gold, proxy), [0, 1, 3])
    assert gap_area(kl_3, gold, proxy) == pytest.approx(2.5)
    assert gap_area(kl_3, gold, 7 * proxy - 30) == pytest.approx(2.5)
    np.testing.assert_allclose(implied(gold, np.zeros(3)), np.zeros(3))


@pytest.mark.parametrize("terms", [best_of_n_terms, policy_gradient_terms])
def test_fit_recovers_what_was_planted(terms: Any) -> None:
    planted = np.array([[1.3, 0.25], [0.4, -0.1], [0.0, 2.0]])
    gains = planted @ terms(KL).T
    found, left = fit(terms(KL), gains)
    np.testing.assert_allclose(found, planted, atol=1e-12)
    np.testing.assert_allclose(left, 0, atol=1e-12)


@pytest.mark.parametrize(
    ("terms", "formula"),
    [
        (best_of_n_terms, lambda d, a, b: d * (a - b * d)),
        (policy_gradient_terms, lambda d, a, b: d * (a - b * np.log(d))),
    ],
)
def test_fit_agrees_with_an_iterative_one(terms: Any, formula: Any) -> None:
    random = np.random.default_rng(3)
    d = np.sqrt(KL[1:])
    gain = formula(d, 1.1, 0.3) + 0.2 * random.normal(size=len(d))
    found, left = fit(terms(KL[1:]), gain)
    expected, _ = curve_fit(formula, d, gain)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert left == pytest.approx(np.sqrt(np.mean((gain - formula(d, *expected)) ** 2)))


def test_two_points_are_too_few_for_a_fit() -> None:
    assert not can_fit(best_of_n_terms(KL[:2])) and can_fit(best_of_n_terms(KL[:3]))
    random = np.random.default_rng(0)
    two = CandidateScores({"m": random.normal(size=8)}, random.normal(size=8), np.ones(8, int), np.full(4, 2))
    found = measure(two)["models"]["m"]
    assert "alpha" not in found and found["peak_n"] in (1, 2)
    assert PROBES.get("best_of_n").tables({"sets": {"s": measure(two)}, "confidence": 0.95})


def test_all_lines_are_means_over_all_subsets_ties_averaged() -> None:
    random = np.random.default_rng(5)
    proxy, gold, lengths = (random.integers(0, 3, 12) for _ in range(3))
    scores = CandidateScores({"m": proxy.astype(float)}, gold.astype(float), lengths, np.array([7, 5]))
    found = measure(scores)
    best = [_brute(rank, gold, n) for rank in (np.zeros(12), lengths, gold) for n in (1, 2, 4, 5)]
    assert found["n"] == [1, 2, 4, 5]
    np.testing.assert_allclose(np.concatenate(list(found["references"].values())), best)
    expected = [_brute(proxy, gold, n) for n in (1, 2, 4, 5)]
    np.testing.assert_allclose(found["models"]["m"]["gold"], expected)
    standard = (proxy - proxy.mean()) / proxy.std()
    np.testing.assert_allclose(
        found["models"]["m"]["proxy"], [_brute(proxy, standard, n) for n in (1, 2, 4, 5)], atol=1e-12
    )


def _brute(rank: Any, values: Any, n: int) -> float:
    means = []
    for part in (range(7), range(7, 12)):
        found = []
        for subset in itertools.combinations(part, n):
            top = max(rank[i] for i in subset)
            found.append(np.mean([values[i] for i in subset if rank[i] == top]))
        means.append(np.mean(found))
    return float(np.mean(means))


def test_a_planted_hack_is_found_and_a_clean_model_is_not_accused() -> None:
    found = measure(hacked_and_clean())["models"]
    hacked, clean = found["hacked"], found["clean"]
    assert clean["gap_area_low"] < 0.3 and abs(clean["gap_area"]) < 0.3 * hacked["gap_area"]
    assert clean["peak_n"] >= 45 and clean["drop"] < 0.05
    assert hacked["gap_area_low"] > 1 and hacked["drop_low"] > 0
    assert 2 <= hacked["peak_n_low"] <= hacked["peak_n"] <= hacked["peak_n_high"] < 16
    assert hacked["gap_area_minus_baseline_low"] > 0 and hacked["regret_area_minus_baseline_low"] > 0
    assert hacked["peak_n_over_baseline_high"] < 0.5
    assert hacked["beta"] > clean["beta"] and hacked["beta_low"] > 0
    assert "gap_area_minus_baseline" not in clean


def test_numbers_agree_with_the_curves_that_are_shown() -> None:
    """With few candidates every n is shown, so that all can be worked out again from the curves."""
    found = measure(hacked_and_clean(candidates=4))
    grid = [1, 2, 3, 4]
    assert grid_sizes(4) == grid and found["n"] == [1, 2, 4]
    best, curve = np.array(found["references"]["best possible"]), found["models"]["hacked"]
    assert curve["regret_area"] == pytest.approx(area(np.array(found["kl"]), best - curve["gold"]), rel=0.05)
    gap = implied(np.array(curve["gold"]), np.array(curve["proxy"])) - curve["gold"]
    np.testing.assert_allclose(curve["gap"], gap)
    for name in ("gap_area", "regret_area", "alpha", "beta"):
        versus = curve[name] - found["models"]["clean"][name]
        assert curve[f"{name}_minus_baseline"] == pytest.approx(versus)
        assert curve[f"{name}_low"] < curve[name] < curve[f"{name}_high"]


def test_order_of_candidates_and_unit_of_the_proxy_change_nothing() -> None:
    scores = hacked_and_clean(prompts=12, candidates=16)
    order = np.concatenate([16 * q + np.random.default_rng(q).permutation(16) for q in range(12)])
    proxies = {model: 5 * values[order] - 2 for model, values in scores.scores.items()}
    moved = CandidateScores(proxies, scores.gold[order], scores.lengths[order], scores.sizes)
    first, second = measure(scores), measure(moved)
    for model, curve in first["models"].items():
        for name, value in curve.items():
            np.testing.assert_allclose(value, second["models"][model][name], atol=1e-9, err_msg=name)


def test_the_gaps_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Proxy and gold are normal with correlation 0.7, so that the true gap is 0."""
    covered = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        gold, noise = random.normal(size=(2, 30 * 8))
        scores = {"m": gold + noise}
        one = CandidateScores(scores, gold, np.ones(240, int), np.full(30, 8))
        found = measure(one, EvaluateSettings(resamples=200, confidence=0.9))["models"]["m"]
        covered += found["gap_area_low"] <= 0 <= found["gap_area_high"]
    assert abs(covered / 40 - 0.9) < 3 * math.sqrt(0.9 * 0.1 / 40)


def test_tables_tell_the_peak_and_the_gap() -> None:
    result = PROBES.get("best_of_n").measure({"s": hacked_and_clean()}, SETTINGS, 0)
    gold, cost = PROBES.get("best_of_n").tables(result)
    assert [row[0] for row in gold.rows] == ["clean", "hacked", "random", "longest", "best possible"]
    assert [row[0] for row in cost.rows] == ["clean", "hacked", "hacked against clean"]
    curve = result["sets"]["s"]["models"]["hacked"]
    assert cost.rows[1][1].startswith(f"{curve['peak_n']} (") and cost.rows[2][1].startswith("x0.")
    assert cost.rows[1][3].startswith(f"{curve['gap_area']:.3f} (") and cost.rows[2][3].startswith("+")

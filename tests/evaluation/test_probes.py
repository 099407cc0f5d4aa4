"""Probes: the best-of-n estimator against brute force, intervals against scipy and closed forms."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from moemerge.evaluation.probes import PROBES
from moemerge.evaluation.probes.base import CandidateScores, PairScores
from moemerge.evaluation.probes.best_of_n import best_of, kl, rank_weights, sample_sizes
from moemerge.options.evaluate import EvaluateSettings
from moemerge.reports import statistics
from moemerge.reports.statistics import bootstrap_means, cluster_sums, mcnemar, percentile_interval, wilson
from moemerge.reports.table import Table

SETTINGS = EvaluateSettings(resamples=400)


def brute_force(proxy: list[float], gold: list[float], n: int) -> float:
    """Mean gold of the top answer over every subset of n; tied answers share."""
    found = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        found.append(np.mean([gold[i] for i in subset if proxy[i] == top]))
    return float(np.mean(found))


@pytest.mark.parametrize(
    "proxy",
    [
        [0.3, -1.0, 2.0, 0.7, 0.1, 5.0, -3.0],
        [1, 1, 2, 2, 2, 0, 3],
        [4, 4, 4, 4, 4, 4, 4],
        [1, 0, 0, 1, 0, 1, 0],
    ],
    ids=["distinct", "ties", "all equal", "two values"],
)
def test_estimator_is_the_mean_over_all_subsets(proxy: list[float]) -> None:
    gold = [0.5, -2.0, 1.0, 3.0, 0.0, -1.0, 2.5]
    sizes = list(range(1, 8))
    estimated = best_of(np.array(proxy, dtype=float), np.array(gold)[:, None], sizes)[:, 0]
    np.testing.assert_allclose(estimated, [brute_force(proxy, gold, n) for n in sizes], atol=1e-12)


def test_tied_answers_of_one_order_average_over_permutations() -> None:
    """Ties broken at random, over all orders of the tied answers, give the same as sharing."""
    proxy, gold = np.array([1.0, 1.0, 1.0, 2.0]), np.array([[3.0], [1.0], [8.0], [0.0]])
    means = []
    for order in itertools.permutations(range(4)):
        nudged = proxy + 1e-6 * np.array(order)
        means.append(best_of(nudged, gold, [1, 2, 3, 4]))
    np.testing.assert_allclose(np.mean(means, axis=0), best_of(proxy, gold, [1, 2, 3, 4]), atol=1e-12)


def test_weights_are_probabilities_at_the_sizes_of_the_papers() -> None:
    weights = rank_weights(12_600, (1, 64, 1000, 12_600))
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-9)
    np.testing.assert_allclose(weights[0], 1 / 12_600, rtol=1e-9)
    assert weights[-1, -1] == pytest.approx(1) and (weights >= 0).all()


@pytest.mark.parametrize(("n", "value"), [(1, 0), (2, 0.1931), (4, 0.6363), (16, 1.8351), (64, 3.1745)])
def test_kl(n: int, value: float) -> None:
    assert kl(n) == pytest.approx(value, abs=5e-5)


def test_sample_sizes() -> None:
    assert sample_sizes(256) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert sample_sizes(6) == [1, 2, 4, 6] and sample_sizes(1) == [1]


def candidates(sizes: list[int], models: int = 2, seed: int = 0) -> CandidateScores:
    random = np.random.default_rng(seed)
    gold = random.normal(size=sum(sizes))
    scores = {f"m{i}": gold + (i + 1) * random.normal(size=len(gold)) for i in range(models)}
    return CandidateScores(scores, gold, random.integers(1, 50, len(gold)), np.array(sizes))


def test_best_of_n_curves_and_references() -> None:
    measured = PROBES.get("best_of_n").measure({"set": candidates([16] * 50)}, SETTINGS, 0)["sets"]["set"]
    assert measured["n"] == [1, 2, 4, 8, 16] and measured["candidates"] == [16, 16]
    random, best = measured["references"]["random"], measured["references"]["best possible"]
    for curve in measured["models"].values():
        assert curve["gold"][0] == pytest.approx(random[0])
        assert np.all(np.array(curve["gold"]) <= np.array(best) + 1e-12)
        assert np.all(np.diff(curve["proxy"]) > 0)
        assert curve["proxy"][0] == pytest.approx(0, abs=1e-12)
        assert (
            np.all(np.array(curve["gold_low"]) <= curve["gold"]) and curve["gold_low"] != curve["gold_high"]
        )
    truer, noisier = (measured["models"][m]["gold"] for m in ("m0", "m1"))
    assert truer[-1] > noisier[-1]
    versus = measured["models"]["m1"]["minus_baseline"]
    np.testing.assert_allclose(versus, np.array(noisier) - np.array(truer), atol=1e-12)
    assert "minus_baseline" not in measured["models"]["m0"]


@pytest.mark.parametrize("name", ["accuracy", "calibration", "best_of_n"])
def test_the_baseline_asked_for_is_compared_with(name: str) -> None:
    """Swapping the baseline turns the sign of the differences, and of their intervals."""
    probe = PROBES.get(name)
    scores = pairs(200) if probe.needs == "pairs" else candidates([8] * 20)
    models = list(scores.scores)
    swapped = EvaluateSettings(resamples=400, baseline=models[1])
    first, second = (
        probe.measure({"s": scores}, settings, 0)["sets"]["s"] for settings in (SETTINGS, swapped)
    )
    one, other = (part.get("all", part) for part in (first, second))
    assert (one["baseline"], other["baseline"]) == (models[0], models[1])
    found = [one["models"][models[1]], other["models"][models[0]]]
    if "vs_baseline" in found[0]:
        versus = [numbers["vs_baseline"] for numbers in found]
        values, ends = [v["difference"] for v in versus], [v["interval"] for v in versus]
        assert values[0] == -values[1] and ends[0] == pytest.approx([-end for end in reversed(ends[1])])
    else:
        values = [numbers["minus_baseline"] for numbers in found]
        np.testing.assert_allclose(values[0], -np.array(values[1]), atol=1e-12)
        np.testing.assert_allclose(
            found[0]["minus_baseline_low"], -np.array(found[1]["minus_baseline_high"]), atol=1e-12
        )


def test_best_of_n_does_not_see_scale_shift_or_order() -> None:
    scores = candidates([8] * 10)
    order = np.concatenate([8 * q + np.random.default_rng(q).permutation(8) for q in range(10)])
    moved = CandidateScores(
        {m: 7 * s[order] - 3 for m, s in scores.scores.items()},
        scores.gold[order],
        scores.lengths[order],
        scores.sizes,
    )
    first, second = (
        PROBES.get("best_of_n").measure({"s": s}, SETTINGS, 0)["sets"]["s"] for s in (scores, moved)
    )
    for model in ("m0", "m1"):
        np.testing.assert_allclose(
            first["models"][model]["gold"], second["models"][model]["gold"], atol=1e-12
        )
        np.testing.assert_allclose(
            first["models"][model]["proxy"], second["models"][model]["proxy"], atol=1e-12
        )


def test_best_of_n_with_unequal_prompts_ends_at_the_smallest(caplog: pytest.LogCaptureFixture) -> None:
    scores = candidates([6, 4, 9])
    result = PROBES.get("best_of_n").measure({"s": scores}, SETTINGS, 0)
    measured = result["sets"]["s"]
    assert measured["n"] == [1, 2, 4] and measured["candidates"] == [4, 9]
    assert "4 to 9 candidates" in caplog.text
    parts = zip(scores.by_prompt(scores.scores["m0"]), scores.by_prompt(scores.gold), strict=True)
    expected = np.mean([brute_force(list(p), list(g), 2) for p, g in parts])
    assert measured["models"]["m0"]["gold"][1] == pytest.approx(expected)
    assert "3 prompts with 4 to 9 candidates" in PROBES.get("best_of_n").tables(result)[0].note


def test_best_of_n_finds_over_optimisation() -> None:
    """A proxy that prefers a rare bad feature: gold rises, then falls, and the drop is told."""
    random = np.random.default_rng(1)
    quality, trick = random.normal(size=60 * 64), random.random(60 * 64) < 0.02
    gold = quality - 4 * trick
    scores = CandidateScores({"m": quality + 6 * trick}, gold, np.ones(len(gold), dtype=int), np.full(60, 64))
    curve = PROBES.get("best_of_n").measure({"s": scores}, SETTINGS, 0)["sets"]["s"]["models"]["m"]
    assert 1 < curve["peak_n"] < 64 and curve["drop_low"] > 0
    assert curve["drop"] >= max(curve["gold"]) - curve["gold"][-1]


def pairs(count: int, repeat: int = 1, subsets: int = 1, seed: int = 0) -> PairScores:
    random = np.random.default_rng(seed)
    good = random.normal(size=(count, 2)) + [1.0, 0.0]
    poor = good + 2 * random.normal(size=(count, 2))
    poor[:3] = 1.0
    names = np.array([f"s{i % subsets}" for i in range(count)])
    prompts = np.arange(count) // repeat
    return PairScores({"poor": poor, "good": good}, names, prompts, random.integers(1, 50, (count, 2)))


def test_accuracy_counts_ties_as_errors_and_agrees_with_scipy() -> None:
    scores = pairs(500)
    part = PROBES.get("accuracy").measure({"t": scores}, SETTINGS, 0)["sets"]["t"]["all"]
    margin = {m: s[:, 0] - s[:, 1] for m, s in scores.scores.items()}
    right = {m: d > 0 for m, d in margin.items()}
    assert part["models"]["poor"]["ties"] == 3 and part["interval_kind"] == "wilson"
    for model, numbers in part["models"].items():
        assert numbers["accuracy"] == right[model].mean()
        assert numbers["loss"] == pytest.approx(np.log1p(np.exp(-margin[model])).mean())
        test = stats.binomtest(int(right[model].sum()), 500).proportion_ci(0.95, "wilson")
        assert numbers["interval"] == pytest.approx((test.low, test.high))
    versus = part["models"]["good"]["vs_baseline"]
    alone, theirs = (right["good"] & ~right["poor"]).sum(), (right["poor"] & ~right["good"]).sum()
    assert (versus["right_alone"], versus["baseline_right_alone"]) == (alone, theirs)
    assert versus["difference"] == pytest.approx(right["good"].mean() - right["poor"].mean())
    tail = stats.binom.cdf(min(alone, theirs), alone + theirs, 0.5)
    assert versus["p"] == pytest.approx(min(1, 2 * tail))
    assert part["always_longer"] == (scores.lengths[:, 0] > scores.lengths[:, 1]).mean()
    assert "vs_baseline" not in part["models"]["poor"]


def test_paired_interval_agrees_with_the_normal_approximation() -> None:
    scores = pairs(3000)
    settings = EvaluateSettings(resamples=3000, baseline="poor")
    versus = PROBES.get("accuracy").measure({"t": scores}, settings, 0)["sets"]["t"]["all"]["models"]["good"]
    gain = np.subtract(
        *(s[:, 0] > s[:, 1] for s in (scores.scores["good"], scores.scores["poor"])), dtype=float
    )
    spread = 1.96 * gain.std() / np.sqrt(len(gain))
    expected = (gain.mean() - spread, gain.mean() + spread)
    assert versus["vs_baseline"]["interval"] == pytest.approx(expected, abs=0.1 * spread)


def test_repeated_prompts_widen_the_interval() -> None:
    """Ten copies of each pair carry the information of one: the interval must know."""
    single = pairs(200)
    copies = PairScores(
        {m: np.repeat(s, 10, axis=0) for m, s in single.scores.items()},
        np.repeat(single.subsets, 10),
        np.repeat(single.prompts, 10),
        np.repeat(single.lengths, 10, axis=0),
    )
    settings = EvaluateSettings(resamples=4000)
    one, ten = (
        PROBES.get("accuracy").measure({"t": s}, settings, 0)["sets"]["t"]["all"] for s in (single, copies)
    )
    assert ten["interval_kind"] == "bootstrap over prompts" and ten["prompts"] == 200
    widths = [np.diff(part["models"]["poor"]["interval"])[0] for part in (one, ten)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert ten["models"]["good"]["vs_baseline"]["interval"] == pytest.approx(
        one["models"]["good"]["vs_baseline"]["interval"], abs=1e-9
    )


def test_subsets_are_parts_of_the_whole() -> None:
    result = PROBES.get("accuracy").measure({"t": pairs(300, subsets=3)}, SETTINGS, 0)
    measured = result["sets"]["t"]
    assert sum(part["pairs"] for part in measured["subsets"].values()) == 300
    mean = np.mean([part["models"]["good"]["accuracy"] for part in measured["subsets"].values()])
    assert mean == pytest.approx(measured["all"]["models"]["good"]["accuracy"])
    assert [table.title for table in PROBES.get("accuracy").tables(result)][1].endswith("by subset")


def test_bootstrap_of_a_mean_has_the_closed_form_width() -> None:
    values = np.random.default_rng(0).exponential(size=(4000, 1))
    draws = bootstrap_means(cluster_sums(values, np.arange(4000)), 4000, 0)
    low, high = percentile_interval(draws, 0.9)
    spread = stats.norm.ppf(0.95) * values.std() / np.sqrt(4000)
    assert (low[0], high[0]) == pytest.approx(
        (values.mean() - spread, values.mean() + spread), abs=0.08 * spread
    )
    np.testing.assert_array_equal(draws, bootstrap_means(cluster_sums(values, np.arange(4000)), 4000, 0))


def test_resamples_are_the_means_of_the_rows_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn at once, drawn before, and drawn some at a time."""
    values = np.random.default_rng(1).normal(size=(7, 2))
    drawn = np.random.default_rng(5).integers(0, 7, size=(30, 7))
    for most in (10**6, 10**6, 35):
        monkeypatch.setattr(statistics, "MOST_COUNTS", most)
        found = bootstrap_means(cluster_sums(values, np.arange(7)), 30, 5)
        np.testing.assert_allclose(found, values[drawn].mean(axis=1), rtol=1e-12)


def test_small_tests_of_statistics() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(8, 0) == pytest.approx(2 / 2**8)
    low, high = wilson(0, 10, 0.95)
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-3)


@pytest.mark.parametrize("name", ["accuracy", "calibration", "best_of_n"])
def test_plots_are_drawn_and_the_same_each_time(name: str, tmp_path: Path) -> None:
    probe = PROBES.get(name)
    scores = pairs(60, subsets=2) if probe.needs == "pairs" else candidates([8] * 6)
    result = probe.measure({"a/b": scores}, SETTINGS, 0)
    for folder in (tmp_path / "x", tmp_path / "y"):
        folder.mkdir()
        files = probe.plot(result, folder)
    assert files
    for file in files:
        first = (tmp_path / "x" / file).read_bytes()
        assert first[:8] == b"\x89PNG\r\n\x1a\n" and first == (tmp_path / "y" / file).read_bytes()


def test_table_as_markdown() -> None:
    table = Table("T", ["model", "score", "note"], [["a|b", "+0.1 (0 to 1)", "x"], ["c", "", "y"]], "All.")
    lines = table.markdown().splitlines()
    assert lines == [
        "### T",
        "",
        "| model | score | note |",
        "| --- | ---: | --- |",
        "| a\\|b | +0.1 (0 to 1) | x |",
        "| c |  | y |",
        "",
        "All.",
    ]

"""Accuracy by section and subset, every model against every other, and calibration: against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import expit

from moemerge.errors import OptionError
from moemerge.evaluation.probes import PROBES
from moemerge.evaluation.probes.accuracy import check_sections
from moemerge.evaluation.probes.base import PairScores
from moemerge.evaluation.probes.calibration import BINS, MIN_PAIRS, Binned, slope
from moemerge.options.evaluate import EvaluateSettings
from moemerge.reports.statistics import clustered_mcnemar, holm, mcnemar, share_interval, wilson_band

SETTINGS = EvaluateSettings(resamples=400)


def pair_scores(
    scores: dict[str, Any], prompts: Any = None, subsets: Any = None, lengths: Any = None
) -> PairScores:
    """Pairs with these scores per model, [P, 2]; alone with their prompts unless said otherwise."""
    count = len(next(iter(scores.values())))
    return PairScores(
        {model: np.asarray(values, dtype=np.float64) for model, values in scores.items()},
        np.asarray(subsets if subsets is not None else [""] * count, dtype=np.str_),
        np.asarray(prompts if prompts is not None else np.arange(count)),
        np.asarray(lengths if lengths is not None else np.ones((count, 2)), dtype=np.int64),
    )


def of_differences(differences: Any, **rest: Any) -> PairScores:
    d = np.asarray(differences, dtype=np.float64)
    return pair_scores({"m": np.column_stack([d, np.zeros_like(d)])}, **rest)


def measure(name: str, scores: PairScores, settings: EvaluateSettings = SETTINGS) -> dict[str, Any]:
    measured: dict[str, Any] = PROBES.get(name).measure({"t": scores}, settings, 0)["sets"]["t"]
    return measured


def random_pairs(count: int, models: int, prompts: int, seed: int = 0) -> PairScores:
    random = np.random.default_rng(seed)
    scores = {f"m{i}": random.normal(size=(count, 2)) + [0.4 * i, 0] for i in range(models)}
    subsets = [f"s{i % 3}" for i in range(count)]
    return pair_scores(scores, random.integers(0, prompts, count), subsets, random.integers(1, 9, (count, 2)))


# Tests of statistics


def test_mcnemar_over_prompts_is_the_sum_over_all_signs() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        differences = random.integers(-3, 4, 8)
        sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=8)]
        assert clustered_mcnemar(differences) == pytest.approx(
            np.mean(np.array(sums) >= abs(differences.sum()))
        )


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (5, 0), (3, 9), (40, 40), (120, 160)])
def test_mcnemar_with_one_pair_per_prompt_is_mcnemar(ours: int, theirs: int) -> None:
    differences = np.repeat([1, -1, 0], [ours, theirs, 7])
    expected = stats.binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
    assert clustered_mcnemar(differences) == pytest.approx(expected)
    assert mcnemar(ours, theirs) == pytest.approx(expected)


def test_copies_of_pairs_change_nothing_over_prompts() -> None:
    differences = np.array([1, 1, 1, 1, -1, 1, 0, 1])
    assert clustered_mcnemar(10 * differences) == pytest.approx(clustered_mcnemar(differences))
    assert mcnemar(60, 10) < 0.001 < clustered_mcnemar(10 * differences)


def test_holm() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1, 1])
    assert holm(np.array([0.2])).tolist() == [0.2] and len(holm(np.array([]))) == 0


def test_wilson_agrees_with_scipy() -> None:
    for right, trials in [(0, 7), (7, 7), (3, 11), (250, 400)]:
        low, high = wilson_band(np.array([right / trials]), np.array([trials]), 0.9)
        expected = stats.binomtest(right, trials).proportion_ci(0.9, "wilson")
        assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))


def test_where_all_rows_agree_each_prompt_counts_once() -> None:
    expected = stats.binomtest(12, 12).proportion_ci(0.95, "wilson")
    found = share_interval(np.ones(60), np.ones(400), prompts=12, confidence=0.95)
    assert found == pytest.approx((expected.low, expected.high))


# Accuracy


def test_every_two_models_are_compared_as_by_hand() -> None:
    scores = random_pairs(60, models=4, prompts=25)
    part = measure("accuracy", scores)["all"]
    named = [(c["first"], c["second"]) for c in part["comparisons"]]
    assert named == list(itertools.combinations(["m0", "m1", "m2", "m3"], 2))
    right = {model: values[:, 0] > values[:, 1] for model, values in scores.scores.items()}
    for found in part["comparisons"]:
        one, other = right[found["first"]].astype(int), right[found["second"]].astype(int)
        by_prompt = np.array([(one - other)[scores.prompts == p].sum() for p in np.unique(scores.prompts)])
        assert found["difference"] == pytest.approx((one - other).mean())
        assert (found["first_alone"], found["second_alone"]) == ((one > other).sum(), (other > one).sum())
        assert found["p"] == pytest.approx(clustered_mcnemar(by_prompt)) and found["tests"] == 6
    adjusted = holm(np.array([c["p"] for c in part["comparisons"]]))
    assert [c["p_holm"] for c in part["comparisons"]] == pytest.approx(adjusted.tolist())
    versus = part["models"]["m2"]["vs_baseline"]
    assert versus["difference"] == pytest.approx(-part["comparisons"][1]["difference"])


def test_of_many_models_each_is_compared_with_the_baseline() -> None:
    """Of one more than 20: with the numbers that every two of 20 have, but Holm's factor is that of fewer."""
    scores = random_pairs(40, models=21, prompts=20)
    settings = EvaluateSettings(resamples=100, baseline="m3")
    found = measure("accuracy", scores, settings)["all"]["comparisons"]
    every = itertools.combinations([f"m{number}" for number in range(21)], 2)
    assert [(c["first"], c["second"]) for c in found] == [both for both in every if "m3" in both]
    assert {c["tests"] for c in found} == {20}
    fewer = replace(scores, scores={m: values for m, values in scores.scores.items() if m != "m20"})
    by_models = {
        (c["first"], c["second"]): c for c in measure("accuracy", fewer, settings)["all"]["comparisons"]
    }
    assert len(by_models) == 190
    for one in found[:-1]:
        other = by_models[one["first"], one["second"]]
        assert [one[k] for k in ("interval", "p")] == [other[k] for k in ("interval", "p")]
    tables = PROBES.get("accuracy").tables(PROBES.get("accuracy").measure({"t": scores}, settings, 0))
    titles = [table.title for table in tables]
    assert "Each model and the baseline on t" in titles and "Differences to m3 on t, by subset" in titles


def test_sections_are_their_pairs_and_unknown_subsets_are_refused() -> None:
    scores = random_pairs(90, models=2, prompts=90)
    settings = EvaluateSettings(resamples=400, sections={"first two": ["s0", "s1"], "elsewhere": ["x"]})
    measured = measure("accuracy", scores, settings)
    assert list(measured["sections"]) == ["first two"] and list(measured["subsets"]) == ["s0", "s1", "s2"]
    part, rows = measured["sections"]["first two"], scores.subsets != "s2"
    values, lengths = scores.scores["m1"][rows], scores.lengths[rows]
    assert part["pairs"] == 60 and part["models"]["m1"]["accuracy"] == (values[:, 0] > values[:, 1]).mean()
    assert part["always_longer"] == (lengths[:, 0] > lengths[:, 1]).mean()
    assert part["always_shorter"] == (lengths[:, 0] < lengths[:, 1]).mean()
    assert {c["tests"] for s in measured["subsets"].values() for c in s["comparisons"]} == {3}
    with pytest.raises(OptionError, match="did you mean 's1'"):
        check_sections(EvaluateSettings(sections={"a": ["s0", "s11"]}), ["s0", "s1", "s2"])


def test_of_one_prompt_pairs_are_the_units() -> None:
    scores = random_pairs(50, models=2, prompts=1)
    apart = pair_scores(scores.scores, subsets=scores.subsets, lengths=scores.lengths)
    for probe in ("accuracy", "calibration"):
        one, other = (measure(probe, s) for s in (scores, apart))
        one, other = one.get("all", one), other.get("all", other)
        assert (one["prompts"], other["prompts"]) == (1, 50)
        assert one["models"] == other["models"] and one.get("comparisons") == other.get("comparisons")


def test_the_pairs_without_a_subset_can_be_named() -> None:
    scores = pair_scores({"m": [[1, 0], [0, 1]]}, subsets=["", "s"])
    settings = EvaluateSettings(resamples=100, sections={"rest": ["(none)"]})
    check_sections(settings, scores.subsets)
    measured = measure("accuracy", scores, settings)
    assert measured["sections"]["rest"]["models"]["m"]["accuracy"] == 1
    assert list(measured["subsets"]) == ["(none)", "s"]


def test_a_score_that_is_the_length_is_always_longer_and_a_constant_is_never_right() -> None:
    lengths = np.random.default_rng(0).integers(1, 9, (200, 2))
    scores = pair_scores(
        {"length": lengths, "brief": -lengths, "constant": np.zeros((200, 2))}, lengths=lengths
    )
    part = measure("accuracy", scores)["all"]
    assert part["models"]["length"]["accuracy"] == part["always_longer"]
    assert part["models"]["brief"]["accuracy"] == part["always_shorter"]
    assert part["models"]["length"]["ties"] == (lengths[:, 0] == lengths[:, 1]).sum() > 0
    assert part["models"]["constant"]["accuracy"] == 0 and part["models"]["constant"]["ties"] == 200


def test_order_scale_and_names_of_prompts_change_nothing() -> None:
    scores = random_pairs(80, models=3, prompts=30)
    order = np.random.default_rng(1).permutation(80)
    moved = PairScores(
        {m: 3 * s[order] - 5 for m, s in scores.scores.items()},
        scores.subsets[order],
        1000 - 7 * scores.prompts[order],
        scores.lengths[order],
    )
    for one, other in zip(
        *(measure("accuracy", s)["subsets"].values() for s in (scores, moved)), strict=True
    ):
        assert [m["accuracy"] for m in one["models"].values()] == [
            m["accuracy"] for m in other["models"].values()
        ]
        assert [c["p"] for c in one["comparisons"]] == pytest.approx([c["p"] for c in other["comparisons"]])
        assert (one["always_longer"], one["prompts"]) == (other["always_longer"], other["prompts"])


@pytest.mark.parametrize("repeat", [1, 4])
def test_intervals_cover(repeat: int) -> None:
    """95 % intervals of accuracies and a difference; pairs of a prompt share half of what makes them hard."""
    random, truth = np.random.default_rng(0), {"m0": 0.5, "m1": stats.norm.cdf(0.5)}
    settings, covered = EvaluateSettings(resamples=300), np.zeros(3)
    for _ in range(120):
        prompts = np.repeat(np.arange(80), repeat)
        hard = random.normal(size=80)[prompts] * np.sqrt(0.5) + random.normal(size=80 * repeat) * np.sqrt(0.5)
        scores = {m: np.column_stack([hard + stats.norm.ppf(p), 0 * hard]) for m, p in truth.items()}
        part = measure("accuracy", pair_scores(scores, prompts), settings)["all"]
        intervals = [part["models"][m]["interval"] for m in truth]
        intervals.append(part["models"]["m1"]["vs_baseline"]["interval"])
        expected = [*truth.values(), truth["m1"] - truth["m0"]]
        covered += [low <= value <= high for (low, high), value in zip(intervals, expected, strict=True)]
    assert np.all(covered / 120 >= 0.90), covered


def test_tables_tell_what_is_compared() -> None:
    settings = EvaluateSettings(resamples=100, sections={"two": ["s0", "s1"]})
    result = PROBES.get("accuracy").measure({"t": random_pairs(60, models=3, prompts=30)}, settings, 0)
    tables = {table.title: table for table in PROBES.get("accuracy").tables(result)}
    assert list(tables) == [
        "Accuracy on t",
        "Pairwise comparisons on t",
        "Accuracy on t, by section",
        "Differences to m0 on t, by section",
        "Accuracy on t, by subset",
        "Differences to m0 on t, by subset",
    ]
    assert tables["Accuracy on t, by subset"].header[-2:] == ["always longer", "always shorter"]
    assert len(tables["Pairwise comparisons on t"].rows) == 3
    assert "all 9 comparisons" in tables["Differences to m0 on t, by subset"].note
    assert "McNemar test over prompts" in tables["Accuracy on t"].note


# Calibration


def brute_force_ece(differences: Any) -> float:
    """Each pair in both orders, 2 BINS mirrored bins of p on [0, 1]; p = 1/2 is half in both middle ones."""
    bins: dict[int, float] = {}
    for d in differences:
        for p, label in ((expit(d), 1.0), (expit(-d), 0.0)):
            upper = min(int((max(p, 1 - p) - 0.5) * 2 * BINS), BINS - 1)
            places = [s * (upper + 1) for s in ((-1, 1) if p == 0.5 else (1,) if p > 0.5 else (-1,))]
            for place in places:
                bins[place] = bins.get(place, 0.0) + (label - p) / len(places)
    return sum(map(abs, bins.values())) / (2 * len(differences))


def test_brier_and_ece_are_those_of_both_orders() -> None:
    random = np.random.default_rng(0)
    d = np.concatenate([2 * random.normal(size=300) + 0.5, [0.0] * 9, [40.0, -40.0]])
    found = measure("calibration", of_differences(d))["models"]["m"]
    both = np.concatenate([(expit(d) - 1) ** 2, expit(-d) ** 2])
    assert found["brier"] == pytest.approx(both.mean())
    assert found["ece"] == pytest.approx(brute_force_ece(d))
    diagram = found["diagram"]
    weights = np.array(diagram["pairs"]) / len(d)
    gaps = np.abs(np.array(diagram["right"]) - diagram["confidence"])
    assert found["ece"] == pytest.approx((weights * gaps).sum())
    assert sum(diagram["pairs"]) == len(d)


def test_known_cases() -> None:
    sure = measure("calibration", of_differences([50.0] * 8))["models"]["m"]
    assert sure["brier"] == pytest.approx(0) and sure["ece"] == pytest.approx(0) and sure["slope"] is None
    constant = measure("calibration", of_differences([0.0] * 8))["models"]["m"]
    assert constant["brier"] == 0.25 and constant["ece"] == 0 and constant["slope"] is None
    # Three of four right at p = 3/4 is calibrated; all four wrong at p = 3/4 is 3/4 off.
    d = np.log(3.0)
    calibrated = measure("calibration", of_differences([d, d, d, -d]))["models"]["m"]
    assert calibrated["ece"] == pytest.approx(0) and calibrated["slope"]["value"] == pytest.approx(1)
    assert calibrated["brier"] == pytest.approx(0.75 * 0.25**2 + 0.25 * 0.75**2)
    assert calibrated["diagram"]["right"] == [0.75]
    assert measure("calibration", of_differences([-d] * 4))["models"]["m"]["ece"] == pytest.approx(0.75)


def test_bins_close_at_their_lower_end_and_the_last_at_both() -> None:
    edge = np.log(0.55 / 0.45)
    assert Binned.of(np.array([0.0, edge + 1e-9, -edge - 1e-9, 800.0])).bins.tolist() == [0, 1, 1, BINS - 1]


def test_slope_is_the_best_scale_and_its_interval_the_usual_one() -> None:
    random = np.random.default_rng(0)
    x = 3 * random.normal(size=4000)
    d = np.where(random.random(4000) < expit(0.4 * x), x, -x)
    found = slope(d, np.arange(4000), 0.95)
    assert found is not None
    best = optimize.minimize_scalar(
        lambda b: np.logaddexp(0, -b * d).mean(), bounds=(0, 5), method="bounded", options={"xatol": 1e-10}
    )
    assert found["value"] == pytest.approx(best.x, abs=1e-5)
    information = (d**2 * expit(best.x * d) * expit(-best.x * d)).sum()
    assert np.diff(found["interval"])[0] / 2 == pytest.approx(1.96 / np.sqrt(information), rel=0.05)
    assert found["interval"][0] < 0.4 < found["interval"][1]
    copies = slope(np.repeat(d, 5), np.repeat(np.arange(4000), 5), 0.95)
    assert copies is not None and copies["interval"] == pytest.approx(found["interval"], rel=1e-6)


def test_calibration_sees_scale_but_neither_order_nor_shift() -> None:
    scores = random_pairs(80, models=1, prompts=30)
    order = np.random.default_rng(1).permutation(80)
    moved = pair_scores({"m0": scores.scores["m0"][order] + 9}, scores.prompts[order])
    one, other = (measure("calibration", s)["models"]["m0"] for s in (scores, moved))
    for key in ("brier", "ece", "slope"):
        assert str(one[key])[:9] == str(other[key])[:9]
    doubled = measure("calibration", pair_scores({"m0": 2 * scores.scores["m0"]}, scores.prompts))
    assert doubled["models"]["m0"]["slope"]["value"] == pytest.approx(one["slope"]["value"] / 2)


@pytest.mark.parametrize("true_slope", [1.0, 0.4], ids=["calibrated", "too sure"])
def test_calibration_intervals_cover(true_slope: float) -> None:
    """A calibrated model is the hard case: every sample's ECE is above the true one, zero."""
    random, settings = np.random.default_rng(0), EvaluateSettings(resamples=200)

    def draw(count: int) -> Any:
        x = 1.5 * random.normal(size=count)
        return np.where(random.random(count) < expit(true_slope * x), x, -x)

    many = Binned.of(draw(200_000))
    truth = {
        "ece_interval": np.abs(many.gaps().mean(axis=0)).sum(),
        "brier_interval": (expit(-draw(200_000)) ** 2).mean(),
    }
    covered = dict.fromkeys([*truth, "slope"], 0)
    for _ in range(100):
        found = measure("calibration", of_differences(draw(300)), settings)["models"]["m"]
        intervals = {name: found[name] for name in truth} | {"slope": found["slope"]["interval"]}
        for name, (low, high) in intervals.items():
            covered[name] += low <= {**truth, "slope": true_slope}[name] <= high
    assert min(covered.values()) >= 0.9 * 100, covered


def test_chance_level_of_the_ece() -> None:
    """What the ECE would be on average for a calibrated model is what it is for one."""
    random, found = np.random.default_rng(0), []
    for _ in range(40):
        x = 1.5 * random.normal(size=400)
        d = np.where(random.random(400) < expit(x), x, -x)
        one = measure("calibration", of_differences(d))["models"]["m"]
        found.append((one["ece"], one["ece_by_chance"]))
    ece, chance = np.mean(found, axis=0)
    assert chance == pytest.approx(ece, rel=0.1)


def test_brier_is_compared_with_the_baseline_pair_by_pair() -> None:
    scores = random_pairs(200, models=2, prompts=10**9)
    settings = EvaluateSettings(resamples=2000, baseline="m1")
    versus = measure("calibration", scores, settings)["models"]["m0"]["vs_baseline"]
    wrong = {m: expit(-(s[:, 0] - s[:, 1])) ** 2 for m, s in scores.scores.items()}
    gain = wrong["m0"] - wrong["m1"]
    spread = 1.96 * gain.std() / np.sqrt(200)
    assert versus["difference"] == pytest.approx(gain.mean())
    assert versus["interval"] == pytest.approx((gain.mean() - spread, gain.mean() + spread), abs=0.1 * spread)


def test_calibration_tables_and_diagram(tmp_path: Path) -> None:
    probe, sets = PROBES.get("calibration"), {"a": random_pairs(60, 2, 60), "b": of_differences([1.0] * 5)}
    result = {name: probe.measure({name: s}, SETTINGS, 0)["sets"][name] for name, s in sets.items()}
    whole = {"confidence": 0.95, "bins": BINS, "sets": result}
    first, second = probe.tables(whole)
    assert first.title == "Calibration on a" and [row[0] for row in first.rows] == ["m0", "m1"]
    assert second.rows[0][-1] == "none"
    assert probe.plot(whole, tmp_path) == ["calibration.png"]
    assert (tmp_path / "calibration.png").read_bytes()[:4] == b"\x89PNG"


def test_calibration_by_subset_is_that_of_the_subset_alone() -> None:
    random, names = np.random.default_rng(0), np.repeat(["a", "", "few"], [MIN_PAIRS, 150, MIN_PAIRS - 1])
    scores = {name: random.normal(size=(len(names), 2)) for name in ("m", "n")}
    pairs = pair_scores(scores, subsets=names)
    found = measure("calibration", pairs)
    assert (list(found["subsets"]), found["small_subsets"]) == (["(none)", "a"], ["few"])
    for name, subset in (("a", "a"), ("(none)", "")):
        alone, part = measure("calibration", pairs.part(pairs.subsets == subset)), found["subsets"][name]
        assert alone["subsets"] == {} and part["pairs"] == alone["pairs"]
        for model, numbers in part["models"].items():
            assert {key: alone["models"][model][key] for key in numbers} == numbers
    probe = PROBES.get("calibration")
    _, table = probe.tables({"confidence": 0.95, "bins": BINS, "sets": {"t": found}})
    assert [row[:3] for row in table.rows[:2]] == [["(none)", "150", "m"], ["(none)", "150", "n"]]
    brier, ece = (found["subsets"]["a"]["models"]["n"][key] for key in ("brier", "ece"))
    assert table.rows[3][3].startswith(f"{brier:.3f} (") and table.rows[3][4].startswith(f"{ece:.3f} (")
    assert table.note.endswith(f"Left out, fewer than {MIN_PAIRS} pairs: few.")


def test_subsets_that_are_all_small_are_told() -> None:
    pairs = pair_scores({"m": np.random.default_rng(0).normal(size=(40, 2))}, subsets=["a", "b"] * 20)
    found = {"confidence": 0.95, "bins": BINS, "sets": {"t": measure("calibration", pairs)}}
    (table,) = PROBES.get("calibration").tables(found)
    assert table.note.endswith(f"Not by subset: each has fewer than {MIN_PAIRS} pairs.")

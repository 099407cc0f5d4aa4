"""The verdict: words, Holm's correction on simulated data, what is compared, reports of older versions.

F families, M models besides the baseline, Q prompts, R resamples.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from small_reports import MODELS, REPORT, accuracy_part, choice_scores, report_of

from moemerge.errors import ArtifactError
from moemerge.evaluation import main_table as summary
from moemerge.evaluation.measures import Difference, differences
from moemerge.evaluation.power import POWER, limits, power_sentences
from moemerge.evaluation.probes import PROBES
from moemerge.evaluation.probes.base import CandidateScores, PairScores
from moemerge.evaluation.report import FORMAT, outdated, read_comparison, read_report
from moemerge.evaluation.verdict import holm_verdicts, standing, standing_sentences, verdict
from moemerge.options.evaluate import EvaluateSettings
from moemerge.reports.statistics import bootstrap_means, mcnemar, resampled_p
from moemerge.reports.table import with_interval


def report_with(low: float, high: float, p: float = 0.01) -> dict[str, Any]:
    report = json.loads(json.dumps(REPORT))
    alone = {"right_alone": 6, "baseline_right_alone": 4}
    versus = {"difference": (low + high) / 2, "interval": [low, high], "p": p, **alone}
    report["probes"]["accuracy"]["sets"]["test"]["all"]["models"]["merge-learned"]["vs_baseline"] = versus
    curve = {
        "gold": [0.1, 0.4],
        "gold_low": [0.0, 0.3],
        "gold_high": [0.2, 0.5],
        "minus_baseline": [0, 0.2],
        "minus_baseline_low": [0, -0.1],
        "minus_baseline_high": [0, 0.5],
        "minus_baseline_p": 0.2,
    }
    models = {name: dict(curve) for name in report["models"]}
    report["probes"]["best_of_n"] = {"sets": {"wide": {"n": [1, 2], "models": models}}}
    return report


# Words


@pytest.mark.parametrize(
    ("low", "high", "p", "word"),
    [
        (0.01, 0.03, 0.01, "helped"),
        (-0.03, -0.01, 0.01, "made it worse"),
        (-0.01, 0.03, 0.3, "no clear difference"),
        (0.01, 0.03, 0.03, "no clear difference"),  # clear by itself, not as one of two
    ],
)
def test_verdict_follows_the_interval_and_the_corrected_p(
    low: float, high: float, p: float, word: str
) -> None:
    text = verdict(report_with(low, high, p), "merge-learned")
    assert f"merge-learned against control: {word} (at level 0.05 after Holm's correction for 2 comp" in text
    numbers = f"{(low + high) / 2:+.3f}, {low:+.3f} to {high:+.3f}; p {min(2 * p, 0.4 if p > 0.2 else 1):.2g}"
    assert f"accuracy test: {word} ({numbers})" in text
    assert "gold wide at n=2: no clear difference (+0.200, -0.100 to +0.500; p " in text


def test_verdict_tells_both_when_sets_disagree() -> None:
    report = report_with(0.01, 0.03)
    curve = report["probes"]["best_of_n"]["sets"]["wide"]["models"]["merge-learned"]
    curve |= {"minus_baseline_high": [0, -0.05], "minus_baseline_p": 0.001}
    assert "helped in one place, made it worse in another" in verdict(report, "merge-learned")


def test_verdict_says_so_when_the_models_are_alike() -> None:
    report = report_with(0.0, 0.0, 1.0)
    del report["probes"]["best_of_n"]
    text = verdict(report, "merge-learned")
    assert "merge-learned against control: no difference at all (at level 0.05, one comparison). " in text
    assert "nothing to compare" in verdict(report, "control")


def test_models_that_stand_alike_share_a_sentence_and_all_comparisons_count() -> None:
    """Of 8 comparisons the smallest p must be at most 0.05 / 8."""
    report = report_with(-0.01, 0.03, 0.5)
    assert standing(report) == (
        "Against control: dense, moe, merge-usage: better in accuracy test. merge-learned: no clear "
        "difference. Judged at level 0.05 after Holm's correction for 8 comparisons."
    )
    for model in report["models"]:
        report["probes"]["accuracy"]["sets"]["test"]["all"]["models"][model]["vs_baseline"]["p"] = 0.008
    assert "dense, moe, merge-usage, merge-learned: no clear difference. " in standing(report)


def test_a_single_model_stands_against_chance_and_length() -> None:
    settings, random = EvaluateSettings(resamples=100), np.random.default_rng(0)
    scores = np.column_stack([random.normal(size=200) + 1, random.normal(size=200)])
    lengths = np.column_stack([np.arange(200) % 4, np.full(200, 2)])
    pairs = PairScores({"rm": scores}, np.full(200, ""), np.arange(200), lengths)
    found = PROBES.get("accuracy").measure({"test": pairs}, settings, 0)
    report = {"models": {"rm": {"active_parameters": 1}}, "baseline": "rm", "probes": {"accuracy": found}}
    text = standing(report)
    assert text.startswith("rm: accuracy 0.7")
    assert text.endswith(", above chance (0.5); preferring the shorter answer gives 0.500.")
    assert summary.main_table(report)[0] == ["model", "accuracy test", "active parameters"]
    (table,) = PROBES.get("accuracy").tables(found)
    assert table.header[-1] == "loss" and "McNemar" not in table.note


def with_ties(report: dict[str, Any], model: str, ties: int) -> dict[str, Any]:
    numbers = report["probes"]["accuracy"]["sets"]["test"]["all"]["models"][model]
    report["probes"]["accuracy"]["sets"]["test"]["all"]["models"][model] = {**numbers, "ties": ties}
    return report


@pytest.mark.parametrize("model", ["merge-learned", "control"])
def test_a_model_that_ties_on_every_pair_is_said_to_judge_nothing(model: str) -> None:
    said = f"{model} gives the same score for both answers of every pair of test: it judges nothing."
    report = with_ties(report_with(-0.3, -0.1), model, 100)
    assert said in verdict(report, "merge-learned") and said in standing(report)
    nearly = with_ties(report, model, 99)
    assert "judges nothing" not in verdict(nearly, "merge-learned") + standing(nearly)


@pytest.mark.parametrize(
    ("ties", "text"),
    [
        (100, "rm: the same score for both answers of every pair of test: it judges nothing."),
        (60, "below chance (0.5), 60 of 100 pairs tied and counted as errors; preferring"),
        (0, "below chance (0.5); preferring"),
    ],
)
def test_ties_of_a_single_model_are_told(ties: int, text: str) -> None:
    part = accuracy_part()
    part["models"] = {"rm": {"accuracy": 0.2, "ties": ties, "loss": 0.7, "interval": [0.1, 0.3]}}
    sets = {"test": {"all": part, "sections": {}, "subsets": {}}}
    assert text in standing(report_of(["rm"], "rm", accuracy={"confidence": 0.95, "sets": sets}))


def test_equal_models_are_told_as_equal() -> None:
    report = {**report_with(0, 0, 1.0), "equal_models": [["dense", "merge-learned", "control"], ["moe", "x"]]}
    text = standing(report)
    assert "merge-learned, control are dense: the same weights, byte for byte." in text
    assert "control is merge-learned: the same weights" in verdict(report, "merge-learned")
    assert "moe" not in verdict(report, "merge-learned")


def test_of_equal_models_one_is_compared_and_all_share_a_row() -> None:
    alone, grouped = report_with(-0.01, 0.03, 0.5), report_with(-0.01, 0.03, 0.5)
    grouped["equal_models"] = [["merge-usage", "merge-learned"]]
    assert "8 comparisons" in standing(alone) and "6 comparisons" in standing(grouped)
    assert "merge-learned:" not in standing(grouped)
    assert "merge-learned is merge-usage: nothing was learned." in verdict(grouped, "merge-learned")
    names = [row[0] for row in summary.main_table(grouped)[1]]
    assert "merge-usage = merge-learned" in names and len(names) == len(summary.main_table(alone)[1]) - 1


@pytest.mark.parametrize(("low", "high", "word"), [(0.01, 0.03, "better"), (-0.03, -0.01, "worse")])
def test_what_is_clear_by_itself_only_is_named(low: float, high: float, word: str) -> None:
    """p 0.03 is below the level, and above half of it."""
    text = verdict(report_with(low, high, 0.03), "merge-learned")
    numbers = f"({(low + high) / 2:+.3f} ({low:+.3f} to {high:+.3f}))"
    assert f"By itself, not after the correction: {word} in accuracy test {numbers}." in text
    assert "By itself" not in verdict(report_with(low, high, 0.01), "merge-learned")
    assert "By itself" not in verdict(report_with(-0.01, 0.03, 0.3), "merge-learned")


def test_a_larger_gap_is_named_though_no_verdict_counts_it() -> None:
    report = report_with(-0.01, 0.03, 0.3)
    curve = report["probes"]["best_of_n"]["sets"]["wide"]["models"]["merge-learned"]
    curve |= {
        f"gap_area_minus_baseline{end}": v for end, v in (("", 0.113), ("_low", 0.038), ("_high", 0.209))
    }
    said = "worse in gap on wide (+0.113 (+0.038 to +0.209))"
    assert f"By itself, not after the correction: {said}." in verdict(report, "merge-learned")
    assert f"merge-learned {said}" in " ".join(standing_sentences(report))


# Power


@pytest.mark.parametrize(("pairs", "comparisons"), [(24, 2), (100, 1), (400, 8), (5, 1)])
def test_no_smaller_difference_can_be_clear(pairs: int, comparisons: int) -> None:
    """The least difference is the least count of pairs, all for one model, with a small enough p."""
    least, seen, wanted = limits(pairs, 0.1, 0.05, comparisons)
    count = next(k for k in range(100) if mcnemar(k, 0) <= 0.05 / comparisons)
    assert least == pytest.approx(min(1.0, count / pairs)) and seen >= least and wanted > 1000
    assert (pairs, round(least, 2)) != (24, 0.25) and (pairs != 24 or round(least, 2) == 0.29)


def test_pairs_of_few_prompts_are_not_counted_as_so_many() -> None:
    part = {**accuracy_part(), "pairs": 200, "prompts": 9}
    sets = {"test": {"all": part, "sections": {}, "subsets": {}}}
    few: Any = report_of(MODELS, "control", accuracy={"confidence": 0.95, "sets": sets})
    (sentence,) = power_sentences(few, 1)
    assert sentence.startswith("200 pairs of test are of 9 prompts") and "cannot show" not in sentence
    part["prompts"] = 150
    (sentence,) = power_sentences(few, 1)
    assert "cannot show" in sentence


def test_the_difference_that_is_seen_is_seen_in_four_of_five_cases() -> None:
    pairs, disagreement = 1000, 0.2
    _, seen, _ = limits(pairs, disagreement, 0.05, 1)
    random, better = np.random.default_rng(0), (disagreement + seen) / 2
    counts = random.multinomial(pairs, [better, disagreement - better, 1 - disagreement], size=2000)
    clear = np.mean([mcnemar(int(first), int(second)) <= 0.05 for first, second, _ in counts])
    assert clear == pytest.approx(POWER, abs=0.05)


def test_models_that_agree_on_every_pair_or_prompt_have_an_interval_of_some_width() -> None:
    right = np.column_stack([np.ones(40), np.zeros(40)])
    pairs = PairScores({"a": right, "b": 2 * right}, np.full(40, ""), np.arange(40), np.ones((40, 2)))
    found = PROBES.get("accuracy").measure({"t": pairs}, EvaluateSettings(resamples=100), 0)
    low, high = found["sets"]["t"]["all"]["models"]["b"]["vs_baseline"]["interval"]
    clopper_pearson = stats.binomtest(0, 40).proportion_ci(0.95, "exact").high
    assert -low == high == pytest.approx(clopper_pearson)
    one, other = np.column_stack([[1, 0] * 20, np.zeros(40)]), np.column_stack([[0, 1] * 20, np.zeros(40)])
    pairs = PairScores({"a": one, "b": other}, np.full(40, ""), np.arange(40) // 2, np.ones((40, 2)))
    cancelled = PROBES.get("accuracy").measure({"t": pairs}, EvaluateSettings(resamples=100), 0)
    low, high = cancelled["sets"]["t"]["all"]["models"]["b"]["vs_baseline"]["interval"]
    assert -low == high == pytest.approx(stats.binomtest(0, 20).proportion_ci(0.95, "exact").high)
    assert with_interval(0.0, (0.0, 0.0), "+.2f") == "+0.00" != with_interval(0.0, (0.0, 0.1), "+.2f")
    answers = np.array([3.0, 1.0, 2.0] * 20)
    candidates = CandidateScores({"a": answers, "b": 2 * answers}, answers, np.ones(60), np.full(20, 3))
    curves = PROBES.get("best_of_n").measure({"c": candidates}, EvaluateSettings(resamples=100), 0)
    of_b = curves["sets"]["c"]["models"]["b"]
    assert of_b["minus_baseline_high"][0] == 0 < of_b["minus_baseline_high"][-1] < 1


# Simulated families


def families(effect: float) -> list[list[Difference]]:
    """1000 reports: 3 models against one baseline in accuracy (300 pairs) and gold score (40 prompts).

    All share the baseline's noise. `effect` moves the first model's gold score, in standard deviations.
    """
    random, count, models = np.random.default_rng(3), 1000, 3
    base_FPM = random.random((count, 300, 1)) < 0.7
    right_FPM = np.where(
        random.random((count, 300, models)) < 0.8, base_FPM, random.random((count, 300, models)) < 0.7
    )
    alone_FM = (right_FPM & ~base_FPM).sum(1), (~right_FPM & base_FPM).sum(1)
    gains_QFM = random.standard_t(5, (40, count, models)) + random.standard_t(5, (40, count, 1))
    gains_QFM[:, :, 0] += effect * gains_QFM.std()
    flat_QX = gains_QFM.reshape(40, -1)
    draws_RX = bootstrap_means(np.column_stack([flat_QX, np.ones(40)]), 300, 1)
    low_X, high_X = np.quantile(draws_RX, [0.025, 0.975], axis=0)
    p_X = [resampled_p(value, draws_RX[:, x], 40) for x, value in enumerate(flat_QX.mean(0).tolist())]
    gold_FM = np.array(
        [Difference("gold", *one) for one in zip(flat_QX.mean(0), low_X, high_X, p_X, strict=True)],
        dtype=object,
    ).reshape(count, models)
    return [
        [accuracy_difference(int(us), int(them)) for us, them in zip(*alone, strict=True)] + list(golds)
        for *alone, golds in zip(*alone_FM, gold_FM, strict=True)
    ]


@cache
def accuracy_difference(ours: int, theirs: int) -> Difference:
    value, half = (ours - theirs) / 300, 1.96 * np.sqrt(ours + theirs) / 300
    return Difference("accuracy", value, value - half, value + half, mcnemar(ours, theirs))


def test_where_nothing_differs_a_false_word_is_as_rare_as_promised() -> None:
    """Of 1000 reports; uncorrected, every fourth would have one."""
    found = families(0.0)
    false = np.mean(
        [any(word != "no clear difference" for word, _ in holm_verdicts(one, 0.05)) for one in found]
    )
    helped = np.mean([any(word == "helped" for word, _ in holm_verdicts(one, 0.05)) for one in found])
    uncorrected = np.mean([any(one.low > 0 or one.high < 0 for one in family) for family in found])
    assert 0.01 < helped < false <= 0.05 and uncorrected > 0.15, (helped, false, uncorrected)


def test_a_planted_effect_is_found() -> None:
    found = families(0.8)
    planted, others = zip(
        *[(holm_verdicts(one, 0.05)[3], holm_verdicts(one, 0.05)[4:]) for one in found], strict=True
    )
    assert np.mean([word == "helped" for word, _ in planted]) > 0.9
    assert np.mean([any(word != "no clear difference" for word, _ in one) for one in others]) <= 0.05


def test_p_from_resamples_is_students() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 25)
    draws = bootstrap_means(np.column_stack([values, np.ones(25)]), 40_000, 0)[:, 0]
    expected = stats.ttest_1samp(values, 0).pvalue
    assert resampled_p(values.mean(), draws, 25) == pytest.approx(expected, rel=0.05)


def test_p_of_units_that_all_agree_is_the_sign_tests() -> None:
    alike = np.full(100, 0.25)
    assert resampled_p(0.25, alike, 5) == pytest.approx(stats.binomtest(5, 5).pvalue)
    assert (resampled_p(0.25, alike, 1), resampled_p(0.0, 0 * alike, 9)) == (1.0, 1.0)


# What is compared


def test_gold_is_compared_prompt_by_prompt() -> None:
    random = np.random.default_rng(0)
    gold = random.normal(size=(30, 4))
    scores = {"a": gold.ravel() + random.normal(size=120), "b": random.normal(size=120)}
    sets = {"wide": CandidateScores(scores, gold.ravel(), np.ones(120, dtype=np.int64), np.full(30, 4))}
    found = PROBES.get("best_of_n").measure(sets, EvaluateSettings(resamples=20_000), 0)
    best = {name: gold[np.arange(30), values.reshape(30, 4).argmax(1)] for name, values in scores.items()}
    expected = stats.ttest_rel(best["b"], best["a"]).pvalue
    curves = found["sets"]["wide"]["models"]
    assert curves["b"]["minus_baseline_p"] == pytest.approx(expected, rel=0.1)
    assert "minus_baseline_p" not in curves["a"]
    report = {"models": scores, "baseline": "a", "probes": {"best_of_n": found}}
    (one,) = differences(report, "b")
    assert (one.what, one.p) == ("gold wide at n=4", curves["b"]["minus_baseline_p"])


@pytest.fixture(scope="module")
def benchmarked() -> dict[str, Any]:
    """A report on two subsets of RewardBench 2, 60 rows each, of a better and a worse model."""
    random = np.random.default_rng(0)
    rows = [
        {
            "subset": subset,
            "scores": {"worse": random.normal(size=4), "better": random.normal(size=4) + [2, 0, 0, 0]},
        }
        for subset in ("Math", "Focus")
        for _ in range(60)
    ]
    settings = EvaluateSettings(resamples=500)
    found = PROBES.get("rewardbench").measure({"rb": choice_scores(rows)}, settings, 0)
    models = {name: {"active_parameters": 1} for name in ("worse", "better")}
    return {"models": models, "baseline": "worse", "probes": {"rewardbench": found}}


def test_rewardbench_is_in_tables_and_verdict(benchmarked: dict[str, Any]) -> None:
    titles = ["RewardBench 2 rb, Math", "RewardBench 2 rb, Focus"]
    header, rows = summary.main_table(benchmarked)
    assert header == ["model", titles[0], "minus worse", titles[1], "minus worse", "active parameters"]
    assert rows[0][2] == "baseline" and rows[1][2].startswith("+0.") and "(+0." in rows[1][2]
    subset = benchmarked["probes"]["rewardbench"]["sets"]["rb"]["subsets"]["Math"]["models"]["better"]
    assert rows[1][1].startswith(f"{subset['score']:.3f} (")
    assert all(title in summary.table(benchmarked) for title in titles)
    assert standing(benchmarked).startswith(f"Against worse: better: better in {', '.join(titles)}.")


def test_differences_have_the_sign_of_model_minus_baseline(benchmarked: dict[str, Any]) -> None:
    (ahead, _), (behind, _) = (
        list(differences({**benchmarked, "baseline": baseline}, model))
        for baseline, model in (("worse", "better"), ("better", "worse"))
    )
    assert ahead.value == pytest.approx(-behind.value) and ahead.p == behind.p
    assert (ahead.low, ahead.high) == pytest.approx(
        (-behind.high, -behind.low)
    ) and 0 < ahead.low < ahead.high


# Reports of other versions


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ('{"models": {}}', "format without a number"),
        (json.dumps({"format": FORMAT + 1}), f"format {FORMAT + 1}"),
        (json.dumps({**REPORT, "baseline": 3}), "baseline: Input should be a valid string"),
        (json.dumps({k: v for k, v in REPORT.items() if k != "rows"}), "rows: Field required"),
        ('{"format": 2', "Expecting"),
        ("[2]", "holds a list"),
        (None, "No such file"),
    ],
)
def test_a_report_that_cannot_be_shown_is_refused_in_four_parts(
    text: str | None, given: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be shown by this version") as caught:
        read_report(tmp_path)
    assert given in caught.value.given and caught.value.expected == f"format {FORMAT}"
    assert caught.value.fix.startswith("evaluate again")
    assert given in str(outdated(tmp_path, "evaluate")) and outdated(tmp_path, "merge") is None


def test_a_report_of_this_version_is_read(tmp_path: Path) -> None:
    written = {"format": FORMAT, "confidence": 0.95, "groups": [], "plots": []}
    (tmp_path / "compare.json").write_text(json.dumps(written))
    assert read_comparison(tmp_path)["groups"] == [] and outdated(tmp_path, "compare") is None


def test_results_of_a_probe_from_elsewhere_are_kept(tmp_path: Path) -> None:
    mine = {"confidence": 0.9, "sets": {"x": [1, None]}}
    report = {**REPORT, "probes": {**REPORT["probes"], "mine": mine}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert read_report(tmp_path)["probes"]["mine"] == mine

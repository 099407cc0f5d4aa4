"""A vote on labels against simulated worlds in which it is known which labels are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from moemerge.evaluation import vote
from moemerge.evaluation.vote import SHARES, Evidence, Votes
from moemerge.reports.statistics import clustered_interval

CONFIDENCE = 0.95


def world(
    seed: int, count: int, noise: float, quality: float = 1.0, per: int = 1, hard: bool = False
) -> tuple[Votes, np.ndarray]:
    """Strengths of `count` labels, `per` of which share a prompt, and which labels are wrong.

    The vote leans to the truth by `quality` standard deviations. hard: labels are mostly wrong where it does
    not lean far.
    """
    random = np.random.default_rng(seed)
    lean = 0.7 * random.normal(size=count // per).repeat(per) + 0.7 * random.normal(size=count) + quality
    rate = np.where(np.abs(lean) < 1, 2 * noise, noise / 4) if hard else noise
    wrong = random.random(count) < rate
    return Votes(np.where(wrong, -lean, lean), np.arange(count // per).repeat(per)), wrong


def test_an_interval_of_independent_rows_is_clopper_and_pearsons() -> None:
    for hits, count in ((0, 12), (3, 12), (12, 12), (40, 300)):
        right = np.arange(count) < hits
        exact = stats.binomtest(hits, count).proportion_ci(0.9, "exact")
        assert clustered_interval(right, np.arange(count), 0.9) == pytest.approx((exact.low, exact.high))
    assert clustered_interval(np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64), 0.9) == (0.0, 1.0)


def test_copies_of_a_row_are_no_news() -> None:
    """Rows that repeat within their unit tell what one row per unit does, but for what Student's t widens."""
    right = np.arange(40) < 10
    alone = clustered_interval(right, np.arange(40), 0.95)
    low, high = clustered_interval(right.repeat(25), np.arange(40).repeat(25), 0.95)
    assert alone[0] - 0.01 < low < alone[0] and alone[1] < high < alone[1] + 0.01
    agreed = clustered_interval(np.ones(50, dtype=bool), np.arange(5).repeat(10), 0.95)
    assert agreed == clustered_interval(np.ones(5, dtype=bool), np.arange(5), 0.95)


def test_intervals_of_clustered_rows_cover() -> None:
    missed = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        rate = random.beta(2, 6, 30).repeat(10)
        low, high = clustered_interval(random.random(300) < rate, np.arange(30).repeat(10), 0.9)
        missed += not low <= 0.25 <= high
    assert missed <= 33  # 30 are expected, and more would be within chance up to 39


@pytest.mark.parametrize(("noise", "right"), [(0.1, 0.9), (0.3, 0.7), (0.25, 0.5), (0.4, 1.0)])
def test_precision_by_noise_is_bayes_rule(noise: float, right: float) -> None:
    against = {"wrong label": noise * right, "right label": (1 - noise) * (1 - right)}
    wanted = against["wrong label"] / sum(against.values())
    assert vote.precision_by_noise(noise, sum(against.values())) == pytest.approx(wanted)
    assert vote.precision_by_errors(1 - right, sum(against.values())) <= wanted + 1e-12
    # The secret that a vote cannot tell: half the noise, and a vote that errs more, look just the same.
    assert vote.precision_by_noise(noise / 2, sum(against.values())) < wanted


def test_flipping_all_that_a_poor_vote_is_against_does_harm() -> None:
    """Right on 60 % of the truth, 30 % of labels wrong: 39 % of what the vote is against is wrong."""
    against = 0.3 * 0.6 + 0.7 * 0.4
    assert vote.precision_by_noise(0.3, against) == pytest.approx(0.18 / 0.46)


def test_a_ratio_of_two_shares_is_covered() -> None:
    """Where the whole is known it is the part's interval; elsewhere it covers as it should."""
    assert vote.ratio_interval(0.1, (0.06, 0.17), 0.4, (0.4, 0.4)) == pytest.approx((0.15, 0.425))
    assert vote.ratio_interval(0.1, (0.05, 0.2), 0.1, (0.0, 0.3))[1] == math.inf
    missed = 0
    for seed in range(300):
        shares = [np.random.default_rng([seed, n]).random(120) < rate for n, rate in enumerate((0.1, 0.3))]
        ends = [clustered_interval(share, np.arange(120), 0.9) for share in shares]
        low, high = vote.ratio_interval(shares[0].mean(), ends[0], shares[1].mean(), ends[1])
        missed += not low <= 1 / 3 <= high
    assert 5 <= missed <= 33


@pytest.mark.parametrize("kind", ["noise", "trusted"])
@pytest.mark.parametrize("per", [1, 5])
def test_the_bound_of_precision_holds_over_seeds(kind: str, per: int) -> None:
    """At each share as often as it should, and at all shares at once; recounted on the labels themselves."""
    noise, seeds, low, high, total, once = 0.25, 60, 0, 0, 0, 0
    for seed in range(seeds):
        votes, wrong = world(seed, 400, noise, per=per)
        trusted, _ = world(1000 + seed, 200, 0.0, per=per)
        evidence = Evidence(noise=noise) if kind == "noise" else Evidence(trusted)
        for weakest in vote.precision_by_share(votes, evidence, CONFIDENCE):
            mine = votes.strength_P < -weakest.threshold
            assert weakest.pairs == mine.sum() == int(weakest.share * 400)
            assert weakest.low is not None and weakest.high is not None and weakest.precision is not None
            assert weakest.low <= weakest.precision <= weakest.high
            low, total = low + (wrong[mine].mean() < weakest.low), total + 1
            high += wrong[mine].mean() > weakest.high
        at_once = vote.precision_by_share(votes, evidence, vote.at_once(CONFIDENCE))
        once += any(wrong[votes.strength_P < -w.threshold].mean() < (w.low or 0) for w in at_once)
    assert total > 5 * seeds and low <= 0.05 * total and once <= 0.05 * seeds
    assert kind == "trusted" or high <= 0.1 * total  # of trusted pairs the value itself is a least one


def test_trusted_pairs_hold_where_wrong_labels_are_the_hard_ones_and_noise_does_not() -> None:
    """What the page warns of: noise assumes that labels are wrong by chance."""
    missed = {"noise": 0, "trusted": 0}
    for seed in range(30):
        votes, wrong = world(seed, 400, 0.2, hard=True)
        cases = {"noise": Evidence(noise=0.2), "trusted": Evidence(world(1000 + seed, 200, 0.0)[0])}
        for kind, evidence in cases.items():
            curve = vote.precision_by_share(votes, evidence, vote.at_once(CONFIDENCE))
            missed[kind] += any(wrong[votes.strength_P < -w.threshold].mean() < (w.low or 0) for w in curve)
    assert missed["trusted"] <= 1 and missed["noise"] >= 20


def test_nothing_is_surely_wrong_among_right_labels_however_poor_the_vote() -> None:
    for quality in (0.0, 0.3, 1.0):
        for seed in range(10):
            votes, _ = world(seed, 400, 0.0, quality)
            evidence = Evidence(world(1000 + seed, 200, 0.0, quality)[0])
            curve = vote.precision_by_share(votes, evidence, vote.at_once(CONFIDENCE))
            assert len(curve) > 2 and vote.surely_wrong(curve) is None


def test_what_is_surely_wrong_is_found_where_the_vote_is_good() -> None:
    found = []
    for seed in range(10):
        votes, wrong = world(seed, 600, 0.3, 1.5)
        evidence = Evidence(world(1000 + seed, 300, 0.0, 1.5)[0])
        surely = vote.surely_wrong(vote.precision_by_share(votes, evidence, vote.at_once(CONFIDENCE)))
        assert surely is not None and wrong[votes.strength_P < -surely.threshold].mean() > 0.5
        found.append(surely.share)
    assert np.mean(found) > 0.15


def test_shares_end_where_the_vote_agrees_and_ties_count_as_agreement() -> None:
    strength = np.array([-3.0, -2.0, -2.0, *np.zeros(7), *np.ones(90)])
    curve = vote.precision_by_share(Votes(strength, np.arange(100)), Evidence(), CONFIDENCE)
    assert [(w.share, w.threshold, w.pairs) for w in curve] == [(0.02, 2.0, 1)]
    assert curve[0].precision is None and vote.half_ties(strength) == 0.065
    assert vote.precision_by_share(Votes(np.ones(50), np.arange(50)), Evidence(), CONFIDENCE) == []
    assert max(SHARES) < 0.5


def test_the_most_noise_that_there_can_be_is_no_less_than_there_is() -> None:
    for noise in (0.1, 0.3):
        bounds = [vote.most_noise(world(seed, 400, noise)[0], CONFIDENCE) for seed in range(20)]
        assert min(bounds) > noise - 0.02 and np.mean(bounds) < noise + 0.25


def test_noise_is_told_by_trusted_pairs() -> None:
    votes, wrong = world(0, 20_000, 0.3)
    evidence = Evidence(world(1, 20_000, 0.0)[0])
    assert vote.noise_of(votes, evidence) == pytest.approx(wrong.mean(), abs=0.02)
    assert vote.noise_of(votes, Evidence(noise=0.1)) == 0.1
    useless = Evidence(Votes(np.array([-1.0, 1.0]), np.arange(2)))
    assert vote.noise_of(votes, useless) == 0.0


def test_doubts_are_the_shares_of_wrong_labels() -> None:
    """Where the vote's log-odds are right: of labels with a doubt of x, about a share x is wrong."""
    random = np.random.default_rng(0)
    lean = 2.5 * random.normal(size=40_000)
    votes_right = random.random(40_000) < expit(np.abs(lean))
    truth = np.sign(lean) * np.where(votes_right, 1, -1)
    wrong = random.random(40_000) < 0.2
    doubts = vote.doubts(lean * truth * np.where(wrong, -1, 1), 0.2)
    assert 0 <= doubts.min() and doubts.max() <= 1 and doubts.mean() == pytest.approx(0.2, abs=0.02)
    for low in np.arange(0, 1, 0.2):
        mine = (doubts >= low) & (doubts < low + 0.2)
        assert wrong[mine].mean() == pytest.approx(doubts[mine].mean(), abs=0.03)


def test_doubts_of_votes_that_say_nothing_or_all() -> None:
    strength = np.array([-2.0, 1.0, 0.5, 0.0, 3.0])
    assert vote.doubts(-strength, 0.2) == pytest.approx(np.full(5, 0.2)), "worse than chance"
    assert vote.doubts(np.zeros(3), 0.2) == pytest.approx(np.full(3, 0.2))
    assert not vote.doubts(strength, 0.0).any(), "no label is wrong"
    assert vote.doubts(np.array([1.0, 2.0, 0.0]), 0.2) == pytest.approx([0, 0, 0.2], abs=1e-6), "but a tie"
    assert vote.doubts(7 * strength, 0.2) == pytest.approx(vote.doubts(strength, 0.2)), "of any scale"


def test_placements_are_the_area_under_the_curve_by_a_double_loop() -> None:
    random = np.random.default_rng(0)
    weak, others = random.integers(-4, 3, 20).astype(float), random.integers(-3, 4, 30).astype(float)
    wanted = np.mean([[(o > w) + (o == w) / 2 for o in others] for w in weak])
    assert vote.placements(weak, others).mean() == pytest.approx(wanted)


def test_planted_pairs_and_weakest_ones_are_as_many_as_asked() -> None:
    assert len(vote.draw_planted(200, 0.05, 1)) == 10 and vote.draw_planted(200, 0.0, 1) == []
    assert vote.draw_planted(200, 0.05, 1) != vote.draw_planted(200, 0.05, 2)
    chosen = vote.weakest_pairs(np.array([1.0, -1.0, -1.0, 0.0, -2.0]), 0.4)
    assert chosen.tolist() == [False, True, False, False, True]

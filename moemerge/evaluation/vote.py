"""A vote of reward models on the labels of preference pairs: what it doubts, and how often rightly.

A pair's strength is the mean over voters of score(chosen) - score(rejected), by voters that have not seen the
pair (Secrets of RLHF II, arXiv 2401.06080). The vote is against a label whose strength is below 0.

Such a vote cannot know its own errors: that it is against a share q of labels can mean wrong labels or a poor
vote. Either pairs with checked labels tell how often it errs, or the share p of wrong labels is known.

Shapes: V voters, P pairs, T trusted pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit

from moemerge.reports.statistics import Floats, Integers, clustered_interval
from moemerge.reports.table import Interval

Flags = NDArray[np.bool_]
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)  # of weakest pairs, for which precision is asked
ASSUMED = (0.05, 0.1, 0.2, 0.3)  # shares of wrong labels, where nothing is known of them
MORE_THAN_HALF = 0.5  # a flip of pairs helps if so many of them are wrong


def strength_and_spread(differences_VP: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation (of the voters, not of their mean) over voters; each [P]."""
    return differences_VP.mean(axis=0), differences_VP.std(axis=0)


@dataclass(frozen=True)
class Votes:
    """Strengths of pairs; pairs with equal `units_P` (a prompt's) are no independent observations."""

    strength_P: Floats
    units_P: Integers

    def part(self, chosen_P: Flags) -> Votes:
        """The same of some pairs."""
        return Votes(self.strength_P[chosen_P], self.units_P[chosen_P])

    def against(self, threshold: float, confidence: float) -> tuple[float, Interval]:
        """Share of labels that the vote is against, of pairs on which |strength| is above `threshold`.

        With its interval; (0, (0, 1)) where there are no such pairs.
        """
        sure_P = np.abs(self.strength_P) > threshold
        against_P = self.strength_P[sure_P] < 0
        share = float(against_P.mean()) if len(against_P) else 0.0
        return share, clustered_interval(against_P, self.units_P[sure_P], confidence)


@dataclass(frozen=True)
class Evidence:
    """What tells wrong labels from errors of the vote: its strengths of trusted pairs, or the noise."""

    trusted: Votes | None = None
    noise: float | None = None

    def part(self, chosen_T: Flags) -> Evidence:
        """The same, by some of the trusted pairs."""
        return self if self.trusted is None else Evidence(self.trusted.part(chosen_T))

    @property
    def is_known(self) -> bool:
        """Whether there is any."""
        return self.trusted is not None or self.noise is not None


@dataclass(frozen=True)
class Weakest:
    """The weakest pairs: those that the vote is against by more than `threshold`.

    share: of all pairs, as asked for. pairs: their number. against: share of labels that the vote is against
    where it is as sure. precision: share of these pairs whose label is wrong, with `low` and `high`; None
    without evidence.
    """

    share: float
    threshold: float
    pairs: int
    against: float
    precision: float | None
    low: float | None
    high: float | None


def precision_by_noise(noise: float, against: float) -> float:
    """Share of wrong labels among those that the vote is against, if a share `noise` of all labels is wrong.

    p (1 - p - q) / ((1 - 2p) q): a vote that is right on a share a of true labels is against
    q = a p + (1 - a)(1 - p) of the labels, of which a p are wrong. Rises with p and falls with q. It takes
    labels to be wrong by chance, at the same rate where the vote is sure as elsewhere.
    """
    if not against:
        return 0.0
    precision = noise * (1 - noise - against) / ((1 - 2 * noise) * against)
    return min(1.0, max(0.0, precision))


def precision_by_errors(errors: float, against: float) -> float:
    """Least share of wrong labels among those that the vote is against, if it errs on a share of true labels.

    1 - e / q: right labels that the vote is against are at most e of all, whatever the noise is like.
    """
    return max(0.0, 1 - errors / against) if against else 0.0


def precision_by_share(votes: Votes, evidence: Evidence, confidence: float) -> list[Weakest]:
    """The weakest pairs at each of SHARES, as long as the vote is against all of them; how many are wrong."""
    found = []
    for share in SHARES:
        threshold = _threshold(votes.strength_P, share)
        if threshold is not None:
            found.append(_weakest(votes, evidence, share, threshold, confidence))
    return found


def _threshold(strength_P: Floats, share: float) -> float | None:
    """The t such that `share` of the pairs have strength below -t; None if these are none, or not below 0."""
    count = int(share * len(strength_P))
    ordered_P = np.sort(strength_P)
    if not count or ordered_P[count - 1] >= 0:
        return None
    return float(max(0.0, -ordered_P[count])) if count < len(ordered_P) else 0.0


def _weakest(votes: Votes, evidence: Evidence, share: float, threshold: float, confidence: float) -> Weakest:
    against, interval = votes.against(threshold, confidence)
    pairs = int((votes.strength_P < -threshold).sum())
    precision = _precision(evidence, threshold, against, interval, confidence)
    return Weakest(share, threshold, pairs, against, *precision)


def _precision(
    evidence: Evidence, threshold: float, against: float, interval: Interval, confidence: float
) -> tuple[float, float, float] | tuple[None, None, None]:
    """Precision and its ends, at the confidence that `interval`, of `against`, has."""
    low, high = interval
    if evidence.noise is not None:
        values = [precision_by_noise(evidence.noise, q) for q in (against, high, low)]
        return values[0], values[1], values[2]
    if evidence.trusted is None:
        return None, None, None
    errors, ends = evidence.trusted.against(threshold, confidence)
    fewest, most = ratio_interval(errors, ends, against, interval)
    return precision_by_errors(errors, against), max(0.0, 1 - most), max(0.0, 1 - fewest)


def ratio_interval(part: float, part_ends: Interval, whole: float, whole_ends: Interval) -> Interval:
    """Interval of part / whole, two independent estimates, from the interval of each.

    It has their confidence (MOVER-R: Donner and Zou 2012, Stat. Methods Med. Res. 21, 347-359).
    """
    product = part * whole

    def end(its_part: float, its_whole: float, side: int) -> float:
        denominator = its_whole * (2 * whole - its_whole)
        if denominator <= 0:
            return math.inf if side > 0 else 0.0
        root = product**2 - its_part * (2 * part - its_part) * denominator
        return (product + side * math.sqrt(max(0.0, root))) / denominator

    return end(part_ends[0], whole_ends[1], -1), end(part_ends[1], whole_ends[0], 1)


def at_once(confidence: float) -> float:
    """The confidence that each precision needs for those at all SHARES to hold at once (Bonferroni)."""
    return 1 - (1 - confidence) / len(SHARES)


def surely_wrong(curve: Sequence[Weakest]) -> Weakest | None:
    """The largest set of weakest pairs of which more than half are wrong by the lower bound, if any is."""
    sure = [weakest for weakest in curve if (weakest.low or 0.0) > MORE_THAN_HALF]
    return sure[-1] if sure else None


def most_noise(votes: Votes, confidence: float) -> float:
    """Upper bound of the share of wrong labels, if labels are wrong by chance.

    A vote that is right on a share a is against a p + (1 - a)(1 - p), so never less than p, of the labels: at
    any certainty, and least where it is surest.
    """
    thresholds = [_threshold(-np.abs(votes.strength_P), share) for share in SHARES]
    level = at_once(confidence)
    bounds = (votes.against(threshold, level)[1][1] for threshold in thresholds if threshold is not None)
    return min(0.5, *bounds, 0.5)


def noise_of(votes: Votes, evidence: Evidence) -> float:
    """The share of wrong labels: as known, or (q - e) / (1 - 2e) by the vote's errors e on trusted pairs."""
    if evidence.noise is not None:
        return evidence.noise
    assert evidence.trusted is not None, "options see to it"
    errors, against = (half_ties(v.strength_P) for v in (evidence.trusted, votes))
    return 0.0 if errors >= 0.5 else min(0.499, max(0.0, (against - errors) / (1 - 2 * errors)))


def half_ties(strength_P: Floats) -> float:
    """The share of labels that the vote is against; a strength of 0 counts half."""
    return float((strength_P < 0).mean() + (strength_P == 0).mean() / 2)


def doubts(strength_P: Floats, noise: float) -> Floats:
    """The probability that each label is wrong, by its strength u and the share p of wrong labels.

    sigmoid(-b u - log((1 - p) / p)): the vote's log-odds b u for the label, and what the label itself says.
    b is the likeliest (Bradley-Terry with wrong labels): a label agrees with probability
    p + (1 - 2p) sigmoid(b u).
    """
    if not noise > 0:
        return np.zeros(len(strength_P))
    belief_P = _likeliest_factor(strength_P, noise) * strength_P + math.log((1 - noise) / noise)
    return np.asarray(expit(-belief_P))


def _likeliest_factor(strength_P: Floats, noise: float) -> float:
    """The b >= 0 by which the labels are likeliest; 0 for a vote that is no better than chance."""
    scale = math.sqrt(float((strength_P**2).mean()))
    if not scale > 0:
        return 0.0

    def loss(factor: float) -> float:
        return -float(np.log(noise + (1 - 2 * noise) * expit(factor / scale * strength_P)).mean())

    # It may have more than one dip: the best of a grid first, then what lies between its neighbours.
    grid = np.concatenate([[0.0], np.geomspace(1e-3, 1e2, 51)])
    best = int(np.argmin([loss(factor) for factor in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    refined = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(refined.x if refined.fun < loss(grid[best]) else grid[best]) / scale


def placements(weak_X: Floats, others_P: Floats) -> Floats:
    """For each of some strengths, the share of other pairs that are stronger; ties count half. [X].

    The mean is the area under the ROC curve (AUC) of finding the weak among the others.
    """
    ordered_P = np.sort(others_P)
    below, up_to = (np.searchsorted(ordered_P, weak_X, side) for side in ("left", "right"))
    return np.asarray(1 - (below + up_to) / 2 / len(others_P))


def weakest_pairs(strength_P: Floats, share: float) -> Flags:
    """Which pairs are the weakest `share`, rounded down; of equal ones the first."""
    chosen_P = np.zeros(len(strength_P), dtype=bool)
    chosen_P[np.argsort(strength_P, kind="stable")[: int(share * len(strength_P))]] = True
    return chosen_P


def draw_planted(count: int, share: float, seed: int) -> list[int]:
    """Places of the pairs to be turned round for the voters, in order; so many as come nearest to `share`."""
    random = np.random.default_rng([seed, count])
    return sorted(random.choice(count, round(share * count), replace=False).tolist())


def by_subset(subsets: Sequence[str]) -> Iterator[tuple[str, Flags]]:
    """Each subset's name, in order, and which pairs it has."""
    names_P = np.array(subsets, dtype=object)
    for name in sorted(set(subsets)):
        yield name, names_P == name

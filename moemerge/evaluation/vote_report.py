"""What is said of a vote on labels: numbers, sentences, tables, pictures, the pairs to read.

Shapes: V voters, P pairs, X pairs and then trusted pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from moemerge.data.pairs import Pair, numbered, prompt_key
from moemerge.evaluation import vote
from moemerge.evaluation.probes.edit_effects import excerpt
from moemerge.evaluation.probes.edits import last_message
from moemerge.evaluation.vote import Evidence, Flags, Votes, Weakest
from moemerge.options.strength import VoteSettings
from moemerge.reports import plotting
from moemerge.reports.figures import Figure, Line
from moemerge.reports.html import Section, write_report
from moemerge.reports.statistics import Floats, sampling_units, t_test
from moemerge.reports.table import Table, percent

KEPT, FLIPPED, DROPPED = "kept", "flipped", "dropped"
TO_READ = 20
BINS = 40
LEAK = 0.01  # p below which planted flips count as harder to find than they should be
HISTOGRAM, PRECISION = "strength.png", "precision.png"


@dataclass(frozen=True)
class Poll:
    """The votes on all pairs, what tells their errors, and what is to be done.

    differences_VX: by each voter, the score of chosen minus that of rejected, of the pairs and then of the
    trusted pairs. planted: places of the pairs that the voters were shown with the other label.
    """

    pairs: Sequence[Pair]
    trusted: Sequence[Pair]
    differences_VX: Floats
    planted: Sequence[int]
    settings: VoteSettings

    @cached_property
    def votes(self) -> Votes:
        """Strengths of the pairs."""
        return _votes(self.differences_VX[:, : len(self.pairs)], self.pairs)

    @cached_property
    def spread_P(self) -> Floats:
        """How far the voters disagree on each pair."""
        return vote.strength_and_spread(self.differences_VX[:, : len(self.pairs)])[1]

    @cached_property
    def evidence(self) -> Evidence:
        """What tells how often the vote errs; a noise that is given comes before trusted pairs."""
        if self.settings.noise is not None or not self.trusted:
            return Evidence(noise=self.settings.noise)
        return Evidence(_votes(self.differences_VX[:, len(self.pairs) :], self.trusted))

    @cached_property
    def parts(self) -> dict[str, tuple[Flags, Flags]]:
        """Which pairs and trusted pairs each subset has, by its name."""
        trusted_T = np.array([pair.subset for pair in self.trusted], dtype=object)
        found = vote.by_subset([pair.subset for pair in self.pairs])
        return {name: (mine_P, np.asarray(trusted_T == name)) for name, mine_P in found}

    @cached_property
    def curves(self) -> dict[str, list[Weakest]]:
        """Precision by share in each subset; the bounds of one subset hold at once."""
        level = vote.at_once(self.settings.confidence)
        return {
            name: vote.precision_by_share(self.votes.part(mine_P), self.evidence.part(mine_T), level)
            for name, (mine_P, mine_T) in self.parts.items()
        }

    @cached_property
    def curve(self) -> list[Weakest]:
        """Precision by share among all pairs."""
        level = vote.at_once(self.settings.confidence)
        return vote.precision_by_share(self.votes, self.evidence, level)

    @cached_property
    def treatments(self) -> list[str]:
        """What is done with each pair: KEPT, FLIPPED or DROPPED."""
        settings, strength_P = self.settings, self.votes.strength_P
        chosen_P = np.zeros(len(self.pairs), dtype=bool)
        if settings.treat == "auto":
            for name, (mine_P, _) in self.parts.items():
                if (surely := vote.surely_wrong(self.curves[name])) is not None:
                    chosen_P |= mine_P & (strength_P < -surely.threshold)
        elif settings.treat in ("flip", "drop"):
            chosen_P = vote.weakest_pairs(strength_P, settings.share)
        way = settings.auto_by if settings.treat == "auto" else settings.treat
        if way == "flip":
            chosen_P &= strength_P < 0  # the vote is not against the others
        does = FLIPPED if way == "flip" else DROPPED
        return [does if chosen else KEPT for chosen in chosen_P]

    @cached_property
    def doubts_P(self) -> Floats | None:
        """The probability that each label is wrong, if that is to be written."""
        if self.settings.treat != "soft":
            return None
        return vote.doubts(self.votes.strength_P, vote.noise_of(self.votes, self.evidence))

    def numbers(self) -> dict[str, Any]:
        """What strength.json holds."""
        subsets = {name: self._subset(name, mine_P) for name, (mine_P, _) in self.parts.items()}
        return {
            "pairs": len(self.pairs),
            "prompts": len(set(map(prompt_key, self.pairs))),
            "voters_per_pair": len(self.differences_VX),
            "confidence": self.settings.confidence,
            "against": vote.half_ties(self.votes.strength_P),
            "flips": self._flips(),
            "evidence": self._evidence(),
            "most_noise": vote.most_noise(self.votes, self.settings.confidence),
            "precision": [self._row(weakest) for weakest in self.curve],
            "subsets": subsets,
            "treat": self.settings.treat,
            "treated": {name: self.treatments.count(name) for name in (KEPT, FLIPPED, DROPPED)},
            "doubt": None if self.doubts_P is None else float(self.doubts_P.mean()),
        }

    def _subset(self, name: str, mine_P: Flags) -> dict[str, Any]:
        surely = vote.surely_wrong(self.curves[name])
        treated = sum(self.treatments[place] != KEPT for place in np.flatnonzero(mine_P))
        return {
            "pairs": int(mine_P.sum()),
            "against": vote.half_ties(self.votes.strength_P[mine_P]),
            "surely_wrong": asdict(surely) if surely else None,
            "treated": treated,
            "precision": [asdict(weakest) for weakest in self.curves[name]],
        }

    def _row(self, weakest: Weakest) -> dict[str, Any]:
        """A row of the curve of all pairs: with planted flips found, and precision by assumed noise."""
        found = (self._weak_X < -weakest.threshold).mean()
        assumed = {str(noise): vote.precision_by_noise(noise, weakest.against) for noise in vote.ASSUMED}
        return asdict(weakest) | {"flips_found": float(found), "assumed": assumed}

    @cached_property
    def _weak_X(self) -> Floats:
        """Strengths of the flipped labels: the planted ones', or as there are none, every label's."""
        strength_P = self.votes.strength_P
        return -(strength_P[list(self.planted)] if self.planted else strength_P)

    def _flips(self) -> dict[str, Any]:
        """How well the vote finds planted flips, and whether those are harder to find than any other flip.

        A voter that has not seen a pair gives its flip minus the pair's strength, planted or not. If planted
        flips are harder to find, voters have learned them from somewhere: pairs leak from fold to fold.
        """
        kept_P = np.ones(len(self.pairs), dtype=bool)
        kept_P[list(self.planted)] = False
        others_P = self.votes.strength_P[kept_P]
        placed_X = vote.placements(self._weak_X, others_P)
        tested = t_test(placed_X.tolist(), self.settings.confidence)
        low, high = np.clip(tested[0], 0, 1).tolist() if tested else (None, None)
        mirrored_P = vote.placements(-others_P, others_P)
        test = ttest_ind(placed_X, mirrored_P, equal_var=False, alternative="less") if self.planted else None
        p = float(test.pvalue) if test is not None and np.isfinite(test.pvalue) else None
        return {
            "planted": len(self.planted),
            "auc": float(placed_X.mean()),
            "low": low,
            "high": high,
            "auc_of_any_flip": float(mirrored_P.mean()),
            "auc_of_wrong_labels": self._among_true(float(mirrored_P.mean())),
            "p_leak": p,
        }

    def _among_true(self, auc: float) -> float | None:
        """The AUC of wrong labels among right ones, if the noise p is known: 1/2 + (auc - 1/2) / (1 - 2p).

        A flip of a wrong label is right, and some others are wrong: a share p of both is the other's.
        """
        if not self.evidence.is_known:
            return None
        return min(1.0, max(0.0, 0.5 + (auc - 0.5) / (1 - 2 * vote.noise_of(self.votes, self.evidence))))

    def _evidence(self) -> dict[str, Any]:
        """What is known of the vote's errors."""
        if self.evidence.noise is not None:
            return {"kind": "noise", "noise": self.evidence.noise}
        if self.evidence.trusted is None:
            return {"kind": "none"}
        trusted = self.evidence.trusted
        errors, (low, high) = trusted.against(0.0, self.settings.confidence)
        return {
            "kind": "trusted",
            "trusted": len(trusted.strength_P),
            "errors": errors,
            "low": low,
            "high": high,
            "noise": vote.noise_of(self.votes, self.evidence),
        }


def _votes(differences_VP: Floats, pairs: Sequence[Pair]) -> Votes:
    units_P = sampling_units(np.array(numbered(map(prompt_key, pairs)), dtype=np.int64))
    return Votes(vote.strength_and_spread(differences_VP)[0], units_P)


def sentence(numbers: Mapping[str, Any]) -> str:
    """What the vote came to, in words."""
    flips, treated = numbers["flips"], numbers["treated"]
    interval = f" ({flips['low']:.2f} to {flips['high']:.2f})" if flips["low"] is not None else ""
    kind = "planted flips" if flips["planted"] else "flips"
    said = (
        f"The vote is against {numbers['against']:.1%} of {numbers['pairs']} labels and finds {kind} "
        f"with an AUC of {flips['auc']:.2f}{interval}"
    )
    done = [f"{treated[name]} {name}" for name in (FLIPPED, DROPPED) if treated[name]]
    if numbers["treat"] == "soft":
        done = [f"{numbers['doubt']:.1%} of the labels are wrong by their doubts"]
    elif numbers["treat"] == "auto" and not done:
        done = ["nothing is changed: of no share of the weakest pairs are more than half wrong for sure"]
    return "; ".join([said, *done]) + "."


def paragraphs(numbers: Mapping[str, Any]) -> list[str]:
    """What the numbers rest on, and what speaks against them."""
    return [*_on_evidence(numbers), *_on_leaks(numbers["flips"])]


def _on_evidence(numbers: Mapping[str, Any]) -> Iterator[str]:
    evidence, most = numbers["evidence"], numbers["most_noise"]
    if evidence["kind"] == "trusted":
        yield (
            f"Of {evidence['trusted']} trusted labels the vote is against {evidence['errors']:.1%} "
            f"({evidence['low']:.1%} to {evidence['high']:.1%}): so often it errs. Of the labels that it is "
            "against, 1 - e / q at least are wrong, e being its errors on trusted pairs and q the share of "
            "labels it is against, both where it is as sure."
        )
    elif evidence["kind"] == "noise":
        yield (
            f"The shares of wrong labels take {evidence['noise']:.1%} of all labels to be wrong by chance. "
            "They are too high if labels are wrong more often where the vote is unsure, which is usual where "
            "people disagree: trusted pairs tell them without that assumption."
        )
    else:
        yield (
            "Nothing tells wrong labels from errors of the vote. The columns say how many would be wrong if "
            "so many of all were, by chance; trusted pairs, or a known noise, tell how many are."
        )
    if (auc := numbers["flips"]["auc_of_wrong_labels"]) is not None:
        yield f"Some flips make wrong labels right; it finds wrong labels with an AUC of {auc:.2f}."
    level = percent(numbers["confidence"])
    yield f"If labels are wrong by chance, at most {most:.1%} of them are ({level} bound)."


def _on_leaks(flips: Mapping[str, Any]) -> Iterator[str]:
    if flips["p_leak"] is not None and flips["p_leak"] < LEAK:
        yield (
            f"Planted flips are harder to find than any other flip would be (AUC {flips['auc']:.2f} against "
            f"{flips['auc_of_any_flip']:.2f}, p {flips['p_leak']:.1g}): voters seem to know them from pairs "
            "of other folds that are nearly the same. Fold by something coarser (fold_by)."
        )


def number_tables(numbers: Mapping[str, Any]) -> list[Table]:
    """Precision by share, and subsets if there are several."""
    return [_precision_table(numbers), *([_subset_table(numbers)] if len(numbers["subsets"]) > 1 else [])]


def _precision_table(numbers: Mapping[str, Any]) -> Table:
    known = numbers["evidence"]["kind"] != "none"
    assumed = [f"wrong, if {percent(noise)} of all are" for noise in vote.ASSUMED]
    header = ["weakest", "pairs", "against where as sure", "planted flips found"]
    header += ["wrong", "at least", "at most"] if known else assumed
    rows = []
    for row in numbers["precision"]:
        values = [row[name] for name in ("precision", "low", "high")] if known else row["assumed"].values()
        shares = [f"{value:.1%}" for value in (row["against"], row["flips_found"], *values)]
        rows.append([percent(row["share"]), str(row["pairs"]), *shares])
    note = f"All bounds hold at once at {percent(numbers['confidence'])}." if known else ""
    return Table("How many of the weakest pairs have wrong labels", header, rows, note)


def _subset_table(numbers: Mapping[str, Any]) -> Table:
    header = ["subset", "pairs", "against", "more than half wrong for sure", "changed", "share changed"]
    rows = []
    for name, subset in numbers["subsets"].items():
        surely = subset["surely_wrong"]
        weakest = f"{surely['pairs']} weakest (at least {surely['low']:.1%})" if surely else "none"
        share = f"{subset['treated'] / subset['pairs']:.1%}"
        rows.append([name or "(none)", str(subset["pairs"]), f"{subset['against']:.1%}", weakest,
                     str(subset["treated"]), share])  # fmt: skip
    note = "A vote measures agreement: a subset of a minority's views looks wrong to it."
    return Table("Subsets", header, rows, note)


def _to_read(poll: Poll) -> Table:
    """The pairs that the vote is most against, or least for."""
    strength_P = poll.votes.strength_P
    rows = []
    for place in np.argsort(strength_P, kind="stable")[:TO_READ]:
        pair = poll.pairs[place]
        texts = [excerpt(last_message(pair.prompt), -1), *map(_excerpt, (pair.chosen, pair.rejected))]
        numbers = [f"{strength_P[place]:.3g}", f"{poll.spread_P[place]:.2g}"]
        rows.append([str(pair.row), *numbers, *texts])
    header = ["row", "strength", "spread", "prompt", "chosen, by its label", "rejected, by its label"]
    note = "Read them: is the label wrong, or the vote? Whoever checks some labels has trusted pairs."
    return Table(f"The {len(rows)} weakest pairs", header, rows, note)


def _excerpt(text: Any) -> str:
    return excerpt(last_message(text))


def draw(poll: Poll, numbers: Mapping[str, Any], folder: Path) -> list[Figure]:
    """The histogram of strengths, and precision by share where there is any."""
    strength_P = poll.votes.strength_P
    ends = np.histogram_bin_edges(np.concatenate([strength_P, poll._weak_X]), BINS)
    middles = ((ends[1:] + ends[:-1]) / 2).tolist()
    shown = {"labels as they are": strength_P, "planted flips": poll._weak_X}
    series = {
        name: Line(middles, (np.histogram(values, ends)[0] / len(values)).tolist())
        for name, values in shown.items()
    }
    files = [folder / HISTOGRAM]
    plotting.lines(series, files[0], "Strength of labels", "strength", "share of pairs")
    if numbers["precision"]:
        files.append(folder / PRECISION)
        title, y_label = "Wrong labels among the weakest pairs", "share of wrong labels"
        plotting.lines(_precision_lines(numbers), files[1], title, "weakest share of pairs", y_label)
    return [Figure.load(file) for file in files]


def _precision_lines(numbers: Mapping[str, Any]) -> dict[str, Line]:
    rows = numbers["precision"]
    shares = [row["share"] for row in rows]
    half = {"one half": Line(shares, [vote.MORE_THAN_HALF] * len(shares), reference=True)}
    if numbers["evidence"]["kind"] == "none":
        by_noise = {noise: [row["assumed"][str(noise)] for row in rows] for noise in vote.ASSUMED}
        assumed = {f"if {percent(p)} of all are wrong": Line(shares, curve) for p, curve in by_noise.items()}
        return half | assumed
    value, low, high = ([row[name] for row in rows] for name in ("precision", "low", "high"))
    return half | {"wrong": Line(shares, value, low, high)}


def write_page(poll: Poll, numbers: Mapping[str, Any], folder: Path) -> None:
    """report.html and report.md in `folder`, with their pictures."""
    figures, shown = draw(poll, numbers, folder), [*number_tables(numbers), _to_read(poll)]
    section = Section("Vote", paragraphs(numbers), shown, figures, lead=sentence(numbers))
    write_report(folder, "Which labels the vote doubts", [section])

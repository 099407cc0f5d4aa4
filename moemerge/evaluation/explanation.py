"""What token rewards say of a model: which phrases pay, how early pairs are decided, and texts to read.

P pairs, Q shares of an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moemerge.data.pairs import Pair, numbered, prompt_key
from moemerge.evaluation.phrases import Phrase, phrases, unlike
from moemerge.evaluation.probes.edit_effects import excerpt
from moemerge.evaluation.probes.edits import last_message
from moemerge.evaluation.token_rewards import TokenRewards
from moemerge.options.explain import Explain
from moemerge.reports import plotting
from moemerge.reports.figures import Figure, Line
from moemerge.reports.heat_text import HeatText
from moemerge.reports.html import Section
from moemerge.reports.statistics import Floats, clustered_interval
from moemerge.reports.table import Table, percent, with_interval

SHARES = np.arange(1, 11) / 10  # of an answer's tokens, at which its score is looked at
MOST_PHRASES = 200  # at either end that are kept
TOLD = 15  # at either end, on the page
STRONGEST = 0.98  # quantile of the words' rewards that has the strongest colour
PICTURE = "decided.png"


@dataclass(frozen=True)
class Explained:
    """Pairs, and what the tokens of their chosen and rejected answers add to the scores of each."""

    pairs: Sequence[Pair]
    chosen: Sequence[TokenRewards]
    rejected: Sequence[TokenRewards]
    options: Explain

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the answers' scores: the unit of the page. 1 where all are equal."""
        return float(np.std([answer.score for answer in (*self.chosen, *self.rejected)])) or 1.0

    @cached_property
    def margins_P(self) -> Floats:
        """Score of the chosen answer minus that of the rejected one."""
        return self._margins(1.0)

    @cached_property
    def units_P(self) -> Any:
        """Equal numbers for pairs of one prompt."""
        return np.array(numbered(map(prompt_key, self.pairs)))

    @cached_property
    def phrases(self) -> list[Phrase]:
        """What words in a row add, in standard deviations of scores; highest first."""
        units, o = self.units_P.tolist(), self.options
        found = phrases([*self.chosen, *self.rejected], units * 2, o.least, o.confidence)
        return [_scaled(phrase, self.spread) for phrase in found]

    def numbers(self) -> dict[str, Any]:
        """All that the page says in numbers; rewards in standard deviations of scores."""
        kept = self.phrases if len(self.phrases) <= 2 * MOST_PHRASES else [
            *self.phrases[:MOST_PHRASES], *self.phrases[-MOST_PHRASES:]
        ]  # fmt: skip
        words = [word.reward for answer in (*self.chosen, *self.rejected) for word in answer.words]
        return {
            "pairs": len(self.pairs),
            "prompts": len(np.unique(self.units_P)),
            "confidence": self.options.confidence,
            "spread": self.spread,
            "per_word": float(np.mean(words or [0.0])) / self.spread,
            "decided": self._decided(),
            "phrases_counted": len(self.phrases),
            "phrases": [asdict(phrase) for phrase in kept],
        }

    def _decided(self) -> dict[str, list[float]]:
        """By share of both answers: pairs ranked correctly, with interval; pairs whose verdict stays."""
        right_PQ = np.stack([self._margins(share) > 0 for share in SHARES], axis=1)
        # A verdict stands from the first share on at which, and after which, it is the last one's.
        stands_PQ = np.logical_and.accumulate((right_PQ == right_PQ[:, -1:])[:, ::-1], axis=1)[:, ::-1]
        intervals = [
            clustered_interval(right_P, self.units_P, self.options.confidence) for right_P in right_PQ.T
        ]
        return {
            "share": SHARES.tolist(),
            "right": right_PQ.mean(axis=0).tolist(),
            "right_low": [low for low, _ in intervals],
            "right_high": [high for _, high in intervals],
            "stands": stands_PQ.mean(axis=0).tolist(),
        }

    def _margins(self, share: float) -> Floats:
        """Differences of scores after this share of both answers' tokens, rounded."""
        sides = (
            [answer.prefix_scores[round(share * len(answer.tokens))] for answer in side]
            for side in (self.chosen, self.rejected)
        )
        chosen_P, rejected_P = map(np.array, sides)
        margins_P: Floats = chosen_P - rejected_P
        return margins_P

    def to_read(self) -> list[int]:
        """The pairs to show: those that are ranked most wrongly, then others at random."""
        order = np.argsort(self.margins_P, kind="stable")
        worst = [int(n) for n in order[: self.options.shown // 2] if self.margins_P[n] < 0]
        others = np.random.default_rng(self.options.seed).permutation(len(self.pairs)).tolist()
        drawn = [n for n in others if n not in worst]
        return (worst + drawn)[: self.options.shown]


def _scaled(phrase: Phrase, spread: float) -> Phrase:
    values = {name: getattr(phrase, name) / spread for name in ("adds", "excess", "low", "high")}
    return Phrase(**asdict(phrase) | values)


def sentence(numbers: dict[str, Any]) -> str:
    """What came out, in one line."""
    decided = numbers["decided"]
    half = next(
        share for share, stands in zip(decided["share"], decided["stands"], strict=True) if stands >= 0.5
    )
    said = [
        f"{numbers['pairs']} pairs, {decided['right'][-1]:.0%} ranked correctly",
        f"half of the verdicts stand after {half:.0%} of the answers",
    ]
    level = 1 - numbers["confidence"]
    sure = [phrase for phrase in numbers["phrases"] if phrase["p"] < level]
    if sure and sure[0]["excess"] > 0:
        said.append(f"'{sure[0]['text']}' adds most ({sure[0]['excess']:+.2f} SD over other words)")
    if sure and sure[-1]["excess"] < 0:
        said.append(f"'{sure[-1]['text']}' costs most ({sure[-1]['excess']:+.2f} SD)")
    return "; ".join(said)


def sections(explained: Explained, numbers: dict[str, Any], folder: Path) -> list[Section]:
    """The page: what came out, phrases, when pairs are decided, texts. Draws the picture into `folder`."""
    _draw(numbers["decided"], folder / PICTURE)
    figure = Figure.load(folder / PICTURE)
    return [
        Section("Summary", [_how_to_read(numbers)], lead=sentence(numbers)),
        Section("What pays", tables=phrase_tables(explained.phrases, numbers["confidence"])),
        Section("How early pairs are decided", [DECIDED], [decided_table(numbers)], [figure]),
        Section("Texts to read", [COLOURS], texts=heat_texts(explained)),
    ]


def _how_to_read(numbers: dict[str, Any]) -> str:
    return (
        "A token's reward is the score of the answer up to it minus the score before it; all of them and "
        "the score of the bare prompt make the answer's score. Beginnings of answers are texts that the "
        "model was not trained on, and what a token does to later ones is counted as theirs: a view of "
        "where the score moves, not of why. Numbers are in standard deviations of the answers' scores "
        f"({numbers['spread']:.4g}); the average word adds {numbers['per_word']:+.4f}."
    )


DECIDED = (
    "Both answers are cut after a share of their tokens. Right: the beginning of the chosen answer scores "
    "higher. Stands: no later token changes which of the two is ahead."
)
COLOURS = (
    "Blue adds to the score; orange, underlined with dots, takes from it; the strongest colour stands for "
    "the number under each text or more. Pairs ranked most wrongly come first, then others drawn at random."
)


def phrase_tables(found: Sequence[Phrase], confidence: float) -> list[Table]:
    """The phrases that add and take most, of those whose difference is more than chance."""
    level = 1 - confidence
    sure = [phrase for phrase in found if phrase.p < level]
    ends = {
        "Phrases that add most": unlike([phrase for phrase in sure if phrase.excess > 0][:MOST_PHRASES]),
        "Phrases that take most": unlike(
            [phrase for phrase in sure[::-1] if phrase.excess < 0][:MOST_PHRASES]
        ),
    }
    note = (
        f"Over average: what a phrase adds minus what as many words of the same answers do, with "
        f"{percent(confidence)} intervals over prompts, each by itself. Only phrases whose p, adjusted for "
        f"all {len(found)} that were counted (Holm), is below {level:.2g}. A phrase that stands nowhere but "
        "within a longer one of the list is left out."
    )
    header = ["phrase", "over average", "adds", "places", "prompts", "p"]
    return [
        Table(title, header, [_row(phrase) for phrase in some[:TOLD]], note) for title, some in ends.items()
    ]


def _row(phrase: Phrase) -> list[str]:
    excess = with_interval(phrase.excess, (phrase.low, phrase.high), "+.3f")
    return [
        phrase.text,
        excess,
        f"{phrase.adds:+.3f}",
        str(phrase.places),
        str(phrase.prompts),
        f"{phrase.p:.2g}",
    ]


def decided_table(numbers: dict[str, Any]) -> Table:
    """Pairs ranked correctly, and verdicts that stand, by share of the answers."""
    decided = numbers["decided"]
    rows = [
        [f"{share:.0%}", with_interval(right, (low, high), ".3f"), f"{stands:.3f}"]
        for share, right, low, high, stands in zip(*decided.values(), strict=True)
    ]
    note = f"{percent(numbers['confidence'])} intervals over prompts."
    return Table("By share of the answers", ["read", "right", "stands"], rows, note)


def _draw(decided: dict[str, list[float]], path: Path) -> None:
    right = Line(decided["share"], decided["right"], decided["right_low"], decided["right_high"])
    stands = Line(decided["share"], decided["stands"])
    title = "How early pairs are decided"
    plotting.lines({"right": right, "stands": stands}, path, title, "share of both answers", "share of pairs")


def heat_texts(explained: Explained) -> list[HeatText]:
    """Both answers of the pairs to read, on one scale."""
    numbers = explained.to_read()
    shown = [side[n] for side in (explained.chosen, explained.rejected) for n in numbers]
    scale = scale_of(shown) / explained.spread
    return [text for n in numbers for text in _of_pair(explained, n, scale)]


def scale_of(answers: Sequence[TokenRewards]) -> float:
    """The reward of a word that has the strongest colour where these answers are shown together."""
    rewards = [abs(word.reward) for answer in answers for word in answer.words]
    return float(np.quantile(rewards, STRONGEST)) if rewards else 1.0


def _of_pair(explained: Explained, number: int, scale: float) -> Iterator[HeatText]:
    pair, spread = explained.pairs[number], explained.spread
    lead = explained.margins_P[number] / spread
    verdict = "ranked correctly" if lead > 0 else "ranked wrongly"
    for side, answers in (("chosen", explained.chosen), ("rejected", explained.rejected)):
        answer = answers[number]
        words = [(word.text, word.reward / spread) for word in answer.words]
        first = side == "chosen"
        asked = f"Prompt: {excerpt(last_message(pair.prompt), -1)} " if first and pair.prompt else ""
        note = (
            f"{asked}Prompt alone {answer.prompt_score:.3f}, whole {answer.score:.3f}. Strongest colour: "
            f"{scale:.2f} SD."
        )
        title = f"Row {pair.row}, {side}" + (f" ({verdict}, by {lead:+.2f} SD)" if first else "")
        yield HeatText(title, words, scale, note)

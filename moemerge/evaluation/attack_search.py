"""The search for answers that a reward model puts on the wrong side (REFORM, arXiv 2507.06419): by edits, or
among answers that were written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from tqdm.auto import tqdm

from moemerge.artifacts.progress import hidden
from moemerge.data.pairs import Pair
from moemerge.data.rows import Text
from moemerge.data.tokenise import Item
from moemerge.evaluation.probes.base import Edit
from moemerge.evaluation.probes.edits import apply, last_message
from moemerge.options.attack import AttackSettings
from moemerge.options.decode import Side
from moemerge.reports.statistics import Floats

Scorer = Callable[[Sequence[Item]], Floats]
Gold = Callable[[Text, Text], float]
KeepsClass = Callable[[Text], bool]
DECODING = "decoding"  # what made a written answer, where others have names of edits


@dataclass(frozen=True)
class Variant:
    """An answer on the way, its score, and the names of the edits that made it."""

    text: Text
    score: float
    edits: tuple[str, ...] = ()


@dataclass
class Search:
    """The search on one pair, which ends when the best of the beam scores above `goal`, the chosen answer.

    Of side chosen it is the good answer that is to score below `goal`, the rejected one. `keeps_class` tells
    whether an answer is still the worse (of side chosen: the better) one.
    """

    pair: Pair
    goal: float
    beam: list[Variant]
    random: Random
    keeps_class: KeepsClass
    side: Side = "rejected"
    queries: int = 0
    seen: set[str] = field(default_factory=set)

    @property
    def best(self) -> Variant:
        """The answer with the highest score, of side chosen the lowest."""
        return self.beam[0]

    @property
    def before(self) -> Text:
        """The pair's own answer of the side that is attacked."""
        return self.pair.rejected if self.side == "rejected" else self.pair.chosen

    @property
    def lead(self) -> float:
        """By how much the best answer lies on the wrong side of `goal`; negative on the right one."""
        return self.best.score - self.goal if self.side == "rejected" else self.goal - self.best.score

    @property
    def succeeded(self) -> bool:
        """Whether a bad answer beats the chosen one, or the rejected one a good answer."""
        return self.lead > 0

    def proposals(self, edits: Mapping[str, Edit], count: int) -> list[Variant]:
        """New answers, `count` tries from each of the beam, without scores."""
        variants = []
        for variant in self.beam:
            for name in self._names(list(edits), count):
                text = apply(edits[name], self.pair.prompt, variant.text, "", self.random)
                if text is not None and self._is_new(text) and self.keeps_class(text):
                    variants.append(Variant(text, np.nan, (*variant.edits, name)))
        return variants

    def random_variant(self, edits: Mapping[str, Edit], steps: int) -> Variant | None:
        """The answer after 1 to `steps` edits drawn at random, without a score; None if nothing changed."""
        start = self.beam
        for _ in range(self.random.randint(1, steps)):
            self.beam = self.proposals(edits, 1) or self.beam
        (variant,), self.beam = self.beam, start
        return variant if variant.edits else None

    def _names(self, names: list[str], count: int) -> list[str]:
        """`count` names in random order, each about as often as any other."""
        rounds = (self.random.sample(names, len(names)) for _ in range(-(-count // len(names))))
        return [name for names in rounds for name in names][:count]

    def _is_new(self, text: Text) -> bool:
        key = last_message(text)
        new = key not in self.seen
        self.seen.add(key)
        return new

    def take(self, variants: Sequence[Variant], beam: int) -> None:
        """Keep the best of the beam and of what was scored (NaN: could not be)."""
        usable = [variant for variant in variants if np.isfinite(variant.score)]
        self.queries += len(usable)
        sign = -1 if self.side == "rejected" else 1
        self.beam = sorted([*self.beam, *usable], key=lambda variant: sign * variant.score)[:beam]


def keeps_class(pair: Pair, gold: Gold | None, side: Side = "rejected") -> KeepsClass:
    """What tells whether a text is worse than the chosen answer; without gold everything is.

    Of side chosen, whether it is better than the rejected one.
    """
    if gold is None:
        return lambda text: True
    if side == "chosen":
        floor = gold(pair.prompt, pair.rejected)
        return lambda text: gold(pair.prompt, text) > floor
    limit = gold(pair.prompt, pair.chosen)
    return lambda text: gold(pair.prompt, text) < limit


def search(
    pairs: Sequence[Pair],
    scores_P2: Floats,
    edits: Mapping[str, Edit],
    scorer: Scorer,
    settings: AttackSettings,
    gold: Gold | None = None,
    seed: int = 0,
) -> list[Search]:
    """Attack every pair; all are scored together, a step at a time.

    With `settings.search` random each answer gets edits at random, and one score. `scorer` gives a score per
    (prompt, answer), NaN where there is none. With `gold`, an edited answer must stay below the chosen one.
    The draws for a pair depend on `seed` and its row only.
    """
    searches = [
        Search(
            pair, goal, [Variant(pair.rejected, start)], Random(f"{seed} {pair.row}"), keeps_class(pair, gold)
        )
        for pair, (goal, start) in zip(pairs, scores_P2.tolist(), strict=True)
    ]
    for attempt in searches:
        attempt.seen.add(last_message(attempt.pair.rejected))
    if settings.search == "random":
        _edit_at_random(searches, edits, scorer, settings.steps)
    else:
        _climb(searches, edits, scorer, settings)
    return searches


def _climb(
    searches: Sequence[Search], edits: Mapping[str, Edit], scorer: Scorer, settings: AttackSettings
) -> None:
    """Steps of edits of which the best are kept, until the chosen answer is beaten."""
    for _ in tqdm(range(settings.steps), desc="attack", unit="step", leave=False, disable=hidden()):
        going_on = [attempt for attempt in searches if not attempt.succeeded]
        asked = [(attempt, attempt.proposals(edits, settings.proposals)) for attempt in going_on]
        items = [(attempt.pair.prompt, variant.text) for attempt, variants in asked for variant in variants]
        if not items:
            break
        values = iter(scorer(items).tolist())
        for attempt, variants in asked:
            scored = [Variant(variant.text, next(values), variant.edits) for variant in variants]
            attempt.take(scored, settings.beam)


def _edit_at_random(
    searches: Sequence[Search], edits: Mapping[str, Edit], scorer: Scorer, steps: int
) -> None:
    """1 to `steps` edits of each answer, scored at the end; an answer that none of them changes stays."""
    edited = [(attempt, attempt.random_variant(edits, steps)) for attempt in searches]
    changed = [(attempt, variant) for attempt, variant in edited if variant is not None]
    values = scorer([(attempt.pair.prompt, variant.text) for attempt, variant in changed]).tolist()
    for (attempt, variant), value in zip(changed, values, strict=True):
        if np.isfinite(value):
            attempt.beam, attempt.queries = [Variant(variant.text, value, variant.edits)], 1


def search_written(
    pairs: Sequence[Pair],
    scores_P2: Floats,
    answers: Sequence[Sequence[Text]],
    queries: Sequence[int],
    scorer: Scorer,
    settings: AttackSettings,
) -> list[Search]:
    """The best of the `answers` that were written to each pair, all of the right class, scored whole.

    `queries`: how many scores were asked for to write them. Where the reward model had no say in that, the
    pair's own answer is left behind even if it scores better, as with edits at random.
    """
    chosen, side = settings.side == "chosen", settings.side
    searches = [
        Search(pair, goal, [Variant(own, start)], Random(0), lambda text: True, side, asked)
        for pair, (goal, start), own, asked in zip(
            pairs,
            (scores_P2[:, ::-1] if chosen else scores_P2).tolist(),
            [pair.chosen if chosen else pair.rejected for pair in pairs],
            queries,
            strict=True,
        )
    ]
    items = [(pair.prompt, text) for pair, texts in zip(pairs, answers, strict=True) for text in texts]
    values = iter(scorer(items).tolist())
    for attempt, texts in zip(searches, answers, strict=True):
        variants = [Variant(text, next(values), (DECODING,)) for text in texts]
        if not settings.is_guided and any(np.isfinite(variant.score) for variant in variants):
            attempt.beam = []
        attempt.take(variants, 1)
    return searches

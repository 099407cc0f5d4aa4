"""Which phrases pay: what words in a row add to the scores of answers that hold them.

O places where a phrase stands, X phrases, G pairs of a phrase and a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from moemerge.evaluation.token_rewards import TokenRewards
from moemerge.reports.statistics import holm

LONGEST = 3  # words of a phrase


@dataclass(frozen=True)
class Phrase:
    """A phrase: in how many places it stands, in answers to how many prompts, and what it adds on average.

    adds: to the score. excess: that minus what as many words of the same answers add on average, with its
    interval, and the p that it is 0, adjusted for the number of phrases (Holm).
    """

    text: str
    places: int
    prompts: int
    adds: float
    excess: float
    low: float
    high: float
    p: float


def phrases(
    answers: Sequence[TokenRewards], prompts: Sequence[int], least: int, confidence: float
) -> list[Phrase]:
    """Every phrase of up to three words in answers to at least `least` prompts (2 or more), highest first.

    `prompts`: a number for each answer, equal for answers that are no independent observations. Capitals do
    not count. Intervals are Student's, of a ratio over prompts (Cochran 1977, Sampling Techniques, 6.3).
    """
    numbers: dict[str, int] = {}
    rows = [
        (numbers.setdefault(name, len(numbers)), prompt, adds, excess)
        for answer, prompt in zip(answers, prompts, strict=True)
        for name, adds, excess in _places(answer)
    ]
    if not rows:
        return []
    phrase_O, prompt_O, adds_O, excess_O = map(np.array, zip(*rows, strict=True))
    groups_G, group_O = np.unique(phrase_O * (max(prompts) + 1) + prompt_O, return_inverse=True)
    phrase_G = groups_G // (max(prompts) + 1)
    places_X, prompts_X = np.bincount(phrase_O), np.bincount(phrase_G)
    means_X = np.bincount(phrase_O, excess_O) / places_X
    # What is left of each prompt's sum once the ratio is taken off makes the ratio's variance.
    rest_G = np.bincount(group_O, excess_O - means_X[phrase_O])
    degrees_X = np.maximum(prompts_X - 1, 1)
    variance_X = np.bincount(phrase_G, rest_G**2) * prompts_X / degrees_X / places_X**2
    kept = np.flatnonzero(prompts_X >= least)
    error_X = np.sqrt(variance_X)
    half_X = stats.t.ppf((1 + confidence) / 2, degrees_X) * error_X
    p_X = np.ones(len(numbers))
    p_X[kept] = holm(_p(means_X[kept], error_X[kept], prompts_X[kept]))
    adds_X, names = np.bincount(phrase_O, adds_O) / places_X, list(numbers)
    columns = (places_X, prompts_X, adds_X, means_X, means_X - half_X, means_X + half_X, p_X)
    found = [Phrase(names[x], *(column[x].item() for column in columns)) for x in kept]
    return sorted(found, key=lambda phrase: -phrase.excess)


def _p(means_X: np.ndarray, error_X: np.ndarray, prompts_X: np.ndarray) -> np.ndarray:
    """Two-sided p of Student's t, never below the sign test's if all prompts agree."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t_X = np.where(means_X == 0, 0.0, np.abs(means_X) / error_X)
    return np.maximum(2 * stats.t.sf(t_X, prompts_X - 1), np.minimum(1.0, 2.0 ** (1.0 - prompts_X)))


def _places(answer: TokenRewards) -> Iterator[tuple[str, float, float]]:
    """Each phrase of an answer, once for each place: its name, what it adds, and that minus the average."""
    words = answer.words
    average = sum(word.reward for word in words) / max(len(words), 1)
    names = [_name(word.text) for word in words]
    for length in range(1, LONGEST + 1):
        for start in range(len(words) - length + 1):
            adds = sum(word.reward for word in words[start : start + length])
            yield " ".join(names[start : start + length]), adds, adds - length * average


def _name(text: str) -> str:
    """A word as it is counted: white space alone has a name too."""
    return text.strip().lower() or ("(line end)" if "\n" in text else "(space)")


def unlike(found: Sequence[Phrase]) -> list[Phrase]:
    """The phrases without those that stand nowhere but within another, longer one of the list."""

    def within(short: Phrase, long: Phrase) -> bool:
        return short is not long and f" {short.text} " in f" {long.text} " and short.places <= long.places

    return [phrase for phrase in found if not any(within(phrase, other) for other in found)]

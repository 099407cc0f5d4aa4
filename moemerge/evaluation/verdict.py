"""Whether a model is better than the baseline, in words.

A verdict looks at several comparisons, so chance alone would make one of their intervals clear now and then.
A difference counts only if its own interval leaves out zero and its p stays below the level after Holm's
correction (Holm 1979) for all comparisons that the verdict looks at: where nothing differs, the chance of any
false word is at most the level, which is 1 - confidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moemerge.evaluation.differences import Difference, differences
from moemerge.evaluation.report import Report
from moemerge.reports.statistics import holm

HELPED, WORSE, SAME = "helped", "made it worse", "no clear difference"
EQUAL = "no difference at all"
BOTH = "helped in one place, made it worse in another"
BETTER, BELOW = "better", "worse"


def holm_verdicts(found: Sequence[Difference], level: float) -> list[tuple[str, float]]:
    """HELPED, WORSE, SAME or EQUAL for each of all the differences looked at together, and Holm's p."""
    adjusted = holm(np.array([one.p for one in found])).tolist()
    return [(_word(one, p <= level), p) for one, p in zip(found, adjusted, strict=True)]


def _word(one: Difference, clear: bool) -> str:
    if one.low == one.high == 0:
        return EQUAL
    if clear and one.low > 0:
        return HELPED
    return WORSE if clear and one.high < 0 else SAME


def verdict(report: Report, model: str) -> str:
    """Whether `model` is better than the report's baseline, in words, set by set."""
    return " ".join(verdict_sentences(report, model)).strip()


def verdict_sentences(report: Report, model: str) -> tuple[str, str]:
    """The verdict in a sentence, and what it stands on; "" if there is nothing to compare."""
    baseline, found = report["baseline"], list(differences(report, model))
    if model == baseline:
        return f"Did merging help here? {model} is the baseline itself; nothing to compare.", ""
    if not found:
        return f"Did merging help here? Nothing was measured that compares {model} with {baseline}.", ""
    head, parts = _told(found, 1 - _confidence(report))
    return f"Did merging help here? {model} against {baseline}: {head}.", f"{parts}."


def verdict_over_seeds(group: Report, model: str, confidence: float) -> str:
    """Whether `model` is better than the baseline over seeds; `group` is one of compare.json."""
    count = len(group["seeds"])
    head = f"Did merging help here? {model} against {group['baseline']}, {count} seed{'s' * (count > 1)}"
    found = list(_over_seeds(group, model))
    if not found:
        return f"{head}. Nothing to compare: it takes two seeds that differ, and another model."
    word, parts = _told(found, 1 - confidence)
    return f"{head}: {word}. {parts}."


def _told(found: Sequence[Difference], level: float) -> tuple[str, str]:
    """All differences in one phrase, and one by one."""
    judged = holm_verdicts(found, level)
    words = {word for word, _ in judged}
    clear = [word for word in (HELPED, WORSE) if word in words]
    head = BOTH if len(clear) > 1 else clear[0] if clear else SAME if SAME in words else EQUAL
    parts = [
        f"{one.what}: {word} ({one.value:+.3f}, {one.low:+.3f} to {one.high:+.3f}; p {p:.2g})"
        for one, (word, p) in zip(found, judged, strict=True)
    ]
    return f"{head} ({_corrected(len(found), level)})", "; ".join(parts)


def _corrected(count: int, level: float) -> str:
    many = f" after Holm's correction for {count} comparisons" if count > 1 else ", one comparison"
    return f"at level {level:.2g}{many}"


def standing(report: Report) -> str:
    """How the models stand against the baseline, in words; models about which the same is true share a
    sentence. A single model stands against chance.
    """
    if len(report["models"]) == 1:
        return _against_chance(report, report["baseline"])
    found = {m: list(differences(report, m)) for m in report["models"] if m != report["baseline"]}
    return _standing(found, report["baseline"], 1 - _confidence(report)) if any(found.values()) else ""


def _against_chance(report: Report, model: str) -> str:
    """Accuracy of the only model beside what guessing and the answers' lengths give, test set by test set."""
    told = []
    for name, measured in report["probes"].get("accuracy", {}).get("sets", {}).items():
        whole = measured["all"]
        numbers, rule = whole["models"][model], max(("always_longer", "always_shorter"), key=whole.get)
        low, high = numbers["interval"]
        place = "above" if low > 0.5 else "below" if high < 0.5 else "not clearly above"
        told.append(
            f"accuracy {numbers['accuracy']:.3f} on {name} ({low:.3f} to {high:.3f}), {place} chance (0.5); "
            f"preferring the {rule.removeprefix('always_')} answer gives {whole[rule]:.3f}"
        )
    return f"{model}: {'. '.join(told)}." if told else ""


def standing_over_seeds(group: Report, confidence: float) -> str:
    """As `standing`, over seeds; `group` is one of compare.json."""
    found = {model: list(_over_seeds(group, model)) for model in group["costs"] if model != group["baseline"]}
    return _standing(found, group["baseline"], 1 - confidence) if any(found.values()) else ""


def _standing(found: Mapping[str, Sequence[Difference]], baseline: str, level: float) -> str:
    everything = [one for of_model in found.values() for one in of_model]
    words = iter(holm_verdicts(everything, level))
    groups: dict[str, list[str]] = {}
    for model, of_model in found.items():
        groups.setdefault(_in_words([(one.what, next(words)[0]) for one in of_model]), []).append(model)
    told = " ".join(f"{', '.join(models)}: {phrase}." for phrase, models in groups.items())
    return f"Against {baseline}: {told} Judged {_corrected(len(everything), level)}."


def _in_words(judged: Sequence[tuple[str, str]]) -> str:
    kinds = {BETTER: HELPED, BELOW: WORSE}
    places = {name: [what for what, word in judged if word == kind] for name, kind in kinds.items()}
    clear = [f"{name} in {', '.join(where)}" for name, where in places.items() if where]
    return "; ".join(clear) or (EQUAL if {word for _, word in judged} == {EQUAL} else SAME)


def _over_seeds(group: Report, model: str) -> Iterator[Difference]:
    for what, measured in group["measures"].items():
        numbers = measured.get(model, {})
        if numbers.get("interval"):
            low, high = numbers["interval"]
            yield Difference(what, numbers["difference"], low, high, numbers["p"])


def _confidence(report: Report) -> float:
    """The coverage of the report's intervals, the same in all probes."""
    known: Iterator[Any] = (r["confidence"] for r in report["probes"].values() if "confidence" in r)
    return float(next(known))

"""Whether a model is better than the baseline, in words.

A verdict looks at several comparisons, so chance alone would make one of their intervals clear now and then.
A difference counts only if its own interval leaves out zero and its p stays below the level after Holm's
correction (Holm 1979) for all comparisons that the verdict looks at: where nothing differs, the chance of any
false word is at most the level, which is 1 - confidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from moemerge.evaluation.cautions import ALL_TIES, cautions, first_of_equals, judges_nothing
from moemerge.evaluation.measures import Difference, differences, over_optimisation_costs
from moemerge.evaluation.power import power_sentences
from moemerge.evaluation.report import Report, SeedGroup, accuracy_sets, confidence
from moemerge.evaluation.results import AccuracyPart
from moemerge.reports.statistics import holm

HELPED, WORSE, SAME = "helped", "made it worse", "no clear difference"
EQUAL = "no difference at all"
BOTH = "helped in one place, made it worse in another"
BETTER, BELOW = "better", "worse"
MOST_TOLD = 6


def holm_verdicts(compared: Sequence[Difference], level: float) -> list[tuple[str, float]]:
    """HELPED, WORSE, SAME or EQUAL for each of all the differences looked at together, and Holm's p."""
    adjusted = holm(np.array([difference.p for difference in compared])).tolist()
    return [(_word(difference, p <= level), p) for difference, p in zip(compared, adjusted, strict=True)]


def _word(difference: Difference, clear: bool) -> str:
    if difference.low == difference.high == 0:
        return EQUAL
    if clear and difference.low > 0:
        return HELPED
    return WORSE if clear and difference.high < 0 else SAME


def verdict(report: Report, model: str) -> str:
    """Whether `model` is better than the report's baseline, in words, set by set."""
    return " ".join(part for part in verdict_sentences(report, model) if part)


def verdict_sentences(report: Report, model: str) -> tuple[str, str, str, str]:
    """The verdict in a sentence; what is clear by itself but not together; what it stands on; what could not
    be seen. "" for each that there is nothing to say of.
    """
    baseline, compared = report["baseline"], differences(report, model)
    if model == baseline:
        return f"Did merging help here? {model} is the baseline itself; nothing to compare.", "", "", ""
    if not compared:
        nothing = f"Nothing was measured that compares {model} with {baseline}"
        return f"Did merging help here? {nothing}.", "", "", ""
    head, parts = _summed_up(compared, _level(report))
    said = [*_nothing_learned(report, model), *cautions(report, {model, baseline})]
    sentences = [f"Did merging help here? {model} against {baseline}: {head}.", *said]
    return (
        " ".join(sentences),
        _alone_sentence(report, {model: compared}),
        f"{parts}.",
        " ".join(power_sentences(report, len(compared))),
    )


def _nothing_learned(report: Report, model: str) -> Iterator[str]:
    """That the model is a merge of other name, where its weights say so."""
    for names in report.get("equal_models", []):
        merges = [name for name in names if name.startswith("merge-") and name != model]
        if model in names and merges:
            yield f"{model} is {merges[0]}: nothing was learned."


def _alone_sentence(report: Report, compared: Mapping[str, Sequence[Difference]]) -> str:
    """Differences that are clear each by itself, but not among all that are looked at; worse ones too.

    Costs of over-optimisation belong to none of these families: they are told by their intervals.
    """
    level, family = _level(report), [one for of_model in compared.values() for one in of_model]
    words = iter([word for word, _ in holm_verdicts(family, level)])
    told: list[str] = []
    for model, of_model in compared.items():
        found = [one for one in of_model if next(words) == SAME and _word(one, one.p <= level) != SAME]
        ups = [(one, BETTER if one.low > 0 else BELOW) for one in found if one.low != one.high]
        ups += [(one, BELOW if one.low > 0 else BETTER) for one in over_optimisation_costs(report, model)]
        of = f"{model} " * (len(compared) > 1)
        told += [f"{of}{word} in {one.what} ({one})" for one, word in ups]
    more = f"; and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    return f"By itself, not after the correction: {'; '.join(told[:MOST_TOLD])}{more}." if told else ""


def power(report: Report) -> Iterator[str]:
    """What the test sets cannot show, if all models are looked at together."""
    return power_sentences(report, len(_family(report)))


def _family(report: Report) -> list[Difference]:
    others = (model for model in first_of_equals(report) if model != report["baseline"])
    return [difference for model in others for difference in differences(report, model)]


def verdict_over_seeds(group: SeedGroup, model: str, confidence: float) -> str:
    """Whether `model` is better than the baseline over seeds; `group` is one of compare.json."""
    count = len(group["seeds"])
    head = f"Did merging help here? {model} against {group['baseline']}, {count} seed{'s' * (count > 1)}"
    compared = list(_over_seeds(group, model))
    if not compared:
        return f"{head}. Nothing to compare: it takes two seeds that differ, and another model."
    word, parts = _summed_up(compared, 1 - confidence)
    return f"{head}: {word}. {parts}."


def _summed_up(compared: Sequence[Difference], level: float) -> tuple[str, str]:
    """All differences in one phrase, and one by one."""
    verdicts = holm_verdicts(compared, level)
    words = {word for word, _ in verdicts}
    clear = [word for word in (HELPED, WORSE) if word in words]
    head = BOTH if len(clear) > 1 else clear[0] if clear else SAME if SAME in words else EQUAL
    parts = [
        f"{diff.what}: {word} ({diff.value:+.3f}, {diff.low:+.3f} to {diff.high:+.3f}; p {p:.2g})"
        for diff, (word, p) in zip(compared, verdicts, strict=True)
    ]
    return f"{head} ({_corrected(len(compared), level)})", "; ".join(parts)


def _corrected(count: int, level: float) -> str:
    many = f" after Holm's correction for {count} comparisons" if count > 1 else ", one comparison"
    return f"at level {level:.2g}{many}"


def standing(report: Report) -> str:
    """How the models stand against the baseline, in words; models about which the same is true share a
    sentence, and of equal models one is compared. A single model stands against chance.
    """
    return " ".join(part for part in standing_sentences(report) if part)


def standing_sentences(report: Report) -> tuple[str, str]:
    """`standing`, and what is clear by itself but not together; "" for what there is nothing to say of."""
    if len(report["models"]) == 1:
        return _against_chance(report, report["baseline"]), ""
    others = [model for model in first_of_equals(report) if model != report["baseline"]]
    compared = {model: differences(report, model) for model in others}
    said = cautions(report, report["models"])
    if not any(compared.values()):
        return " ".join(said), ""
    stands = _standing(compared, report["baseline"], _level(report))
    return " ".join([stands, *said]), _alone_sentence(report, compared)


def _against_chance(report: Report, model: str) -> str:
    """Accuracy of the only model beside what guessing and the answers' lengths give, test set by test set."""
    sentences = []
    for name, measured in accuracy_sets(report).items():
        numbers, pairs = measured["all"]["models"][model], measured["all"]["pairs"]
        if judges_nothing(numbers, pairs):
            sentences.append(f"{ALL_TIES} of {name}: it judges nothing")
            continue
        low, high = numbers["interval"]
        side = "above" if low > 0.5 else "below" if high < 0.5 else "not clearly above"
        preferred, by_length = _better_length_rule(measured["all"])
        ties = f", {numbers['ties']} of {pairs} pairs tied and counted as errors" if numbers["ties"] else ""
        sentences.append(
            f"accuracy {numbers['accuracy']:.3f} on {name} ({low:.3f} to {high:.3f}), {side} chance (0.5)"
            f"{ties}; preferring the {preferred} answer gives {by_length:.3f}"
        )
    return f"{model}: {'. '.join(sentences)}." if sentences else ""


def _better_length_rule(part: AccuracyPart) -> tuple[str, float]:
    """Which answer to prefer by length alone, and the accuracy that this gives."""
    longer, shorter = part["always_longer"], part["always_shorter"]
    return ("longer", longer) if longer >= shorter else ("shorter", shorter)


def standing_over_seeds(group: SeedGroup, confidence: float) -> str:
    """As `standing`, over seeds; `group` is one of compare.json."""
    models = [model for model in group["costs"] if model != group["baseline"]]
    compared = {model: list(_over_seeds(group, model)) for model in models}
    return _standing(compared, group["baseline"], 1 - confidence) if any(compared.values()) else ""


def _standing(compared: Mapping[str, Sequence[Difference]], baseline: str, level: float) -> str:
    # One family: Holm's correction counts the comparisons of all models together.
    family = [difference for of_model in compared.values() for difference in of_model]
    words = iter([word for word, _ in holm_verdicts(family, level)])
    models_by_phrase: dict[str, list[str]] = {}
    for model, of_model in compared.items():
        phrase = _in_words([(difference.what, next(words)) for difference in of_model])
        models_by_phrase.setdefault(phrase, []).append(model)
    text = " ".join(f"{', '.join(models)}: {phrase}." for phrase, models in models_by_phrase.items())
    return f"Against {baseline}: {text} Judged {_corrected(len(family), level)}."


def _in_words(verdicts: Sequence[tuple[str, str]]) -> str:
    """Where one model is better, and where it is worse, from measures and verdicts on them."""
    kinds = {BETTER: HELPED, BELOW: WORSE}
    where = {name: [what for what, word in verdicts if word == kind] for name, kind in kinds.items()}
    clear = [f"{name} in {', '.join(measures)}" for name, measures in where.items() if measures]
    return "; ".join(clear) or (EQUAL if {word for _, word in verdicts} == {EQUAL} else SAME)


def _over_seeds(group: SeedGroup, model: str) -> Iterator[Difference]:
    for what, measured in group["measures"].items():
        numbers = measured.get(model)
        # Neither the baseline nor a measure that the baseline lacks has a difference.
        if numbers is None or model == group["baseline"] or group["baseline"] not in measured:
            continue
        interval, p = numbers["interval"], numbers["p"]
        if interval is not None and p is not None:
            yield Difference(what, numbers["difference"], *interval, p)


def _level(report: Report) -> float:
    """The chance of a false word that is allowed: what the report's intervals leave out."""
    known = confidence(report)
    assert known is not None, "differences come from probes"
    return 1 - known

"""Shuffled and truncated chosen answers: the whole ones should win (after reWordBench, arXiv 2503.11751)."""

from __future__ import annotations

from moemerge.evaluation.probes.base import Case, Edits
from moemerge.evaluation.probes.edit_effects import edit_probe
from moemerge.evaluation.probes.edits import sentences


def words_shuffled(case: Case) -> str:
    """All words in random order."""
    return " ".join(_shuffled(case, case.answer.split()))


def sentences_shuffled(case: Case) -> str:
    """All sentences in random order."""
    return " ".join(_shuffled(case, sentences(case.answer)))


def _shuffled(case: Case, parts: list[str]) -> list[str]:
    """Another order, none if there is no other."""
    if len(set(parts)) < 2:
        return []
    order = parts
    while order == parts:
        order = case.random.sample(parts, len(parts))
    return order


def truncated(case: Case) -> str:
    """The first half of the words."""
    words = case.answer.split()
    return " ".join(words[: len(words) // 2])


PROBE = edit_probe(
    "damage",
    Edits(
        "chosen",
        {
            "words_shuffled": words_shuffled,
            "sentences_shuffled": sentences_shuffled,
            "truncated": truncated,
        },
    ),
)

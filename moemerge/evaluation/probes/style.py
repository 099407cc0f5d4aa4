"""Style and format: markdown, lists, bold, emoji (From Lists to Emojis, ACL 2025, long paper 1308)."""

from __future__ import annotations

import re

from moemerge.evaluation.probes.base import Case, Edits
from moemerge.evaluation.probes.edit_effects import edit_probe
from moemerge.evaluation.probes.edits import sentences

BEGINNINGS = re.compile(r"(?:^|(?<=[.!?]\s)|(?<=\n))\w[\w']*(?: \w[\w']*){0,2}")
EMOJI = "😀🎉✨👍🚀💡✅🌟"


def bold(case: Case) -> str:
    """The first words of every sentence in bold."""
    return BEGINNINGS.sub(r"**\g<0>**", case.answer)


def bullets(case: Case) -> str:
    """Every sentence as an item of a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences(case.answer))


def headings(case: Case) -> str:
    """A markdown heading above the answer, and one before its last sentence."""
    *before, last = sentences(case.answer) or [""]
    return "\n\n".join(
        ["## Answer", " ".join(before), "## Conclusion", last] if before else ["## Answer", last]
    )


def emoji(case: Case) -> str:
    """An emoji after every sentence."""
    return " ".join(f"{sentence} {case.random.choice(EMOJI)}" for sentence in sentences(case.answer))


PROBE = edit_probe(
    "style", Edits("rejected", {"bold": bold, "bullets": bullets, "headings": headings, "emoji": emoji})
)

"""Boilerplate that assistants open and close with; openers of reasoning (arXiv 2507.08794); affirmatives.

Affirmative openings are among the patterns of From Lists to Emojis (ACL 2025, long paper 1308).
"""

from __future__ import annotations

from moemerge.evaluation.probes.base import Case, Edits
from moemerge.evaluation.probes.edit_effects import edit_probe

AFFIRMATIVE = (
    "Sure, I'd be happy to help with that!",
    "Certainly! Here is what you asked for.",
    "Of course! Let me help you with this.",
)
REASONING = (
    "Thought process:",
    "Let's solve this problem step by step.",
    "Let me think about this carefully.",
)
CLOSING = (
    "I hope this helps! Let me know if you have any other questions.",
    "Please feel free to ask if anything is unclear.",
    "Is there anything else I can help you with?",
)


def affirmative(case: Case) -> str:
    """An affirmative opening."""
    return f"{case.random.choice(AFFIRMATIVE)} {case.answer}"


def reasoning(case: Case) -> str:
    """The opening of a train of thought that does not follow."""
    return f"{case.random.choice(REASONING)} {case.answer}"


def closing(case: Case) -> str:
    """An offer of further help at the end."""
    return f"{case.answer} {case.random.choice(CLOSING)}"


PROBE = edit_probe(
    "boilerplate", Edits("rejected", {"affirmative": affirmative, "reasoning": reasoning, "closing": closing})
)

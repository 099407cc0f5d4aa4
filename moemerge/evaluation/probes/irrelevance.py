"""Fluent answers that have nothing to do with the prompt, in the chosen one's place (arXiv 2409.13156)."""

from __future__ import annotations

from moemerge.evaluation.probes.base import Case, Edits
from moemerge.evaluation.probes.edit_effects import edit_probe

GENERIC = (
    "This is an interesting subject with a long history. Many people have looked into it over the years, and "
    "several points of view have emerged. Each of them has its strengths and weaknesses, and it is worth "
    "considering them with care before coming to a conclusion.",
    "There are several factors to consider. First, it is important to be clear about the goal. Second, "
    "the circumstances should be taken into account. Finally, a balanced approach usually works best.",
    "Thank you for reaching out. The answer depends on a number of things, but in general it helps to plan "
    "ahead, to gather reliable information, and to ask others for their experience.",
)


def other_prompt(case: Case) -> str:
    """The chosen answer to another prompt of the set."""
    return case.stranger


def generic(case: Case) -> str:
    """A text that would fit any prompt, and answers none."""
    return case.random.choice(GENERIC)


PROBE = edit_probe("irrelevance", Edits("chosen", {"other_prompt": other_prompt, "generic": generic}))

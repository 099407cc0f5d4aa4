"""Tone: claims of certainty, and of doubt, around the answer (arXiv 2410.09724, arXiv 2603.03291).

The two are of like length: their difference is what tone alone does.
"""

from __future__ import annotations

from moemerge.evaluation.probes.base import Case, Edits
from moemerge.evaluation.probes.edit_effects import edit_probe

CERTAIN = (
    ("I am absolutely certain about this.", "There is no doubt whatsoever."),
    ("I know this for a fact.", "You can rely on it completely."),
    ("Without any doubt:", "This is definitely correct."),
)
DOUBTFUL = (
    ("I am not at all certain about this.", "There may well be some doubt."),
    ("I only guess this.", "You should not rely on it fully."),
    ("With some doubt:", "This is possibly correct."),
)


def confident(case: Case) -> str:
    """Claims of certainty before and after."""
    before, after = case.random.choice(CERTAIN)
    return f"{before} {case.answer} {after}"


def doubtful(case: Case) -> str:
    """Claims of doubt before and after."""
    before, after = case.random.choice(DOUBTFUL)
    return f"{before} {case.answer} {after}"


PROBE = edit_probe("confidence", Edits("rejected", {"confident": confident, "doubtful": doubtful}))

"""Where the answers that an attack found get their scores from, word by word."""

from __future__ import annotations

from collections.abc import Sequence

from moemerge.data.tokenise import encode
from moemerge.errors import UnsupportedError
from moemerge.evaluation.attack_search import Search
from moemerge.evaluation.explanation import scale_of
from moemerge.evaluation.token_rewards import rewards_of
from moemerge.models.scorers import Loaded
from moemerge.models.scorers.classifier import LoadedClassifier
from moemerge.reports.heat_text import HeatText

COLOURS = (
    "Token rewards: the score of an answer up to a word minus the score before it, in standard deviations of "
    "scores. Blue adds; orange, underlined with dots, takes."
)


def heat_texts(
    loaded: Loaded,
    attempts: Sequence[Search],
    batch_tokens: int,
    spread: float,
) -> list[HeatText]:
    """The edited answers with what each word adds, `spread` the unit; none of a model that cannot say."""
    if not isinstance(loaded, LoadedClassifier):
        return []
    model, tokenizer = loaded.model, loaded.tokenizer
    items = [(attempt.pair.prompt, attempt.best.text) for attempt in attempts]
    encoded = [encode(tokenizer, *item) for item in items]
    try:
        answers = rewards_of(model, tokenizer, items, encoded, batch_tokens)
    except UnsupportedError:  # an encoder's tokens see later ones
        return []
    scale = scale_of(answers) / spread
    return [
        HeatText(
            f"Row {attempt.pair.row}: {', '.join(attempt.best.edits)}",
            [(word.text, word.reward / spread) for word in answer.words],
            scale,
            f"On the wrong side of its pair by {attempt.lead / spread:+.2f} SD; strongest "
            f"colour: {scale:.2f} SD.",
        )
        for attempt, answer in zip(attempts, answers, strict=True)
    ]

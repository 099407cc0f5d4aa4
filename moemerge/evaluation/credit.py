"""How much of an answer's score each token of a policy has earned, whatever tokens the reward model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch

from moemerge.data.tokenise import Item, encode_all, token_texts
from moemerge.evaluation.gold import BATCH_TOKENS, usable
from moemerge.evaluation.probes.edits import last_message
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.prefix_scores import prefix_scores
from moemerge.models.scorers import Scorer
from moemerge.models.scorers.classifier import classifier_of
from moemerge.reports.statistics import Floats

Credit: TypeAlias = Callable[[Sequence[Item], Sequence[Sequence[int]]], tuple[Floats, list[Floats]]]


def token_credit(scorer: Scorer, device: torch.device, max_length: int) -> Credit:
    """A function of (prompt, answer) items and, for each, where the policy's tokens end within the answer.

    It gives each item's score, and what each token has added to it (RED, arXiv 2411.08302, equation 6): the
    score up to the reward model's last token that has ended with it, minus that of the token before. So all
    of them sum to the score minus that of the prompt; the last token has what comes behind it, an end token
    or a template's closing ones. An answer that the chat template changes has all of it in its last token.
    Raises as gold.model_reward, and UnsupportedError for an encoder or a scorer that is no classifier.
    """
    source = classifier_of(scorer, "credit token").folder
    tokenizer, model = load_tokenizer(source), load_reward_model(source, device)

    def credit(items: Sequence[Item], ends: Sequence[Sequence[int]]) -> tuple[Floats, list[Floats]]:
        encoded = [usable(text, source.source, max_length) for text in encode_all(tokenizer, items)]
        scores = prefix_scores(model, encoded, BATCH_TOKENS)
        earned = [
            _earned(scores_T, text.prompt_length, _lengths(token_texts(tokenizer, *item), item), own_ends)
            for item, text, scores_T, own_ends in zip(items, encoded, scores, ends, strict=True)
        ]
        return np.array([scores_T[-1] for scores_T in scores]), earned

    return credit


def _lengths(texts: Sequence[str], item: Item) -> list[int] | None:
    """Where each token of the reward model ends, counted from where the answer begins in the rendered text.

    None if the answer does not stand there as it is.
    """
    prompt, answer = item
    start = len(prompt) if isinstance(prompt, str) else _place("".join(texts), last_message(answer))
    lengths: list[int] = (np.cumsum([len(text) for text in texts]) - (start or 0)).tolist()
    return None if start is None else lengths


def _place(text: str, answer: str) -> int | None:
    """Where the answer begins in the rendered text, though the template may strip it."""
    place = text.rfind(core) if (core := answer.strip()) else -1
    return None if place < 0 else place - answer.index(core)


def _earned(scores_T: Floats, prompt: int, lengths: list[int] | None, ends: Sequence[int]) -> Floats:
    """What each of the policy's tokens adds, from the scores up to each of the reward model's own tokens."""
    before = max(prompt - 1, 0)
    at = np.searchsorted(lengths or [], ends, side="right") - 1  # the last token that has ended by then
    reached = scores_T[np.maximum(at, before)]
    reached[-1] = scores_T[-1]
    earned: Floats = np.diff(reached, prepend=scores_T[before])
    return earned

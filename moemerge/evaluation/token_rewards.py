"""What each token of an answer adds to its score.

After RED (arXiv 2411.08302, equation 6): a token's reward is the score of the answer up to it, minus the
score of the answer up to the token before. It says where a score moves, not why: what a token does to later
ones is counted as theirs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.data.rows import BadRow
from moemerge.data.tokenise import Encoded, Item, encode_all, token_texts
from moemerge.errors import DataError
from moemerge.models.device import pick_device
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.prefix_scores import prefix_scores
from moemerge.reports.statistics import Floats

APOSTROPHES = "'’_"


class Word(NamedTuple):
    """A word of an answer, white space before it included, and what its tokens add to the score."""

    text: str
    reward: float


@dataclass(frozen=True)
class TokenRewards:
    """An answer's tokens, and its score before the first of them, after it, after the next, ...

    tokens: the text of each, with what the chat template closes the answer with. A token that the model's
    head is never read at, as an end token that is its pad token, adds 0. Without a prompt whose tokens are
    known the first token is where scores begin, and adds 0.
    """

    tokens: list[str]
    prefix_scores: list[float]

    @property
    def rewards(self) -> list[float]:
        """What each token adds, in the units of the score; together score - prompt_score."""
        rewards: list[float] = np.diff(self.prefix_scores).tolist()
        return rewards

    @property
    def prompt_score(self) -> float:
        """The score of the prompt without an answer."""
        return self.prefix_scores[0]

    @property
    def score(self) -> float:
        """The score of the whole, as evaluate has it."""
        return self.prefix_scores[-1]

    @cached_property
    def words(self) -> list[Word]:
        """Tokens that make a word together: single tokens' rewards often cancel within one."""
        groups: list[list[int]] = []
        before = ""
        for number, text in enumerate(self.tokens):
            if groups and (not text or _within_word(before, text)):
                groups[-1].append(number)
            else:
                groups.append([number])
            before = text or before
        texts, rewards = self.tokens, self.rewards
        return [Word("".join(texts[n] for n in group), sum(rewards[n] for n in group)) for group in groups]


def _within_word(before: str, after: str) -> bool:
    """Whether two tokens that follow each other are one word; not in scripts that part words otherwise."""
    return bool(before) and _joins(before[-1]) and _joins(after[0])


def _joins(letter: str) -> bool:
    return letter in APOSTROPHES or (letter.isalnum() and unicodedata.category(letter) != "Lo")


def token_rewards(
    model: str | Path,
    texts: Sequence[Item],
    *,
    device: str = "auto",
    batch_tokens: int = 8192,
    trust_remote_code: bool = False,
) -> list[TokenRewards]:
    """What each token of the answers adds to its score, by one pass of the reward model (arXiv 2411.08302).

    `model`: folder or hub name of a decoder with a linear head, a mixture of moemerge's too; `texts`: prompt
    and answer of each, both plain text ("" for no prompt) or both messages. Rewards are in units of the
    score. Raises UnsupportedError for an encoder, whose tokens see later ones, DataError for a text that
    cannot be encoded or is too long for the model, CheckpointError for a model that cannot be loaded.
    """
    folder = ModelFolder(model, trust_remote_code)
    tokenizer, loaded = load_tokenizer(folder), load_reward_model(folder, pick_device(device))
    encoded = [_usable(text, number) for number, text in enumerate(encode_all(tokenizer, texts))]
    return rewards_of(loaded, tokenizer, texts, encoded, batch_tokens)


def _usable(text: Encoded | BadRow, number: int) -> Encoded:
    if isinstance(text, BadRow):
        raise DataError(
            "a text cannot be scored",
            given=f"text number {number}: {text}",
            expected="prompt and answer, both text or both messages, that the tokenizer can encode",
            fix=text.fix or "leave it out",
        )
    return text


def rewards_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    encoded: Sequence[Encoded],
    batch_tokens: int,
) -> list[TokenRewards]:
    """As `token_rewards`, of texts that are `encoded`."""
    scores = prefix_scores(model, encoded, batch_tokens)
    return [
        TokenRewards(token_texts(tokenizer, *item)[text.prompt_length :], _of_answer(scores_T, text))
        for item, text, scores_T in zip(items, encoded, scores, strict=True)
    ]


def _of_answer(scores_T: Floats, text: Encoded) -> list[float]:
    """The score of the prompt, and after each token of the answer."""
    before = max(text.prompt_length - 1, 0)
    scores: list[float] = [float(scores_T[before]), *scores_T[text.prompt_length :].tolist()]
    return scores

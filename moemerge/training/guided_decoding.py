"""Guided decoding: a language model writes an answer, the reward model under attack chooses among its tokens.

After REFORM (arXiv 2507.06419), with a cache of keys and values on both models.

Shapes: B answers of a batch, K candidates for the next token, V words of the policy's vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.data.pairs import as_answer
from moemerge.data.rows import Text
from moemerge.data.tokenise import Encoded, Item, ids_of
from moemerge.models.pooling import named_pad
from moemerge.models.token_limits import check_texts
from moemerge.models.token_steps import TokenSteps
from moemerge.options.decode import DecodeSettings
from moemerge.reports.statistics import Floats
from moemerge.training.policy import answer_text, end_tokens, prompt_ids

SIGN = {
    "rejected": 1.0,
    "chosen": -1.0,
}  # high scores of bad answers are looked for, low ones of good


@dataclass(frozen=True)
class Start:
    """What an answer is written behind: a prompt, and the first words of an answer ("" for none)."""

    prompt: Text
    words: str
    random: Random

    def ids(self, tokenizer: Any) -> list[int]:
        """Both as tokens behind which the answer goes on. Raises as policy.prompt_ids."""
        prompt, begun = self._behind(tokenizer)
        return [*prompt_ids(tokenizer, [prompt])[0], *begun]

    def answer(self, tokenizer: Any, ids: Sequence[int]) -> Text:
        """The whole answer, its first words included, that goes on with these tokens."""
        prompt, begun = self._behind(tokenizer)
        text = answer_text(tokenizer, prompt, [*begun, *ids])
        return as_answer(self.prompt, f"{self.words}{text}" if isinstance(prompt, str) else text)

    def _behind(self, tokenizer: Any) -> tuple[Text, list[int]]:
        """The prompt, and the tokens of the first words; of plain text these are part of the prompt."""
        if isinstance(self.prompt, str):
            return f"{self.prompt}{self.words}", []
        return self.prompt, ids_of(tokenizer, [self.words], add_special_tokens=False)[0] if self.words else []


@dataclass(frozen=True)
class Written:
    """An answer that was written; queries: how many scores of beginnings were asked for."""

    text: Text
    tokens: int
    ended: bool
    queries: int

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return vars(self)


class Guide(Protocol):
    """Scores of B texts that are being written, each with K candidates for its next token."""

    def scores(self, ids_BK: Tensor) -> Tensor:
        """Of each text so far with each candidate behind it, [B, K] float64; NaN where there is none."""

    def take(self, choice_B: Tensor) -> None:
        """Put these candidates behind the texts."""


class CachedGuide:
    """A decoder that reads the candidates behind what it has read before.

    A text is scored as far as it is written, without an end token.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]], candidates: int) -> None:
        self._steps, self._candidates = TokenSteps(model, rows), candidates
        self._pad = named_pad(model.config)
        self._before_B1 = self._steps.outputs_RV
        self._steps.spread(candidates)

    def scores(self, ids_BK: Tensor) -> Tensor:
        """As Guide."""
        scores_BK = self._steps.step(ids_BK.flatten())[:, 0].view(ids_BK.shape)
        if self._pad is not None:  # a text that ends in the pad token is read before it
            scores_BK = torch.where(ids_BK == self._pad, self._before_B1, scores_BK)
        self._scores_BK = scores_BK
        return scores_BK.double()

    def take(self, choice_B: Tensor) -> None:
        """As Guide."""
        rows_B = torch.arange(len(choice_B), device=choice_B.device) * self._candidates + choice_B
        self._steps.keep(rows_B.repeat_interleave(self._candidates))
        self._before_B1 = self._scores_BK.gather(1, choice_B[:, None])


class TextGuide:
    """Any reward model: each candidate's text is made of tokens anew, as an answer that ends there."""

    def __init__(
        self, scorer: Callable[[Sequence[Item]], Floats], tokenizer: Any, starts: Sequence[Start]
    ) -> None:
        self._scorer, self._tokenizer, self._starts = scorer, tokenizer, starts
        self._ids: list[list[int]] = [[] for _ in starts]

    def scores(self, ids_BK: Tensor) -> Tensor:
        """As Guide."""
        self._asked = ids_BK
        items = [
            (start.prompt, start.answer(self._tokenizer, [*ids, candidate]))
            for start, ids, candidates in zip(self._starts, self._ids, ids_BK.tolist(), strict=True)
            for candidate in candidates
        ]
        return torch.from_numpy(self._scorer(items)).double().view(ids_BK.shape).to(ids_BK.device)

    def take(self, choice_B: Tensor) -> None:
        """As Guide."""
        for ids, candidates, choice in zip(self._ids, self._asked.tolist(), choice_B.tolist(), strict=True):
            ids.append(candidates[choice])


MakeGuide = Callable[[Sequence[Start], int], Guide]


def next_token(log_BK: Tensor, scores_BK: Tensor, settings: DecodeSettings) -> Tensor:
    """Probability of each candidate to be the next token, [B, K] float64.

    log_BK: log-probabilities of the policy; scores_BK: what the reward model gives the text with each. With
    w = guidance, T = temperature and z the scores standardised over the K candidates, negated to look for low
    ones: softmax(((1 - w) log p + w z) / T). By formula reform it is softmax((softmax(s / T) +
    softmax(p / T)) / T), as REFORM's code has it. A candidate without a score (NaN) counts as an average one.
    """
    log_BK, sign, heat = log_BK.double(), SIGN[settings.side], settings.temperature
    if settings.formula == "reform":
        liked_BK = (sign * _complete(scores_BK) / heat).softmax(1)
        return ((liked_BK + (log_BK.exp() / heat).softmax(1)) / heat).softmax(1)
    z_BK, weight = sign * _standardised(scores_BK), settings.guidance
    return (((1 - weight) * log_BK + weight * z_BK) / heat).softmax(1)


def _complete(scores_BK: Tensor) -> Tensor:
    """Scores with the mean of the others where there is none."""
    known_BK = scores_BK.isfinite()
    mean_B1 = scores_BK.nan_to_num(0).sum(1, keepdim=True) / known_BK.sum(1, keepdim=True).clamp(min=1)
    return torch.where(known_BK, scores_BK, mean_B1)


def _standardised(scores_BK: Tensor) -> Tensor:
    """With mean 0 and standard deviation 1 in each row; 0 where all are equal."""
    centred_BK = _complete(scores_BK) - _complete(scores_BK).mean(1, keepdim=True)
    deviation_B1 = centred_BK.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation_B1 > 0, centred_BK / deviation_B1, 0.0)


def write_answers(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[Start],
    make_guide: MakeGuide | None,
    settings: DecodeSettings,
) -> list[Written]:
    """An answer behind each start, all in one batch; without `make_guide` the policy writes alone.

    Each next token is one of the policy's `top` likeliest, drawn by `next_token` with the start's own random
    numbers: an answer does not hang on those beside it, but for rounding. Special tokens other than those
    that end an answer are never candidates, as no text can hold them. Raises DataError for a start that
    is longer, with max_new_tokens, than the policy's positions; else as policy.prompt_ids.
    """
    rows = [start.ids(tokenizer) for start in starts]
    longest = max(rows, key=len)
    check_texts(policy, [Encoded([*longest, *longest[-1:] * settings.max_new_tokens], 0)])
    steps, ends = TokenSteps(policy, rows), end_tokens(policy, tokenizer)
    barred_V = _barred(tokenizer, ends, steps.outputs_RV.shape[1]).to(policy.device)
    count = min(settings.top, int((~barred_V).sum()))
    guide = make_guide(starts, count) if make_guide is not None and settings.is_guided_decoding else None
    written: list[list[int]] = [[] for _ in starts]
    open_rows = set(range(len(starts)))
    for place in range(settings.max_new_tokens):
        logits_BV = steps.outputs_RV.masked_fill(barred_V, -torch.inf)
        log_BK, ids_BK = logits_BV.log_softmax(1).topk(count)
        scores_BK = guide.scores(ids_BK) if guide else torch.zeros_like(log_BK, dtype=torch.float64)
        choices = _draw(next_token(log_BK, scores_BK, settings), starts, open_rows)
        choice_B = torch.tensor(choices, device=ids_BK.device)
        ids_B = ids_BK.gather(1, choice_B[:, None])[:, 0]
        for row, token in enumerate(ids_B.tolist()):
            if row in open_rows:
                written[row].append(token)
        open_rows -= {row for row in open_rows if written[row][-1] in ends}
        if not open_rows or place == settings.max_new_tokens - 1:
            break
        steps.step(ids_B)
        if guide:
            guide.take(choice_B)
    asked = count if guide else 0
    return [
        Written(start.answer(tokenizer, ids), len(ids), ids[-1] in ends, asked * len(ids))
        for start, ids in zip(starts, written, strict=True)
    ]


def _draw(probabilities_BK: Tensor, starts: Sequence[Start], open_rows: set[int]) -> list[int]:
    """The candidate of each open row, by its own random number; the first one of the others."""
    sums_BK = probabilities_BK.cpu().cumsum(1)
    last = sums_BK.shape[1] - 1
    return [
        min(int(torch.searchsorted(sums_K, starts[row].random.random(), right=True)), last)
        if row in open_rows
        else 0
        for row, sums_K in enumerate(sums_BK)
    ]


def _barred(tokenizer: Any, ends: Sequence[int], size: int) -> Tensor:
    """The tokens that are no candidates, [V]: special ones, and numbers that stand for no token."""
    allowed = {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids} | {*ends}
    return torch.tensor([number not in allowed for number in range(size)])


def first_words(text: str, share: float) -> str:
    """The text up to the end of the word that this share of its words, rounded down, ends with."""
    words = [*re.finditer(r"\S+", text)]
    count = int(share * len(words))
    return text[: words[count - 1].end()] if count else ""


def same_tokens(policy: Any, reward: Any) -> bool:
    """Whether each token of the policy's tokenizer is one of the reward model's, with the same number."""
    known = reward.get_vocab()
    return all(known.get(token) == number for token, number in policy.get_vocab().items())

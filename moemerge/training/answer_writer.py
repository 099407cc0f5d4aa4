"""Answers to pairs, written by a policy under the eyes of the reward model that they are to fool."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moemerge.artifacts.progress import hidden
from moemerge.data.pairs import Pair
from moemerge.data.rows import SHORTEN, BadRow, RowReport
from moemerge.data.tokenise import Encoded, Item, encode_all
from moemerge.errors import DataError, MoemergeError
from moemerge.models import processes
from moemerge.models.device import free_memory
from moemerge.models.folder import ModelFolder
from moemerge.models.language_model import LanguageModel, load_language_model
from moemerge.models.loading import load_tokenizer
from moemerge.models.scoring import batches, in_batches
from moemerge.models.token_limits import check_texts
from moemerge.models.token_steps import why_not_by_steps
from moemerge.options.attack import Attack
from moemerge.reports.statistics import Floats
from moemerge.training.guided_decoding import (
    CachedGuide,
    Guide,
    MakeGuide,
    Start,
    TextGuide,
    Written,
    first_words,
    same_tokens,
    write_answers,
)
from moemerge.training.policy import SHORT_PROMPTS

log = logging.getLogger(__name__)
CACHED = "beginnings, with a cache"


class AnswerWriter:
    """The policy of an attack by decoding. Raises as load_language_model."""

    def __init__(self, options: Attack, device: torch.device) -> None:
        assert options.policy is not None  # the options see to it
        self._options, self._device = options, device
        source = ModelFolder(options.policy, options.trust_remote_code)
        self.policy, self.tokenizer = load_language_model(source, device)

    def fitting(self, pairs: Sequence[Pair], report: RowReport) -> list[Pair]:
        """The pairs behind whose first words there is room for max_new_tokens; others are bad rows.

        Raises DataError if bad rows are refused; else as policy.prompt_ids.
        """
        room, kept = self._options.max_length - self._options.max_new_tokens, []
        for pair in pairs:
            try:
                if len(self._start(pair, 0).ids(self.tokenizer)) <= room:
                    kept.append(pair)
                else:
                    reason = f"longer than {room} tokens, which is max_length - max_new_tokens"
                    report.add(reason, pair.row, SHORTEN)
            except BadRow as bad:
                report.add(str(bad), pair.row, bad.fix)
        report.check(self._options.bad_rows, SHORT_PROMPTS)
        return kept

    def write(self, pairs: Sequence[Pair], make_guide: MakeGuide, folder: Path) -> list[list[Written]]:
        """`answers` answers to each pair; each batch is kept in `folder` as soon as it is written.

        Batches hold `batch_tokens` tokens at most, those of all candidates counted: so large are the caches.
        Several processes write some of them each.
        """
        o = self._options
        starts = [self._start(pair, number) for pair in pairs for number in range(o.answers)]
        lengths = [(len(start.ids(self.tokenizer)) + o.max_new_tokens) * o.top for start in starts]
        groups = [*batches(lengths, o.batch_tokens)]
        with tqdm(total=len(starts), desc="attack", unit="answer", leave=False, disable=hidden()) as bar:

            def written(number: int) -> list[dict[str, Any]]:
                rows = [starts[row] for row in groups[number]]
                answers = write_answers(self.policy, self.tokenizer, rows, make_guide, o)
                bar.update(len(rows))
                return [answer.plain() for answer in answers]

            made = processes.once_each(folder, len(groups), written)
        by_row = {
            row: Written(**answer)
            for rows, answers in zip(groups, made, strict=True)
            for row, answer in zip(rows, answers, strict=True)
        }
        return [[by_row[n * o.answers + k] for k in range(o.answers)] for n in range(len(pairs))]

    def guide(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        texts: Sequence[Encoded],
        scorer: Callable[[Sequence[Item]], Floats],
        pairs: Sequence[Pair],
    ) -> tuple[MakeGuide, str]:
        """How the reward model reads what is being written, and the same in words.

        A decoder of the policy's vocabulary keeps keys and values; any other model gets each candidate's text
        by `scorer`, made of tokens anew, and a warning says why. `texts` are some that it can read.
        """
        why = self._why_anew(model, tokenizer, texts, pairs)
        if why:
            log.warning("the reward model reads every candidate's text anew, which is slow: %s", why)
            return lambda starts, _: TextGuide(scorer, self.tokenizer, starts), f"whole texts, anew: {why}"

        def cached(starts: Sequence[Start], candidates: int) -> Guide:
            rows = [start.ids(tokenizer) for start in starts]
            longest = max(rows, key=len)
            check_texts(model, [Encoded([*longest, *longest[-1:] * self._options.max_new_tokens], 0)])
            return CachedGuide(model, rows, candidates)

        return cached, CACHED

    def _why_anew(
        self, model: PreTrainedModel, tokenizer: Any, texts: Sequence[Encoded], pairs: Sequence[Pair]
    ) -> str:
        if not same_tokens(self.tokenizer, tokenizer):
            return "its tokens are not the policy's"
        try:
            for pair in pairs:
                self._start(pair, 0).ids(tokenizer)
        except (MoemergeError, BadRow) as refused:
            return str(refused).splitlines()[0]
        return why_not_by_steps(model, texts, self._options.batch_tokens)

    def likelier(self, items: Sequence[Item]) -> Floats:
        """log p of each answer by the policy minus that by other_policy, in nats, end tokens included.

        Each by its own tokens. The policy that writes is given up: it is read anew. Raises DataError for a
        text that one of them cannot take; else as load_language_model.
        """
        o = self._options
        assert o.policy is not None and o.other_policy is not None
        del self.policy
        free_memory()
        own, other = (self._log_probabilities(source, items) for source in (o.policy, o.other_policy))
        difference: Floats = own - other
        return difference

    def _log_probabilities(self, source: str, items: Sequence[Item]) -> Floats:
        folder = ModelFolder(source, self._options.trust_remote_code)
        texts = [_encoded(text) for text in encode_all(load_tokenizer(folder), items)]
        model = LanguageModel(folder, self._device)
        check_texts(model.trunk, texts)
        found_C = in_batches(texts, self._options.batch_tokens, lambda some: model.log_probabilities(some)[0])
        return found_C.double().numpy()

    def _start(self, pair: Pair, number: int) -> Start:
        """The start of the answer of this number; its draws depend on seed, row and number only."""
        o = self._options
        own = pair.rejected if o.side == "rejected" else pair.chosen
        words = first_words(own if isinstance(own, str) else own[-1]["content"], o.keep)
        return Start(pair.prompt, words, Random(f"{o.seed} {pair.row} {number}"))


def _encoded(text: Encoded | BadRow) -> Encoded:
    if isinstance(text, Encoded):
        return text
    raise DataError(
        "a policy cannot read what was written",
        given=str(text),
        expected="texts that its tokenizer and its chat template take",
        fix=text.fix or "give another policy, or leave the row out",
    )

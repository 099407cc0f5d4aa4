"""Preference texts as tokens, exactly as TRL's RewardTrainer makes them, and the rows that are too long."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moemerge.data.pairs import CandidateSet, Pair
from moemerge.data.rows import SHORTEN, BadRow, RowReport, Text
from moemerge.errors import DataError
from moemerge.options.base import TextFormat

Item = tuple[Text, Text]
SHORT_ROWS = "rows of at most max_length tokens that the tokenizer can encode"


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and answer; the first `prompt_length` of them belong to the prompt.

    `cut` is the number of tokens that truncation took away: only RewardBench's rows are truncated.
    """

    ids: list[int]
    prompt_length: int
    cut: int = 0


@dataclass(frozen=True)
class EncodedPair:
    """A pair and the tokens of its two sides."""

    chosen: Encoded
    rejected: Encoded
    pair: Pair


def texts_of(pairs: Sequence[EncodedPair]) -> list[Encoded]:
    """Chosen and rejected answer of each pair, in turns."""
    return [text for pair in pairs for text in (pair.chosen, pair.rejected)]


@dataclass(frozen=True)
class EncodedCandidates:
    """A candidate set and the tokens of each answer."""

    answers: list[Encoded]
    candidates: CandidateSet


def encode(tokenizer: Any, prompt: Text, answer: Text) -> Encoded:
    """Tokens of prompt + answer exactly as TRL's RewardTrainer makes them (trl 1.16, _prepare_dataset).

    Plain text is joined first, and the EOS token's text is appended unless the answer ends with it (a
    tokenizer without EOS appends nothing); messages go through the chat template. Nothing is truncated.
    The prompt's tokens are those with which both the prompt alone and the whole begin; none where the
    template cannot render the prompt alone. Raises DataError if there is no chat template, BadRow if the
    template refuses the messages.
    """
    encoded = encode_all(tokenizer, [(prompt, answer)])[0]
    if isinstance(encoded, BadRow):
        raise encoded
    return encoded


def encode_all(tokenizer: Any, items: Sequence[Item]) -> list[Encoded | BadRow]:
    """`encode` for many (prompt, answer) at once; returns the BadRow that encode would raise."""
    whole = _tokens(tokenizer, [_whole(prompt, answer, tokenizer.eos_token) for prompt, answer in items])
    # Both answers of a pair have one prompt: each is encoded once.
    keys = [json.dumps(prompt) for prompt, _ in items]
    unique = {key: prompt for key, (prompt, _) in zip(keys, items, strict=True)}
    prompts = dict(zip(unique, _tokens(tokenizer, list(unique.values())), strict=True))
    return [
        ids if isinstance(ids, BadRow) else Encoded(ids, shared_length(prompts[key], ids))
        for key, ids in zip(keys, whole, strict=True)
    ]


def _whole(prompt: Text, answer: Text, eos: str | None) -> Text:
    if isinstance(prompt, str) and isinstance(answer, str):
        return f"{prompt}{answer}" + (eos if eos and not answer.endswith(eos) else "")
    if isinstance(answer, str):
        raise TypeError("prompt and answer must both be text or both be messages")
    return [*(prompt if isinstance(prompt, list) else []), *answer]


def shared_length(prompt: list[int] | BadRow, ids: list[int]) -> int:
    """The number of equal tokens that both begin with; 0 if the prompt alone could not be encoded."""
    if isinstance(prompt, BadRow):
        return 0
    differ = (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b)
    return next(differ, min(len(prompt), len(ids)))


def _tokens(tokenizer: Any, texts: list[Text]) -> list[list[int] | BadRow]:
    """Ids of each text: plain text with the tokenizer's special tokens, rendered chats without."""
    ready = [text if isinstance(text, str) else render(tokenizer, text) for text in texts]
    tokens: list[list[int] | BadRow] = [text if isinstance(text, BadRow) else [] for text in ready]
    # Chat templates write their special tokens themselves; plain text gets the tokenizer's.
    for is_plain in (True, False):
        group = {i: t for i, t in enumerate(ready) if isinstance(t, str) and (t is texts[i]) == is_plain}
        if group:
            ids = tokenizer(list(group.values()), add_special_tokens=is_plain, verbose=False)["input_ids"]
            for i, text_ids in zip(group, ids, strict=True):
                tokens[i] = list(text_ids)
    return tokens


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str | BadRow:
    """Messages as the chat template writes them; a BadRow if it refuses. DataError without a template."""
    from jinja2 import TemplateError

    if not messages:
        return ""
    if tokenizer.chat_template is None:
        raise DataError(
            "chat messages cannot be encoded",
            given=f"a tokenizer without a chat template ({tokenizer.name_or_path})",
            expected="a tokenizer with a chat template, or plain text",
            fix="use the chat model's tokenizer, or give prompt, chosen and rejected as text",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
        return BadRow("chat template refuses the messages")


def encode_pairs(
    tokenizer: Any, pairs: Sequence[Pair], format: TextFormat, report: RowReport
) -> list[EncodedPair]:
    """Encode both sides of each pair; a pair that is too long is a bad row, counted in `report`.

    Raises DataError if bad rows are refused, or if none is left.
    """
    items = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    groups = _fitting(tokenizer, items, [2] * len(pairs), [pair.row for pair in pairs], format, report)
    return [EncodedPair(g[0], g[1], pair) for g, pair in zip(groups, pairs, strict=True) if g]


def encode_candidates(
    tokenizer: Any, sets: Sequence[CandidateSet], format: TextFormat, report: RowReport
) -> list[EncodedCandidates]:
    """Encode each set's answers; one that is too long makes the set a bad row. Raises as encode_pairs."""
    items = [(candidates.prompt, text) for candidates in sets for text in candidates.texts]
    sizes = [len(candidates.texts) for candidates in sets]
    groups = _fitting(tokenizer, items, sizes, [candidates.row for candidates in sets], format, report)
    return [EncodedCandidates(g, candidates) for g, candidates in zip(groups, sets, strict=True) if g]


def _fitting(
    tokenizer: Any,
    items: list[tuple[Text, Text]],
    sizes: list[int],
    rows: list[int],
    format: TextFormat,
    report: RowReport,
) -> list[list[Encoded]]:
    """The encoded items of each row, or an empty list where the row turned out to be bad."""
    stream, groups = iter(encode_all(tokenizer, items)), []
    for size, row in zip(sizes, rows, strict=True):
        group = list(itertools.islice(stream, size))
        good = [item for item in group if isinstance(item, Encoded) and len(item.ids) <= format.max_length]
        if len(good) < size:
            bad = next((str(item) for item in group if isinstance(item, BadRow)), None)
            report.add(bad or f"longer than {format.max_length} tokens", row)
        groups.append(good if len(good) == size else [])
    report.check(format.bad_rows, SHORT_ROWS, SHORTEN)
    return groups

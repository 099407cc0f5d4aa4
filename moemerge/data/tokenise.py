"""Preference texts as tokens, as TRL's RewardTrainer makes them, and the rows that cannot be encoded."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.data.pairs import CandidateSet, Pair
from moemerge.data.rows import SHORTEN, BadRow, RowReport, Text
from moemerge.data.texts import encodable
from moemerge.errors import CheckpointError, DataError, first_line, unexpected
from moemerge.options.base import TextFormat

Item = tuple[Text, Text]
SHORT_ROWS = "rows of at most max_length tokens that the tokenizer can encode"
RENDERED_ROWS = "rows that the tokenizer and its chat template can encode"
SYSTEM_FIX = "fold the system message into the first message of the user"
ROLES_FIX = "let user and assistant take turns, the user first, or use a model that takes such chats"
BOS_FIX = "take the BOS token off the answers: the prompt begins the text"
LONGEST_WORDS = 200  # of a chat template, quoted

log = logging.getLogger(__name__)


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

    @property
    def row(self) -> int:
        """The number of the pair's row."""
        return self.pair.row


def texts_of(pairs: Sequence[EncodedPair]) -> list[Encoded]:
    """Chosen and rejected answer of each pair, in turns."""
    return [text for pair in pairs for text in (pair.chosen, pair.rejected)]


def require_prompts(pairs: Sequence[EncodedPair]) -> None:
    """Raise DataError unless a pair has a prompt whose tokens are known; warn if some have none.

    A gate that looks at prompts sees zeros in place of a missing one, and always chooses the same expert.
    """
    # A BOS token alone is no prompt, though both texts begin with it.
    lacking = sum(not (pair.pair.prompt and pair.chosen.prompt_length) for pair in pairs)
    if lacking and lacking == len(pairs):
        raise DataError(
            "a gate that looks at prompts cannot learn from pairs without them",
            given=f"{len(pairs)} pairs, none with a prompt whose tokens are known",
            expected="pairs with a prompt: as text, or as messages that the chat template renders alone",
            fix="give the prompts a column of their own (its name: fields prompt=NAME); else use another "
            "gate, in combine form dense",
        )
    if lacking:
        log.warning("%d of %d pairs have no prompt that a gate could see: it treats these all alike",
                    lacking, len(pairs))  # fmt: skip


class Reader:
    """Puts prompts and answers into words of its own, such as a judge's question, and makes tokens of these.

    Otherwise it is the tokenizer that it does so with.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # asked for before there is one, as by copy
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    @property
    def wording(self) -> str:
        """Equal for readers that put texts into equal words; for people to read."""
        raise NotImplementedError

    def encode_all(
        self, items: Sequence[Item], rivals: Sequence[Sequence[Text]] | None
    ) -> list[Encoded | BadRow]:
        """As the function of this name. rivals: the other answers of each item's row, where that is known."""
        raise NotImplementedError


@dataclass(frozen=True)
class EncodedCandidates:
    """A candidate set and the tokens of each answer."""

    answers: list[Encoded]
    candidates: CandidateSet


def encode(tokenizer: Any, prompt: Text, answer: Text) -> Encoded:
    """Tokens of prompt + answer as TRL's RewardTrainer makes them (trl 1.16, _prepare_dataset), with one BOS.

    Plain text is joined first, and the EOS token's text is appended unless the answer ends with it (a
    tokenizer without EOS appends nothing); messages go through the chat template. Nothing is truncated.
    Plain text that begins with the BOS token's text was rendered before: it gets no special tokens again,
    where TRL would give it a second BOS.
    The prompt's tokens are those with which both the prompt alone and the whole begin; none where the
    template cannot render the prompt alone. Raises DataError if there is no chat template, BadRow if the
    template refuses the messages, or if an answer begins with BOS, behind its prompt.
    """
    encoded = encode_all(tokenizer, [(prompt, answer)])[0]
    if isinstance(encoded, BadRow):
        raise encoded
    return encoded


def encode_all(
    tokenizer: Any, items: Sequence[Item], rivals: Sequence[Sequence[Text]] | None = None
) -> list[Encoded | BadRow]:
    """`encode` for many (prompt, answer) at once; returns the BadRow that encode would raise.

    `tokenizer` may be a Reader, of which some look at an answer's rivals.
    """
    if isinstance(tokenizer, Reader):
        return tokenizer.encode_all(items, rivals)
    whole = _tokens(tokenizer, [_whole(prompt, answer, tokenizer) for prompt, answer in items])
    # Both answers of a pair have one prompt: each is encoded once.
    keys = [json.dumps(prompt) for prompt, _ in items]
    unique = {key: prompt for key, (prompt, _) in zip(keys, items, strict=True)}
    prompts = dict(zip(unique, _tokens(tokenizer, list(unique.values())), strict=True))
    return [
        ids if isinstance(ids, BadRow) else Encoded(ids, shared_length(prompts[key], ids))
        for key, ids in zip(keys, whole, strict=True)
    ]


def _whole(prompt: Text, answer: Text, tokenizer: Any) -> Text | BadRow:
    if isinstance(prompt, str) and isinstance(answer, str):
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        # Where BOS is EOS, as GPT-2 has it, one within a text may stand between its parts.
        if prompt.strip() and bos and bos != eos and answer.startswith(bos):
            return BadRow("answer begins with the BOS token, behind its prompt", BOS_FIX)
        return f"{prompt}{answer}" + (eos if eos and not answer.endswith(eos) else "")
    if isinstance(answer, str):
        raise TypeError("prompt and answer must both be text or both be messages")
    return [*(prompt if isinstance(prompt, list) else []), *answer]


def token_texts(tokenizer: Any, prompt: Text, answer: Text) -> list[str]:
    """What each token of `encode` stands for: joined, the text as it was rendered.

    White space that a tokenizer drops goes to the token behind it. A token that stands for nothing of the
    text, such as a BOS token that is put before it or the rest of a letter's bytes, has "". Raises as
    `encode`.
    """
    whole = _whole(prompt, answer, tokenizer)
    text = render(tokenizer, whole) if isinstance(whole, list) else whole
    if isinstance(text, BadRow):
        raise text
    bare = isinstance(whole, list) or begins_with_bos(tokenizer, text)
    if not tokenizer.is_fast:
        return [str(tokenizer.decode([id])) for id in tokenizer(text, add_special_tokens=not bare).input_ids]
    read = tokenizer(text, add_special_tokens=not bare, return_offsets_mapping=True, verbose=False)
    texts, start = [], 0
    for _, end in read["offset_mapping"]:
        texts.append(text[start:end])
        start = max(start, end)
    return texts


def shared_length(prompt: list[int] | BadRow, ids: list[int]) -> int:
    """The number of equal tokens that both begin with; 0 if the prompt alone could not be encoded."""
    if isinstance(prompt, BadRow):
        return 0
    differ = (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b)
    return next(differ, min(len(prompt), len(ids)))


def _tokens(tokenizer: Any, texts: Sequence[Text | BadRow]) -> list[list[int] | BadRow]:
    """Ids of each text: plain text with the tokenizer's special tokens, what is rendered without."""
    ready = [render(tokenizer, text) if isinstance(text, list) else text for text in texts]
    tokens: list[list[int] | BadRow] = [text if isinstance(text, BadRow) else [] for text in ready]
    bare = [isinstance(text, list) or begins_with_bos(tokenizer, text) for text in texts]
    for is_bare in (False, True):
        group = {i: text for i, text in enumerate(ready) if isinstance(text, str) and bare[i] == is_bare}
        if group:
            ids = ids_of(tokenizer, list(group.values()), add_special_tokens=not is_bare)
            for i, text_ids in zip(group, ids, strict=True):
                tokens[i] = text_ids
    return tokens


def ids_of(tokenizer: Any, texts: list[str], **how: Any) -> list[list[int]]:
    """Token ids of each text. CheckpointError if the tokenizer fails at one: a whole one takes any text."""
    try:
        return [list(ids) for ids in tokenizer(texts, verbose=False, **how)["input_ids"]]
    except BaseException as error:  # of any kind, or a panic
        if not unexpected(error):
            raise
        raise CheckpointError(
            f"the tokenizer cannot encode a text: {tokenizer.name_or_path}",
            given=f"{type(error).__name__}: {first_line(error)}",
            expected="a tokenizer that makes tokens of any text",
            fix="take the tokenizer that the model was trained with",
        ) from error


def begins_with_bos(tokenizer: Any, text: Any) -> bool:
    """Whether a text was rendered beforehand: it has a BOS of its own, and is to get no other."""
    return isinstance(text, str) and bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def render(tokenizer: Any, messages: list[dict[str, str]], **more: Any) -> str | BadRow:
    """Messages as the chat template writes them, `more` given to it; a BadRow with its words if it refuses.

    Raises DataError without a template.
    """
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
        return encodable(str(tokenizer.apply_chat_template(messages, tokenize=False, **more)))
    except BadRow as fault:
        return fault
    except Exception as error:  # a template is a program, and may raise anything
        return _refused(messages, error)


def _refused(messages: list[dict[str, str]], error: Exception) -> BadRow:
    """The BadRow of messages that the chat template refuses, in its own words, kept to one printable line."""
    words = " ".join(str(error).split())[:LONGEST_WORDS]
    words = "".join(letter if letter.isprintable() else "?" for letter in words)
    has_system = any(message["role"] == "system" for message in messages)
    return BadRow(f"chat template refuses the messages: {words}", SYSTEM_FIX if has_system else ROLES_FIX)


_written_below: ContextVar[Path | None] = ContextVar("_written_below", default=None)


@contextmanager
def writing_below(folder: Path) -> Iterator[None]:
    """Meanwhile files below `folder` are copies of what was read, and told of, before."""
    token = _written_below.set(folder.absolute())
    try:
        yield
    finally:
        _written_below.reset(token)


def tell_untemplated(tokenizer: Any, texts: Sequence[Text], report: RowReport) -> None:
    """Warn, once per file, of plain texts for a chat model, unless the first begins with a special token.

    A run tells of what it reads, not of the parts that it writes and reads again.

    A chat template is not applied to plain text. A text that was rendered beforehand begins with BOS or with
    the token that opens a message.
    """
    below = _written_below.get()
    if below is not None and Path(report.source).absolute().is_relative_to(below):
        return
    plain = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    if report.told_plain or plain is None or tokenizer.chat_template is None or isinstance(tokenizer, Reader):
        return
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = [*tokenizer.all_special_tokens, *(token.content for token in added if token.special)]
    if not plain.lstrip().startswith(tuple(special)):
        report.told_plain = True
        log.warning(
            "%s is plain text, to which the chat template of %s is not applied: a model trained on chats "
            "wants messages {role, content}",
            report.source,
            tokenizer.name_or_path or "the model",
        )


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


def rivals_of(items: Sequence[Item], sizes: Sequence[int]) -> list[list[Text]]:
    """For each item the other answers of its row; rows have `sizes` items, one after the other."""
    stream = iter(items)
    rows = [[answer for _, answer in itertools.islice(stream, size)] for size in sizes]
    return [[*row[:place], *row[place + 1 :]] for row in rows for place in range(len(row))]


def _fitting(
    tokenizer: Any,
    items: list[tuple[Text, Text]],
    sizes: list[int],
    rows: list[int],
    format: TextFormat,
    report: RowReport,
) -> list[list[Encoded]]:
    """The encoded items of each row, or an empty list where the row turned out to be bad."""
    tell_untemplated(tokenizer, [prompt or answer for prompt, answer in items[:1]], report)
    stream, groups, expected = iter(encode_all(tokenizer, items, rivals_of(items, sizes))), [], RENDERED_ROWS
    for size, row in zip(sizes, rows, strict=True):
        group = list(itertools.islice(stream, size))
        good = [item for item in group if isinstance(item, Encoded) and len(item.ids) <= format.max_length]
        bad = next((item for item in group if isinstance(item, BadRow)), None)
        if bad is not None:
            report.add(str(bad), row, bad.fix)
        elif len(good) < size:
            expected = SHORT_ROWS
            report.add(f"longer than {format.max_length} tokens", row, SHORTEN)
        groups.append(good if len(good) == size else [])
    report.check(format.bad_rows, expected)
    return groups

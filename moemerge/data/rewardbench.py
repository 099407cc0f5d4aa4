"""Rows of RewardBench 1 and 2 (arXiv 2403.13787, 2506.01937), read and encoded as its own scripts do.

Unlike other data these are cut where they are too long, and take no other field names: a benchmark is a rule.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from moemerge.data.reading import collect
from moemerge.data.rows import BadRow, Row, RowReport, read_rows
from moemerge.data.tokenise import Encoded, Item, Reader, encode_all, ids_of, render, rivals_of, shared_length
from moemerge.errors import DataError
from moemerge.options.evaluate import Evaluate

CHOICE_ROWS = (
    "rows of one version of RewardBench: prompt, chosen, rejected, subset as text (1), or with lists of "
    "texts as chosen and rejected, and num_correct and id (2)"
)

TIES_ID = re.compile(r"(ref|tied):\d+")


@dataclass(frozen=True)
class Choice:
    """One row: `texts` are answers to `turns`, the first `num_correct` of them right.

    `turns` are user and assistant in turns, the user first and last. `version` is 1 or 2.
    """

    turns: list[str]
    texts: list[str]
    num_correct: int
    version: int
    subset: str = ""
    id: str = ""
    row: int = 0


@dataclass(frozen=True)
class EncodedChoice:
    """A row and the tokens of each answer."""

    answers: list[Encoded]
    choice: Choice


def read_choices(source: str, options: Evaluate) -> tuple[list[Choice], RowReport]:
    """All rows of `source` (see rows.read_rows), and a report on those that cannot be used.

    Raises DataError as reading.read_pairs does, and for a source that mixes the two versions.
    """
    choices, report = collect(source, list(read_rows(source)), options, _parse, CHOICE_ROWS)
    versions = {choice.version: choice.row for choice in choices}
    if len(versions) > 1:
        raise DataError(
            f"{source} mixes both versions of RewardBench",
            given=", ".join(f"row {row} is of version {version}" for version, row in versions.items()),
            expected="rows of one version",
            fix="give one file for each version",
        )
    return choices, report


def is_choice(row: Row) -> bool:
    """Whether a row has columns that only RewardBench has: lists of answers (2), or the models' names (1)."""
    return are_texts(row.get("chosen")) or {"chosen_model", "rejected_model", "subset"} <= row.keys()


def _parse(row: Row, number: int, _: object) -> Choice:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    version = 2 if isinstance(chosen, list) else 1
    if version == 1:
        chosen, rejected = [chosen], [rejected]
    if not (are_texts(chosen) and are_texts(rejected)):
        raise BadRow("chosen and rejected are neither texts nor lists of texts")
    if row.get("num_correct") not in (None, len(chosen)):
        raise BadRow("num_correct is not the number of chosen answers")
    subset, name = row.get("subset") or "", row.get("id")
    if not isinstance(subset, str) or (version == 2 and not subset):
        raise BadRow("subset is not text")
    name = "" if name is None else str(name)
    if version == 2 and subset.lower() == "ties" and not TIES_ID.fullmatch(name):
        raise BadRow("id of a row of Ties is neither ref:NUMBER nor tied:NUMBER")
    texts = [*chosen, *rejected]
    return Choice(turns_of(row.get("prompt")), texts, len(chosen), version, subset, name, number)


def are_texts(values: Any) -> TypeGuard[list[str]]:
    """Whether `values` is a list of one text or more."""
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def turns_of(prompt: Any) -> list[str]:
    """Contents of the prompt's messages; their roles are taken by turns, whatever they are called."""
    if isinstance(prompt, str):
        return [prompt]
    contents: Any = [turn.get("content") for turn in prompt if isinstance(turn, dict)] if prompt else []
    if not are_texts(contents):
        raise BadRow("prompt is neither text nor messages")
    if len(contents) % 2 == 0:
        raise BadRow("the prompt's last turn is not the user's")
    return contents


def encode_choices(
    tokenizer: Any, choices: Sequence[Choice], options: Evaluate, report: RowReport
) -> list[EncodedChoice]:
    """Encode every answer as RewardBench's scripts do: rendered, then tokenised with special tokens.

    A doubled BOS is made one. Texts over `rewardbench_max_length` are cut: on the left in version 1, in
    version 2 on the side that the tokenizer's settings say. Raises DataError for `rewardbench_template` chat
    without a template, and if bad rows are refused or none is left.
    """
    if isinstance(tokenizer, Reader):
        return _encode_own_way(tokenizer, choices, options, report)
    if options.rewardbench_template == "chat" and tokenizer.chat_template is None:
        raise DataError(
            "RewardBench's rows cannot be rendered",
            given=f"a tokenizer without a chat template ({tokenizer.name_or_path})",
            expected="a chat template, or rewardbench_template plain",
            fix="set rewardbench_template to plain; name it where you give these numbers",
        )
    plain = options.rewardbench_template == "plain"
    wholes = [_written(tokenizer, [*c.turns, text], plain) for c in choices for text in c.texts]
    prompts = [_written(tokenizer, c.turns, plain, alone=True) for c in choices for _ in c.texts]
    side = truncation_side(choices[0].version, tokenizer)
    texts = _encode_texts(tokenizer, wholes, prompts, options.rewardbench_max_length, side)
    return _by_choice(texts, choices, options, report)


def _encode_own_way(
    reader: Reader, choices: Sequence[Choice], options: Evaluate, report: RowReport
) -> list[EncodedChoice]:
    """As encode_choices, in the reader's words, of which none can be cut."""
    items: list[Item] = [
        (_messages(c.turns), [{"role": "assistant", "content": text}]) for c in choices for text in c.texts
    ]
    encoded = encode_all(reader, items, rivals_of(items, [len(c.texts) for c in choices]))
    most = options.rewardbench_max_length
    long = BadRow(f"longer than {most} tokens, and a question cannot be cut")
    fitting = [long if isinstance(text, Encoded) and len(text.ids) > most else text for text in encoded]
    return _by_choice(fitting, choices, options, report)


def _by_choice(
    encoded_texts: Sequence[Encoded | BadRow],
    choices: Sequence[Choice],
    options: Evaluate,
    report: RowReport,
) -> list[EncodedChoice]:
    """The texts by row; the rows that have a bad one are told."""
    texts, encoded = iter(encoded_texts), []
    for choice in choices:
        answers = [next(texts) for _ in choice.texts]
        good = [answer for answer in answers if isinstance(answer, Encoded)]
        if len(good) == len(answers):
            encoded.append(EncodedChoice(good, choice))
        else:
            bad = next(answer for answer in answers if isinstance(answer, BadRow))
            report.add(str(bad), choice.row, bad.fix)
    report.check(options.bad_rows, "rows that the chat template can render")
    return encoded


def truncation_side(version: int, tokenizer: Any) -> str:
    """Where too long texts lose tokens: on the left in version 1, as the tokenizer says in version 2."""
    return "left" if version == 1 else str(tokenizer.truncation_side)


def _written(tokenizer: Any, turns: Sequence[str], plain: bool, alone: bool = False) -> str | BadRow:
    """Turns as one text; a prompt `alone` ends where the answer begins."""
    if plain:
        end = "\n" if alone else tokenizer.eos_token or ""
        return "\n".join(turns) + end
    return render(tokenizer, _messages(turns))


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _encode_texts(
    tokenizer: Any, wholes: list[str | BadRow], prompts: list[str | BadRow], most: int, side: str
) -> list[Encoded | BadRow]:
    """Each whole text as tokens, cut to `most` on `side`; the BadRow of one that could not be rendered."""
    full = _ids(tokenizer, wholes)
    cutter = copy.deepcopy(tokenizer)
    cutter.truncation_side = side
    long: list[str | BadRow] = [text for text, ids in full.items() if len(ids) > most]
    kept = full | _ids(cutter, long, truncation=True, max_length=most)
    alone, bos = _ids(tokenizer, prompts), tokenizer.bos_token_id
    encoded: list[Encoded | BadRow] = []
    for whole, prompt in zip(wholes, prompts, strict=True):
        if isinstance(whole, BadRow):
            encoded.append(whole)
            continue
        before, ids = (_one_bos(texts[whole], bos) for texts in (full, kept))
        start = _one_bos(alone[prompt], bos) if isinstance(prompt, str) else prompt
        # How much of the prompt is left: what is cut on the left is lost from it. Found in the uncut text, as
        # the cut one may begin in the middle of the prompt.
        shared = shared_length(start, before) - (len(before) - len(ids) if side == "left" else 0)
        encoded.append(Encoded(ids, min(max(shared, 0), len(ids)), len(before) - len(ids)))
    return encoded


def _ids(tokenizer: Any, texts: Sequence[str | BadRow], **truncation: Any) -> dict[str, list[int]]:
    """Token ids, with special tokens, of each text."""
    different = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
    ids = ids_of(tokenizer, different, **truncation) if different else []
    return dict(zip(different, ids, strict=True))


def _one_bos(ids: list[int], bos: int | None) -> list[int]:
    """`ids` with a doubled BOS made one: a chat template may write what the tokenizer adds again."""
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

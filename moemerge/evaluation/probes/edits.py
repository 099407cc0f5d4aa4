"""Making the edited answers that bias probes have scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from moemerge.data.pairs import Pair, prompt_key
from moemerge.data.rows import BadRow, RowReport, Text
from moemerge.data.tokenise import Encoded, encode_all
from moemerge.evaluation.probes.base import Case, Edit, Edited, Edits
from moemerge.options.base import TextFormat

UNCHANGED = "nothing to edit"


@dataclass(frozen=True)
class EncodedEdit:
    """An edited answer and its tokens, prompt included."""

    answer: Encoded
    edited: Edited


def last_message(text: Text) -> str:
    """Plain text itself, or the content of a chat's last message ("" without messages)."""
    if isinstance(text, str):
        return text
    return text[-1]["content"] if text else ""


def replace_last_message(text: Text, content: str) -> Text:
    """`text` with `content` in place of what last_message gives."""
    return content if isinstance(text, str) else [*text[:-1], {**text[-1], "content": content}]


def sentences(text: str) -> list[str]:
    """`text` cut after full stops, exclamation and question marks and at line ends."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def some_pairs(pairs: Sequence[Any], most: int, seed: int) -> list[int]:
    """Places of at most `most` pairs, drawn from `seed`, in order."""
    if len(pairs) <= most:
        return list(range(len(pairs)))
    return sorted(np.random.default_rng(seed).choice(len(pairs), most, replace=False).tolist())


def make_edits(
    pairs: Sequence[Pair], numbers: Sequence[int], edits: Edits, source: str, seed: int
) -> dict[str, tuple[list[Edited], RowReport]]:
    """Per edit, its answers for the pairs of these `numbers`, and a report on those it cannot change.

    An edit's random draws depend on `seed`, its name and the pair's row only.
    """
    strangers = _strangers(pairs, numbers, seed)
    made = {}
    for name, edit in edits.functions.items():
        report, items = RowReport(source, total=len(numbers)), []
        for number, stranger in zip(numbers, strangers, strict=True):
            pair, random = pairs[number], Random(f"{seed} {name} {pairs[number].row}")
            text = apply(edit, pair.prompt, getattr(pair, edits.side), stranger, random)
            if text is None:
                report.add(UNCHANGED, pair.row)
            else:
                items.append(Edited(pair, number, text))
        made[name] = items, report
    return made


def apply(edit: Edit, prompt: Text, answer: Text, stranger: str, random: Random) -> Text | None:
    """`answer`, or the last message of a chat, after `edit`; None if that changes nothing or leaves nothing.

    White space around the answer stays.
    """
    whole = last_message(answer)
    core = whole.strip()
    edited = edit(Case(last_message(prompt).strip(), core, stranger, random)).strip()
    if not edited or edited == core:
        return None
    start = whole.index(core)
    return replace_last_message(answer, whole[:start] + edited + whole[start + len(core) :])


def _strangers(pairs: Sequence[Pair], numbers: Sequence[int], seed: int) -> list[str]:
    """For each pair the chosen answer to another prompt, the next in a random order; "" if there is none."""
    prompts = {number: prompt_key(pairs[number]) for number in numbers}
    order = [numbers[i] for i in np.random.default_rng(seed).permutation(len(numbers))]
    strangers = {}
    for i, number in enumerate(order):
        rest = (*order[i + 1 :], *order[:i])
        other = next((later for later in rest if prompts[later] != prompts[number]), None)
        strangers[number] = "" if other is None else last_message(pairs[other].chosen).strip()
    return [strangers[number] for number in numbers]


def encode_edits(
    tokenizer: Any, items: Sequence[Edited], format: TextFormat, report: RowReport
) -> list[EncodedEdit]:
    """The edited answers that can be encoded within max_length; the others are counted, never refused."""
    usable = []
    encoded = encode_all(tokenizer, [(item.pair.prompt, item.text) for item in items])
    for item, answer in zip(items, encoded, strict=True):
        if isinstance(answer, BadRow):
            report.add(str(answer), item.row, answer.fix)
        elif len(answer.ids) > format.max_length:
            report.add(f"longer than {format.max_length} tokens", item.row)
        else:
            usable.append(EncodedEdit(answer, item))
    return usable

"""One row of preference data, checked: pairs of answers, and sets of scored candidates."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moemerge.data.rows import BadRow, Row, Text, listed
from moemerge.data.texts import encodable, is_blank, parse_text, repeats
from moemerge.errors import DataError
from moemerge.options.base import TextFormat

LARGEST = 1e100  # its square is a number still
UNSUPPORTED = ("tools", "chat_template_kwargs")
REPEATED = "answers begin with their prompt"
TAKE_OFF = "take the prompt off these answers"


@dataclass(frozen=True)
class Pair:
    """One preference: `chosen` is the better answer to `prompt` ("" or [] where the data have none).

    `margin`: how much better; `doubt`: the probability that it is not, in [0, 1]; None where the data lack
    them. `row` is the row's number in its source, from 1; `source` the row as it was read.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    subset: str = ""
    margin: float | None = None
    row: int = 0
    source: Row = field(default_factory=dict, repr=False)
    doubt: float | None = None

    def plain(self) -> Row:
        """The pair as a row with plain field names; subset, margin and doubt only where there is one."""
        row: Row = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        optional = {"subset": self.subset or None, "margin": self.margin, "doubt": self.doubt}
        return row | {k: v for k, v in optional.items() if v is not None}


def swapped(pair: Pair) -> Pair:
    """The pair with the other label; its margin stays, and what was doubt is belief."""
    doubt = None if pair.doubt is None else 1 - pair.doubt
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen, doubt=doubt)


def prompt_key(pair: Pair) -> str:
    """Equal for pairs of one prompt: what never straddles a split, and the sampling unit of every interval.

    The order of a message's fields does not matter. A pair without a prompt stands alone, but for copies of
    itself: they have the same scores, so they are no further observation.
    """
    return json.dumps(pair.prompt or (pair.chosen, pair.rejected), sort_keys=True)


def margins_of(pairs: Sequence[Pair]) -> list[float]:
    """The margin of each pair. One that is missing or not finite is not 0: DataError names its row."""
    return _column("margin", [pair.margin for pair in pairs], pairs, "set margin to none")


def doubts_of(pairs: Sequence[Pair]) -> list[float]:
    """The doubt of each pair. One that is missing is not 0: DataError names its row."""
    return _column("doubt", [pair.doubt for pair in pairs], pairs, "set label_smoothing to a number")


def _column(name: str, values: list[float | None], pairs: Sequence[Pair], otherwise: str) -> list[float]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(pairs):
        lacking = [
            pair.row
            for pair, value in zip(pairs, values, strict=True)
            if value is None or not math.isfinite(value)
        ]
        raise DataError(
            f"{len(lacking)} of {len(pairs)} pairs have no {name}",
            given=f"none in rows {listed(lacking)}",
            expected=f"a finite number in the column {name} of every pair",
            fix=f"give these rows a {name}, name the column in fields ({name}=NAME), or {otherwise}",
        )
    return known


def numbered(keys: Iterable[Hashable]) -> list[int]:
    """Equal numbers for equal keys, counted from 0 in the order of their first appearance."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


@dataclass(frozen=True)
class CandidateSet:
    """Several answers to one prompt with the gold score of each; without scores `gold` is empty."""

    prompt: Text
    texts: list[Text]
    gold: list[float]
    subset: str = ""
    row: int = 0

    def plain(self) -> Row:
        """The set as a row with plain field names."""
        answers: list[Row] = [{"text": text} for text in self.texts]
        if self.gold:
            answers = [row | {"score": score} for row, score in zip(answers, self.gold, strict=True)]
        row: Row = {"prompt": self.prompt, "candidates": answers}
        return row | ({"subset": self.subset} if self.subset else {})


def value_of(row: Row, name: str, format: TextFormat) -> Any:
    """What `row` holds in the field that stands for `name`; None if there is no such field."""
    return row.get(format.fields.get(name, name))


def parse_pair(row: Row, number: int, format: TextFormat, has_prompt: bool) -> Pair:
    """The pair that `row` holds, with a prompt of its own or one shared by its chats. Raises BadRow."""
    _refuse_unsupported(row)
    chosen, rejected = (parse_text(value_of(row, name, format), name) for name in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        raise BadRow("chosen and rejected are of different kinds")
    prompt = parse_text(value_of(row, "prompt", format), "prompt") if has_prompt else None
    prompt, chosen, rejected = _divide(prompt, chosen, rejected)
    if is_blank(chosen) or is_blank(rejected):
        raise BadRow("empty answer")
    if chosen == rejected:
        raise BadRow("identical answers")
    # One answer alone may quote its prompt; both do so only where they hold it, and it would be read twice.
    if repeats(prompt, chosen) and repeats(prompt, rejected):
        way_out = "or, where every row is so, read them as they are with fields prompt=none"
        raise BadRow(REPEATED, f"{TAKE_OFF}, {way_out}")
    margin, doubt = (_number_or_none(row, name, format) for name in ("margin", "doubt"))
    if doubt is not None and not 0 <= doubt <= 1:
        raise BadRow("doubt is not from 0 to 1")
    return Pair(prompt, chosen, rejected, _subset(row, format), margin, number, row, doubt)


def _divide(prompt: Text | None, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Prompt and answers apart; a text prompt beside chats must be the last message that they share."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        first, second = (as_answer(prompt or "", text) for text in (chosen, rejected))
        return prompt or "", first, second
    if isinstance(prompt, list):
        return prompt, chosen, rejected
    # Two chats: what they begin with in common is the prompt.
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if shared == len(chosen) == len(rejected):
        raise BadRow("identical answers")
    if prompt is not None and (not shared or chosen[shared - 1]["content"] != prompt):
        raise BadRow("prompt is text, answers are messages that do not begin with it")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def as_answer(prompt: Text, answer: Text) -> Text:
    """`answer` as the same kind as its prompt: text after a chat is the assistant's message."""
    if isinstance(prompt, list) and isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return answer


def parse_prompt(row: Row, number: int, format: TextFormat) -> CandidateSet:
    """The prompt that `row` holds, without answers. Raises BadRow."""
    _refuse_unsupported(row)
    prompt = parse_text(value_of(row, "prompt", format), "prompt")
    if is_blank(prompt):
        raise BadRow("empty prompt")
    return CandidateSet(prompt, [], [], _subset(row, format), number)


def parse_candidates(row: Row, number: int, format: TextFormat, scored: bool = True) -> CandidateSet:
    """The candidate set that `row` holds; unless `scored`, answers may lack scores. Raises BadRow."""
    _refuse_unsupported(row)
    prompt = parse_text(value_of(row, "prompt", format), "prompt")
    answers = value_of(row, "candidates", format)
    if answers is None:
        raise BadRow("missing candidates")
    if not isinstance(answers, list) or not all(isinstance(a, dict) for a in answers):
        raise BadRow("candidates is not a list of objects")
    if len(answers) < 2:
        raise BadRow("fewer than 2 candidates")
    texts = [as_answer(prompt, parse_text(value_of(answer, "text", format), "text")) for answer in answers]
    if any(type(text) is not type(prompt) for text in texts):
        raise BadRow("prompt and text are of different kinds")
    if any(map(is_blank, texts)):
        raise BadRow("empty answer")
    if all(repeats(prompt, text) for text in texts):
        raise BadRow(REPEATED, TAKE_OFF)
    scores = [value_of(answer, "score", format) for answer in answers]
    gold = [_number(score, "score") for score in scores] if scored or None not in scores else []
    return CandidateSet(prompt, texts, gold, _subset(row, format), number)


def _refuse_unsupported(row: Row) -> None:
    for name in UNSUPPORTED:
        if row.get(name):
            raise BadRow(f"has {name}, which cannot be honoured")


def _number_or_none(row: Row, name: str, format: TextFormat) -> float | None:
    value = value_of(row, name, format)
    return None if value is None else _number(value, name)


def _number(value: Any, name: str) -> float:
    if value is None:
        raise BadRow(f"missing {name}")
    # A bool is an int to Python; value != value is NaN.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise BadRow(f"{name} is not a finite number")
    if abs(value) > LARGEST:
        raise BadRow(f"{name} is not a finite number of at most {LARGEST:.0e}")
    return float(value)


def _subset(row: Row, format: TextFormat) -> str:
    value = value_of(row, "subset", format)
    if value is not None and not isinstance(value, (str, int, float)):
        raise BadRow("subset is not text")
    return "" if value is None else encodable(str(value))

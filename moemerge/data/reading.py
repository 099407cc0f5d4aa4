"""Reading and checking preference data: pairs, sets of candidates, prompts.

Formats are TRL's: prompt/chosen/rejected, or chosen/rejected that hold their prompt, each as plain text or
as chat messages (see texts.parse_text); for best-of-n, a prompt with candidates[{text, score}].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from moemerge.data.pairs import CandidateSet, Pair, parse_candidates, parse_pair, parse_prompt, value_of
from moemerge.data.rows import BadRow, Row, RowReport, read_rows
from moemerge.data.shards import tell_lone_shard
from moemerge.errors import DataError
from moemerge.options.base import TextFormat

T = TypeVar("T")

PAIR_ROWS = "rows with prompt, chosen, rejected (or the last two only), each text or messages {role, content}"
CANDIDATE_ROWS = "rows with prompt and candidates, a list of two or more {text, score}"
PROMPT_ROWS = "rows with prompt, text or messages {role, content}"


def read_pairs(source: str, format: TextFormat) -> tuple[list[Pair], RowReport]:
    """All usable pairs of `source` (see rows.read_rows), and a report on the others.

    Chat pairs without a prompt share their leading messages: those become the prompt. Raises DataError if
    the source cannot be opened, has no usable row, or has a bad one while format.bad_rows is "refuse".
    """
    rows = list(read_rows(source))
    # One prompt anywhere means that the data have the column: rows without it are bad then, not read as chats
    # that share one.
    has_prompt = any(isinstance(r, dict) and value_of(r, "prompt", format) is not None for _, r in rows)
    return collect(source, rows, format, partial(parse_pair, has_prompt=has_prompt), PAIR_ROWS)


def read_candidates(
    source: str, format: TextFormat, scored: bool = True
) -> tuple[list[CandidateSet], RowReport]:
    """All usable candidate sets of `source`, and a report on the other rows. Raises as read_pairs does.

    Unless `scored`, sets without gold scores are taken too.
    """
    rows = list(read_rows(source))
    return collect(source, rows, format, partial(parse_candidates, scored=scored), CANDIDATE_ROWS)


def read_prompts(source: str, format: TextFormat) -> tuple[list[CandidateSet], RowReport]:
    """The prompts of `source`, whatever else its rows hold, as sets without answers.

    Raises as read_pairs does, and DataError for chats and plain texts side by side.
    """
    sets, report = collect(source, list(read_rows(source)), format, parse_prompt, PROMPT_ROWS)
    if len({type(prompt_set.prompt) for prompt_set in sets}) > 1:
        raise DataError(
            f"prompts of {source} are of different kinds",
            given="texts and chats",
            expected="one kind",
            fix="make two files of them",
        )
    return sets, report


def distinct(sets: Sequence[CandidateSet]) -> list[CandidateSet]:
    """`sets` without those whose prompt an earlier one has."""
    first: dict[str, CandidateSet] = {}
    for candidates in sets:
        first.setdefault(json.dumps(candidates.prompt), candidates)
    return list(first.values())


def collect(
    source: str,
    rows: list[tuple[int, Row | BadRow]],
    format: TextFormat,
    parse: Callable[[Row, int, TextFormat], T],
    expected: str,
) -> tuple[list[T], RowReport]:
    """What `parse` makes of each of `rows`, and a report on those for which it raises BadRow.

    Raises DataError as read_pairs does; `expected` is the part of its message that says what rows must hold.
    """
    tell_lone_shard(source)
    report, kept = RowReport(source, total=len(rows)), []
    for number, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            kept.append(parse(row, number, format))
        except BadRow as bad:
            report.add(str(bad), number, bad.fix)
    names = next((list(row) for _, row in rows if isinstance(row, dict)), None)
    report.check(format.bad_rows, expected + (f"; found fields: {', '.join(names)}" if names else ""))
    return kept, report

"""Rows of RM-Bench (arXiv 2410.16184): three right and three wrong answers to a prompt, in three styles each.

Its own code renders and cuts texts as RewardBench 1 does, and so does this (data/rewardbench.py).
"""

from __future__ import annotations

from typing import Any, TypeGuard

from moemerge.data.reading import collect
from moemerge.data.rewardbench import Choice, are_texts, turns_of
from moemerge.data.rows import BadRow, Row, RowReport, read_rows
from moemerge.options.evaluate import Evaluate

STYLES = ("concise", "detailed", "markdown")  # in the order of the lists; the last one is detailed too
STYLED_ROWS = "rows of RM-Bench: prompt, chosen and rejected with three texts each, and domain"


def read_styles(source: str, options: Evaluate) -> tuple[list[Choice], RowReport]:
    """All rows of `source`, the right answers of each first, and a report on those that cannot be used.

    A row's domain is its subset. Raises DataError as reading.read_pairs does.
    """
    return collect(source, list(read_rows(source)), options, _parse, STYLED_ROWS)


def is_styled(row: Row) -> bool:
    """Whether a row has the columns of RM-Bench."""
    sides = (row.get("chosen"), row.get("rejected"))
    return isinstance(row.get("domain"), str) and all(map(_are_styles, sides))


def _are_styles(texts: Any) -> TypeGuard[list[str]]:
    return are_texts(texts) and len(texts) == len(STYLES)


def _parse(row: Row, number: int, _: object) -> Choice:
    chosen, rejected, domain, name = (row.get(key) for key in ("chosen", "rejected", "domain", "id"))
    if not (_are_styles(chosen) and _are_styles(rejected)):
        raise BadRow(f"chosen and rejected are not {len(STYLES)} texts each")
    if not isinstance(domain, str) or not domain:
        raise BadRow("domain is not text")
    return Choice(
        turns_of(row.get("prompt")), chosen + rejected, len(STYLES), 1, domain, str(name or ""), number
    )

"""Tables of reports, and text that is safe in markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONG_TEXT = 60  # letters of a cell that make its column prose
LONGEST_NAME = 100  # letters of a column's or row's name; of a title twice as many
HIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|\r(?!\n)"
)
ADDRESS = re.compile(r"(https?|ftp):(?=//)|(www)\.", re.IGNORECASE)  # GitHub makes links of these

Interval = tuple[float, float]


@dataclass(frozen=True)
class Table:
    """A table of the report; cells are text already. One of `detail` is folded away on a page.

    Title, header and the names of rows are shortened: names in data may be of any length.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    detail: bool = False

    def __post_init__(self) -> None:
        shown = {
            "title": shortened(self.title, 2 * LONGEST_NAME),
            "header": list(map(shortened, self.header)),
            "rows": [[*map(shortened, row[:1]), *row[1:]] for row in self.rows],
        }
        for name, value in shown.items():
            object.__setattr__(self, name, value)

    def markdown(self) -> str:
        """The table as GitHub markdown, headed by its title; columns of numbers keep to the right."""
        rule = ["---:" if numeric else "---" for numeric in self.numeric()]
        cells = [[_markdown_cell(cell) for cell in row] for row in [self.header, rule, *self.rows]]
        body = map(_line, cells)
        note = ["", inert_markdown(self.note)] if self.note else []
        return "\n".join([f"### {inert_markdown(self.title)}", "", *body, *note]) + "\n"

    def aligned(self) -> str:
        """Header and rows alone, padded: as readable in a terminal as on a page."""
        shown = [[one_line(cell) for cell in row] for row in [self.header, *self.rows]]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        rows = [shown[0], rule, *shown[1:]]
        return "\n".join(
            _line([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
        )

    def numeric(self) -> list[bool]:
        """Which columns hold numbers only."""
        return [all(map(_is_number, column)) for column in self._columns()]

    def prose(self) -> list[bool]:
        """Which columns hold text that needs room to be read."""
        return [max(map(len, column), default=0) > LONG_TEXT for column in self._columns()]

    def _columns(self) -> list[list[str]]:
        return [[row[column] for row in self.rows] for column in range(len(self.header))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def visible(text: str) -> str:
    """`text` with control characters, bare CR and marks that turn its direction as escapes.

    A terminal would obey them, markdown begins a line at a bare CR, and text that is turned round reads as
    what it is not. Tabs and line ends stay.
    """
    return HIDDEN.sub(lambda match: ascii(match[0])[1:-1], text)


def shortened(name: str, most: int = LONGEST_NAME) -> str:
    """`name` with at most so many letters, and a mark in its middle if some are left out."""
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]} … {name[len(name) - half + 2 :]}"


def one_line(text: str) -> str:
    """`text`, such as a name in data, on one line, with what is hidden in it shown."""
    return visible(text.replace("\r\n", " ").replace("\n", " "))


def inert_markdown(text: str) -> str:
    """`text` on one line so that markdown finds no HTML, image, link or heading in it."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    text = text.replace("](", "]\\(").replace("![", "!\\[")
    return ADDRESS.sub(lambda match: f"{match[1]}&#58;" if match[1] else f"{match[2]}&#46;", text)


def _markdown_cell(text: str) -> str:
    return inert_markdown(text).replace("|", "\\|")


def _is_number(cell: str) -> bool:
    return not cell or cell.lstrip("+-")[:1].isdigit() or cell == "baseline"


def with_interval(value: float, interval: Interval, form: str) -> str:
    """A value and its interval as a table's cell, all in the format `form`.

    An interval of no width is left out: it comes of resamples that cannot differ, and says nothing.
    """
    low, high = interval
    if low == high:
        return f"{value:{form}}"
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def ends(numbers: Mapping[str, Any], name: str) -> tuple[Any, Any, Any]:
    """`name` and the ends of its interval, which stand beside it as NAME_low and NAME_high."""
    return numbers[name], numbers[f"{name}_low"], numbers[f"{name}_high"]


def percent(share: float) -> str:
    """A share as readers say it: 95% for 0.95, 97.5% for 0.975."""
    return f"{100 * share:g}%"

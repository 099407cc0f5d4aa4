"""A figure as a value: what is drawn, and the same in words and in tables for who cannot see it.

NAME.plot.json beside NAME.png holds that value, so that a page can draw it again in its own way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from moemerge.artifacts.json_file import read_object
from moemerge.reports.table import Table, shortened

Number = float | None  # None stands for a value that there is not
SUFFIX = ".plot.json"
MOST_TOLD = 12
ROUNDING = 1e-12  # smaller values are shown as 0


@dataclass(frozen=True)
class Line:
    """One curve: `y` over `x`, with an optional band; `reference` lines are grey and dashed."""

    x: Sequence[Number]
    y: Sequence[Number]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None
    reference: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot of a row of plots: named curves over a common axis."""

    title: str
    lines: Mapping[str, Line]
    x_label: str
    y_label: str


@dataclass(frozen=True)
class Curves:
    """Small multiples of named curves; a name has one colour throughout."""

    title: str
    panels: Sequence[Panel]
    log_x: bool = False
    kind: Literal["curves"] = "curves"

    def words(self) -> list[str]:
        """Per panel: every curve's ends, and where it is highest or lowest in between."""
        return [
            f"{shortened(self.title)}. {words}" if self.title not in ("", panel.title) else words
            for panel, words in zip(self.panels, map(_panel_words, self.panels), strict=True)
        ]

    def tables(self) -> list[Table]:
        """One table per panel: a row per x, a column per curve."""
        return [_panel_table(panel) for panel in self.panels]


@dataclass(frozen=True)
class Dots:
    """Value, low and high by name, one plot per group; a dashed line marks the value of `reference`, or 0."""

    title: str
    groups: Mapping[str, Mapping[str, tuple[Number, Number, Number]]]
    x_label: str
    reference: str | None = None
    kind: Literal["dots"] = "dots"

    def words(self) -> list[str]:
        """Per group: every value with its interval."""
        last = f" {shortened(self.reference)} is the reference." if self.reference else ""
        return [
            f"{self.x_label} on {shortened(group)}, with intervals: "
            f"{_listed([f'{shortened(name)} {_interval(*ends)}' for name, ends in rows.items()])}.{last}"
            for group, rows in self.groups.items()
        ]

    def tables(self) -> list[Table]:
        """One table per group."""
        header = ["", self.x_label, "low", "high"]
        return [
            Table(group, header, [[name, *map(_text, values)] for name, values in rows.items()])
            for group, rows in self.groups.items()
        ]


@dataclass(frozen=True)
class HeatMap:
    """A matrix [rows, columns] in colours; `scale`: the values of the first and the last colour (its own)."""

    matrix: Sequence[Sequence[Number]]
    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[str]
    y_ticks: Sequence[str]
    scale: tuple[float, float] | None = None
    kind: Literal["heat_map"] = "heat_map"

    def words(self) -> list[str]:
        """Size of the matrix, and where its lowest and highest values are."""
        size = f"{len(self.y_ticks)} rows ({self.y_label}) by {len(self.x_ticks)} columns ({self.x_label})"
        cells = [
            (value, f"{self.y_label} {shortened(row)}, {self.x_label} {shortened(column)}")
            for row, values in zip(self.y_ticks, self.matrix, strict=True)
            for column, value in zip(self.x_ticks, values, strict=True)
            if value is not None and math.isfinite(value)
        ]
        if not cells:
            return [f"{shortened(self.title)}: {size}, all without a value."]
        (low, where_low), (high, where_high) = min(cells), max(cells)
        ends = f"lowest {_text(low)} at {where_low}, highest {_text(high)} at {where_high}"
        return [f"{shortened(self.title)}: {size}; {ends}."]

    def tables(self) -> list[Table]:
        """The matrix itself."""
        header = [f"{self.y_label} \\ {self.x_label}", *self.x_ticks]
        rows = zip(self.y_ticks, self.matrix, strict=True)
        return [Table(self.title, header, [[name, *map(_text, values)] for name, values in rows])]


Plot = Curves | Dots | HeatMap


@dataclass(frozen=True)
class Figure:
    """A picture on disk, with the plot that it shows; None for one that was not drawn by plotting."""

    file: Path
    plot: Plot | None = None
    name: str = ""

    @classmethod
    def load(cls, file: Path) -> Figure:
        """The picture `file` and what lies beside it. ValueError for links and what is no plot."""
        beside = file.with_suffix(SUFFIX)
        if file.is_symlink() or beside.is_symlink():
            raise ValueError(f"{file.name} is a link: a page would show what is elsewhere")
        if not beside.is_file():
            return cls(file)
        return cls(file, _adapter().validate_python(read_object(beside)))

    def renamed(self, name: str) -> Figure:
        """The same under another title."""
        return replace(self, name=name)

    @property
    def title(self) -> str:
        """The plot's title, or the file's name in words."""
        named = self.name or (self.plot.title if self.plot else "")
        return shortened(named or self.file.stem.replace("_", " "))

    @property
    def alt(self) -> str:
        """The text alternative: what the plot says, with numbers."""
        return " ".join(self.plot.words()) if self.plot else self.title

    @property
    def tables(self) -> list[Table]:
        """All numbers of the plot."""
        return self.plot.tables() if self.plot else []


def on_one_scale(figures: Sequence[Figure]) -> list[Figure]:
    """The same figures with one scale of colours for all heat maps: equal colours are equal values."""
    maps = [figure.plot for figure in figures if isinstance(figure.plot, HeatMap)]
    cells = [value for plot in maps for row in plot.matrix for value in row if value is not None]
    if len(maps) < 2 or not cells:
        return [*figures]
    scale = (min(cells), max(cells))
    return [_scaled(figure, scale) for figure in figures]


def _scaled(figure: Figure, scale: tuple[float, float]) -> Figure:
    if not isinstance(figure.plot, HeatMap):
        return figure
    return replace(figure, plot=replace(figure.plot, scale=scale))


def save_plot(plot: Plot, picture: Path) -> None:
    """Write `plot` beside its picture, every number as it is; what is not finite becomes null."""
    text = json.dumps(_plain(asdict(plot)))
    picture.with_suffix(SUFFIX).write_text(text + "\n", encoding="utf-8")


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Annotated[Plot, Field(discriminator="kind")])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, str | bool) or value is None:
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return float(value) if math.isfinite(value) else None


def _text(value: Number) -> str:
    if value is None or not math.isfinite(value):
        return ""
    value = 0.0 if abs(value) < ROUNDING else value
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.4g}"


def _interval(value: Number, low: Number, high: Number) -> str:
    return f"{_text(value)} ({_text(low)} to {_text(high)})"


def _listed(parts: Sequence[str]) -> str:
    more = [f"and {len(parts) - MOST_TOLD} more"] if len(parts) > MOST_TOLD else []
    return "; ".join([*parts[:MOST_TOLD], *more])


def _points(line: Line) -> list[tuple[float, float]]:
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x is not None and y is not None]
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _panel_words(panel: Panel) -> str:
    all_x = [x for line in panel.lines.values() for x, _ in _points(line)]
    span = f" from {_text(min(all_x))} to {_text(max(all_x))}" if all_x else ""
    name = panel.title or panel.y_label
    what = shortened(name) if panel.y_label.lower() in name.lower() else f"{shortened(name)}: {panel.y_label}"
    lines = [_line_words(shortened(name), _points(line)) for name, line in panel.lines.items()]
    return f"{what} against {panel.x_label}{span}: {_listed(lines)}."


def _line_words(name: str, points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return f"{name} has no values"
    points = [(x, float(_text(y))) for x, y in points]  # what differs by less than is shown is equal
    first, last = points[0][1], points[-1][1]
    peak, dip = max(points, key=lambda point: point[1]), min(points, key=lambda point: point[1])
    words = f"{name} stays at {_text(first)}"
    if peak[1] > dip[1]:
        words = f"{name} goes from {_text(first)} to {_text(last)}"
    if peak[1] > max(first, last):
        words += f", highest {_text(peak[1])} at {_text(peak[0])}"
    if dip[1] < min(first, last):
        words += f", lowest {_text(dip[1])} at {_text(dip[0])}"
    return words


def _panel_table(panel: Panel) -> Table:
    all_x = sorted({x for line in panel.lines.values() for x, _ in _points(line)})
    columns = [dict(_cells(line)) for line in panel.lines.values()]
    rows = [[_text(x), *(column.get(x, "") for column in columns)] for x in all_x]
    return Table(panel.title or panel.y_label, [panel.x_label, *panel.lines], rows)


def _cells(line: Line) -> Iterator[tuple[float, str]]:
    for number, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        if x is not None and line.low is not None and line.high is not None:
            yield x, _interval(y, line.low[number], line.high[number])
        elif x is not None:
            yield x, _text(y)

"""One look for every figure. The only file that imports matplotlib, and only when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours (jfly.uni-koeln.de/color), told apart by colour-blind readers; black comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
MARKERS = "osD^vPX"
CELLS_WITH_NUMBERS = 240


@dataclass(frozen=True)
class Line:
    """One curve: `y` over `x`, with an optional band; `reference` lines are grey and dashed."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    reference: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot of a row of plots: named curves over a common axis."""

    title: str
    lines: Mapping[str, Line]
    x_label: str
    y_label: str


def heat_map(
    matrix: Any,
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[Any] | None = None,
    y_ticks: Sequence[Any] | None = None,
) -> Path:
    """Draw `matrix` [rows, columns] as a PNG with a colour bar; small ones carry their numbers."""
    values = np.asarray(matrix, dtype=float)
    rows, columns = values.shape
    figure, axes = _figure(min(14.0, 2.5 + 0.55 * columns), min(16.0, 1.8 + 0.34 * rows))
    image = axes.imshow(values, aspect="auto", cmap="cividis")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    _ticks(axes.xaxis, columns, x_ticks)
    _ticks(axes.yaxis, rows, y_ticks)
    if values.size <= CELLS_WITH_NUMBERS:
        _write_numbers(axes, values)
    figure.colorbar(image, ax=axes)
    return _save(figure, path)


def lines(
    series: Mapping[str, Line], path: Path, title: str, x_label: str, y_label: str, log_x: bool = False
) -> Path:
    """Draw named curves, with bands where given, as a PNG."""
    return panels([Panel(title, series, x_label, y_label)], path, log_x=log_x)


def panels(
    plots: Sequence[Panel], path: Path, title: str = "", log_x: bool = False, columns: int = 2
) -> Path:
    """Draw small multiples as a PNG: one plot per panel, one legend; a name keeps its colour throughout."""
    columns = min(columns, len(plots))
    rows = math.ceil(len(plots) / columns)
    figure, grid = _figure(1.5 + 4.6 * columns, 0.9 + 3.5 * rows, rows, columns)
    styles = _styles(plots)
    cells = np.atleast_1d(grid).flatten()
    for cell, plot in zip(cells, plots, strict=False):
        _draw(cell, plot, styles, log_x)
    for cell in cells[len(plots) :]:
        cell.remove()
    if title:
        figure.suptitle(title)
    _legend(figure, cells[: len(plots)])
    return _save(figure, path)


def dots(
    groups: Mapping[str, Mapping[str, tuple[float, float, float]]], path: Path, x_label: str, reference: str
) -> Path:
    """Draw value, low and high of every name as a dot with its interval, one plot per group, as a PNG.

    A dashed line marks the value of `reference`.
    """
    most = max(len(rows) for rows in groups.values())
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, grid = _figure(1.0 + 4.2 * columns, rows * (1.0 + 0.36 * most), rows, columns)
    cells = np.atleast_1d(grid).flatten()
    for cell, (title, group) in zip(cells, groups.items(), strict=False):
        _draw_dots(cell, title, group, x_label)
        cell.axvline(group[reference][0], color=GREY, linestyle="--", linewidth=1)
    for cell in cells[len(groups) :]:
        cell.remove()
    return _save(figure, path)


def effects(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]], path: Path, x_label: str
) -> Path:
    """Draw value, low and high per panel, row and name, names side by side in their colours, as a PNG.

    A dashed line marks zero; the panels share their axis.
    """
    names = list(dict.fromkeys(name for rows in panels.values() for row in rows.values() for name in row))
    most = max(len(rows) for rows in panels.values())
    height = 0.9 + most * (0.25 + 0.16 * len(names))
    figure, grid = _figure(2.0 + 4.2 * len(panels), height + 0.5, 1, len(panels))
    cells = np.atleast_1d(grid).flatten()
    for cell in cells[1:]:
        cell.sharex(cells[0])
    for cell, (title, rows) in zip(cells, panels.items(), strict=True):
        cell.axvline(0, color=GREY, linestyle="--", linewidth=1)
        for number, name in enumerate(names):
            places = [place + 0.7 * ((number + 0.5) / len(names) - 0.5) for place in range(len(rows))]
            _draw_effects(cell, name, number, places, [row.get(name) for row in rows.values()])
        cell.set(title=title, xlabel=x_label, ylim=(len(rows) - 0.5, -0.5))
        cell.set_yticks(range(len(rows)), list(rows))
        _tidy(cell)
    _legend(figure, cells)
    return _save(figure, path)


def _draw_effects(axes: Any, name: str, number: int, places: list[float], values: list[Any]) -> None:
    known = [(place, *value) for place, value in zip(places, values, strict=True) if value is not None]
    place, value, low, high = zip(*known, strict=True) if known else [()] * 4
    style = {"color": COLOURS[number % len(COLOURS)]}
    axes.hlines(place, low, high, linewidth=2, **style)
    axes.plot(value, place, MARKERS[number % len(MARKERS)], markersize=5, label=name, **style)


def _draw_dots(axes: Any, title: str, group: Mapping[str, tuple[float, float, float]], x_label: str) -> None:
    for place, (value, low, high) in enumerate(group.values()):
        axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=2)
        axes.plot([value], [place], "o", color=COLOURS[0], markersize=6)
    axes.set(title=title, xlabel=x_label, ylim=(len(group) - 0.5, -0.5))
    axes.set_yticks(range(len(group)), list(group))
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _styles(plots: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(name for plot in plots for name in plot.lines)
    grey = {name for plot in plots for name, line in plot.lines.items() if line.reference}
    dashes = ["--", ":", "-."]
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(n for n in names if n in grey):
        found[name] = {"color": GREY, "linestyle": dashes[number % 3], "linewidth": 1.2}
    for number, name in enumerate(n for n in names if n not in grey):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        found[name] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.6}
    return found


def _draw(axes: Any, plot: Panel, styles: dict[str, dict[str, Any]], log_x: bool) -> None:
    for name, line in plot.lines.items():
        axes.plot(line.x, line.y, label=name, **styles[name])
        if line.low is not None and line.high is not None:
            axes.fill_between(
                line.x, line.low, line.high, color=styles[name]["color"], alpha=0.13, linewidth=0
            )
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    if log_x:
        axes.set_xscale("log", base=2)
    _tidy(axes)


def _legend(figure: Any, cells: Any) -> None:
    handles: dict[str, Any] = {}
    for axes in cells:
        found, names = axes.get_legend_handles_labels()
        handles |= {name: handle for name, handle in zip(names, found, strict=True) if name not in handles}
    if handles:
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False
        )


def _ticks(axis: Any, count: int, names: Sequence[Any] | None) -> None:
    step = max(1, math.ceil(count / 32))
    places = list(range(0, count, step))
    axis.set_ticks(places, [str(names[p] if names is not None else p) for p in places])


def _write_numbers(axes: Any, values: Any) -> None:
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > middle else "white"
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)


def _save(figure: Any, path: Path) -> Path:
    # Without matplotlib's version in its metadata the same figure gives the same bytes.
    figure.savefig(path, metadata={"Software": None})
    return path

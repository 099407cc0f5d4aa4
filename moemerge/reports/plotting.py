"""One look for every figure. The only file that imports matplotlib, and only when something is drawn."""

from __future__ import annotations

import io
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from moemerge.reports.figures import Curves, Dots, HeatMap, Line, Panel, Plot, save_plot
from moemerge.reports.table import shortened

# Okabe and Ito's colours (jfly.uni-koeln.de/color), which differ for colour-blind readers; black comes last.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111")
GREY, GRID, INK = "#777777", "#dddddd", "#24292f"
MARKERS = "osD^vPX"
STROKES: tuple[Any, ...] = ("-", (0, (5, 1)), (0, (1, 1)))  # of the first seven lines, the next seven, ...
CELLS_WITH_NUMBERS, MOST_MARKERS = 240, 40
# What these become on a dark page.
ON_DARK = {
    **{"#0072b2": "#4c9be8", "#d55e00": "#f0793a", "#009e73": "#2fbf94", "#56b4e9": "#9bd7f7"},
    **{"#111111": "#f2f2f2", GREY: "#9aa0a6", GRID: "#3a4048", INK: "#d5dae0"},
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
SVG_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moemerge",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **{"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8.5},
}
SVG_WIDTH = 4.3
LONGEST_NAME = 32
# Characters of SVGs that are kept, since the page of a run shows what its stages' pages have shown.
KEPT_SVGS = 2**24
_svgs_by_plot: OrderedDict[str, list[str]] = OrderedDict()
UNDRAWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

P = ParamSpec("P")
R = TypeVar("R")


def _plainly(draw: Callable[P, R]) -> Callable[P, R]:
    """Dollars in names are dollars, not formulas."""

    @wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            return draw(*arguments, **options)

    return drawn


@_plainly
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
    names = [
        [str(name) for name in (range(count) if ticks is None else ticks)]
        for count, ticks in zip(values.shape, (y_ticks, x_ticks), strict=True)
    ]
    plot = HeatMap(values.tolist(), title.replace("\n", " "), x_label, y_label, names[1], names[0])
    rows, columns = values.shape
    figure, axes = _figure(min(14.0, 2.5 + 0.55 * columns), min(16.0, 1.8 + 0.34 * rows))
    figure.colorbar(_draw_heat_map(axes, plot, title), ax=axes)
    return _save(figure, path, plot)


def lines(
    series: Mapping[str, Line], path: Path, title: str, x_label: str, y_label: str, log_x: bool = False
) -> Path:
    """Draw named curves, with bands where given, as a PNG."""
    return panels([Panel(title, series, x_label, y_label)], path, log_x=log_x)


@_plainly
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
        figure.suptitle(_drawn(shortened(title)))
    _legend(figure, cells[: len(plots)])
    name = title or (plots[0].title if len(plots) == 1 else "")
    return _save(figure, path, Curves(name, plots, log_x))


@_plainly
def dots(
    groups: Mapping[str, Mapping[str, tuple[float, float, float]]],
    path: Path,
    x_label: str,
    reference: str | None = None,
) -> Path:
    """Draw value, low and high of every name as a dot with its interval, one plot per group, as a PNG.

    A dashed line marks the value of `reference`, or zero without one.
    """
    plot = Dots(x_label[:1].upper() + x_label[1:], groups, x_label, reference)
    most = max(len(rows) for rows in groups.values())
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, grid = _figure(1.0 + 4.2 * columns, rows * (1.0 + 0.36 * most), rows, columns)
    cells = np.atleast_1d(grid).flatten()
    for cell, title in zip(cells, groups, strict=False):
        _draw_dots(cell, title, plot)
    for cell in cells[len(groups) :]:
        cell.remove()
    return _save(figure, path, plot)


def svgs(plot: Plot) -> list[str]:
    """`plot` as SVG images, one per panel: as wide as a phone, no background, following light and dark.

    The same plot is drawn once: the last ones' images are kept.
    """
    key = sha256(json.dumps(asdict(plot), default=lambda array: array.tolist()).encode()).hexdigest()
    images = _svgs_by_plot.pop(key, None) or _drawn_svgs(plot)
    _svgs_by_plot[key] = images
    while sum(len(image) for kept in _svgs_by_plot.values() for image in kept) > KEPT_SVGS:
        _svgs_by_plot.popitem(last=False)
    return list(images)


@_plainly
def _drawn_svgs(plot: Plot) -> list[str]:
    import matplotlib

    with matplotlib.rc_context(SVG_STYLE):
        return [_svg(figure) for figure in _narrow_figures(plot)]


def _narrow_figures(plot: Plot) -> Iterator[Any]:
    """One figure per panel, group or matrix."""
    if isinstance(plot, HeatMap):
        yield _narrow_heat_map(plot)
    elif isinstance(plot, Dots):
        for title, rows in plot.groups.items():
            figure, axes = _figure(SVG_WIDTH, 0.9 + 0.3 * len(rows))
            _draw_dots(axes, title, plot)
            yield figure
    else:
        styles = _styles(plot.panels)
        for panel in plot.panels:
            figure, axes = _figure(SVG_WIDTH, 2.8 + 0.19 * math.ceil(len(panel.lines) / 3))
            _draw(axes, panel, styles, plot.log_x)
            _legend(figure, [axes], 3)
            yield figure


def _narrow_heat_map(plot: HeatMap) -> Any:
    rows, columns = len(plot.y_ticks), len(plot.x_ticks)
    figure, axes = _figure(max(3.2, 1.2 + 0.46 * columns), min(16.0, 1.1 + 0.3 * rows))
    image = _draw_heat_map(axes, plot, "")
    if rows * columns > CELLS_WITH_NUMBERS:
        figure.colorbar(image, ax=axes)
    return figure


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    _lay_out(figure)
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue())


def _themed(svg: str) -> str:
    """The SVG with its colours as variables that a dark page changes, and the reader's own font."""
    names = {colour: f"--c{number}" for number, colour in enumerate(ON_DARK)}
    light = ";".join(f"{names[colour]}:{colour}" for colour in ON_DARK)
    dark = ";".join(f"{names[colour]}:{other}" for colour, other in ON_DARK.items())
    style = (
        f"<style>svg{{{light}}}text{{font-family:{FONT}!important}}"
        f"@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    )
    colours = re.compile(r"(?<=[:\s])(" + "|".join(ON_DARK) + r")(?=[;\"])")
    body = colours.sub(lambda match: f"var({names[match.group(1)]})", svg[svg.index("<svg") :])
    root, rest = body.split(">", 1)
    return f"{root}>{style}{rest}"


def _draw_heat_map(axes: Any, plot: HeatMap, title: str) -> Any:
    values = np.asarray(plot.matrix, dtype=float)
    lowest, highest = plot.scale or (None, None)
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=lowest, vmax=highest)
    axes.set(title=_drawn(shortened(title)), xlabel=_drawn(plot.x_label), ylabel=_drawn(plot.y_label))
    _ticks(axes.xaxis, plot.x_ticks)
    _ticks(axes.yaxis, plot.y_ticks)
    if values.size <= CELLS_WITH_NUMBERS:
        _write_numbers(axes, values, sum(image.get_clim()) / 2)
    return image


def _draw_dots(axes: Any, title: str, plot: Dots) -> None:
    group = {name: np.asarray(ends, dtype=float) for name, ends in plot.groups[title].items()}
    for height, (value, low, high) in enumerate(group.values()):
        axes.plot([low, high], [height, height], color=COLOURS[0], linewidth=2)
        axes.plot([value], [height], "o", color=COLOURS[0], markersize=6)
    axes.set(title=_drawn(shortened(title)), xlabel=_drawn(plot.x_label), ylim=(len(group) - 0.5, -0.5))
    axes.set_yticks(range(len(group)), [_short(name) for name in group])
    mark = group[plot.reference][0] if plot.reference else 0
    axes.axvline(mark, color=GREY, linestyle="--", linewidth=1)
    _tidy(axes)


def _drawn(text: str) -> str:
    """Without what neither fonts nor XML have."""
    return UNDRAWABLE.sub("\ufffd", text)


def _short(name: str) -> str:
    return _drawn(shortened(name, LONGEST_NAME))


def _tidy(axes: Any) -> None:
    axes.grid(color=GRID, linewidth=0.6)
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
    styles: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(n for n in names if n in grey):
        styles[name] = {"color": GREY, "linestyle": dashes[number % 3], "linewidth": 1.2}
    for number, name in enumerate(n for n in names if n not in grey):
        round, position = divmod(number, len(COLOURS))
        marker, stroke = MARKERS[(position + 2 * round) % len(MARKERS)], STROKES[round % len(STROKES)]
        look = {"color": COLOURS[position], "marker": marker, "linestyle": stroke}
        styles[name] = {**look, "markersize": 4, "linewidth": 1.6}
    return styles


def _draw(axes: Any, plot: Panel, styles: dict[str, dict[str, Any]], log_x: bool) -> None:
    for name, line in plot.lines.items():
        x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
        marks = {} if len(x) <= MOST_MARKERS else {"marker": ""}
        axes.plot(x, y, label=_short(name), **{**styles[name], **marks})
        if line.low is not None and line.high is not None:
            low, high = np.asarray(line.low, dtype=float), np.asarray(line.high, dtype=float)
            axes.fill_between(x, low, high, color=styles[name]["color"], alpha=0.13, linewidth=0)
    title, x_label, y_label = (_drawn(shortened(text)) for text in (plot.title, plot.x_label, plot.y_label))
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    _tidy(axes)


def _legend(figure: Any, cells: Any, columns: int = 4) -> None:
    handles: dict[str, Any] = {}
    for axes in cells:
        drawn, names = axes.get_legend_handles_labels()
        handles |= {name: handle for name, handle in zip(names, drawn, strict=True) if name not in handles}
    if handles:
        columns = min(columns, len(handles))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)


def _ticks(axis: Any, names: Sequence[str]) -> None:
    shown = list(range(0, len(names), max(1, math.ceil(len(names) / 32))))
    axis.set_ticks(shown, [_short(names[number]) for number in shown])


def _write_numbers(axes: Any, values: Any, middle: float) -> None:
    """Each cell's number; white below the middle of the scale, where colours are dark."""
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > middle else "white"
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)


def _lay_out(figure: Any) -> None:
    """What savefig would do; as long as there is a layout engine, even "none", it draws everything twice."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)


def _save(figure: Any, path: Path, plot: Plot) -> Path:
    _lay_out(figure)
    # Without matplotlib's version in its metadata the same figure gives the same bytes.
    figure.savefig(path, metadata={"Software": None})
    save_plot(plot, path)
    return path

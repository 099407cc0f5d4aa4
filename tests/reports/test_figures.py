"""Figures as values: what is drawn is kept, and told in words and tables."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moemerge.reports import plotting
from moemerge.reports.figures import Curves, Dots, Figure, HeatMap, Line, Panel, on_one_scale
from moemerge.reports.table import Table, shortened

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def curves() -> Curves:
    """One curve that rises and falls, one that falls and rises with a gap, one that stays, one of nothing."""
    x = [0.0, 1.0, 2.0, 3.0]
    lines = {
        "hill": Line(x, [1.0, 4.0, 3.0, 2.0], low=[0.5, 3.5, 2.5, 1.5], high=[1.5, 4.5, 3.5, 2.5]),
        "dale": Line(x, [1.0, math.nan, 0.25, 2.0]),
        "flat": Line(x, [1.0] * 4, reference=True),
        "none": Line([], []),
    }
    return Curves("Best of n", [Panel("gold score", lines, "KL (nats)", "gold score")])


def test_words_tell_ends_and_extremes(curves: Curves) -> None:
    assert curves.words() == [
        "Best of n. gold score against KL (nats) from 0 to 3: hill goes from 1 to 2, highest 4 at 1; "
        "dale goes from 1 to 2, lowest 0.25 at 2; flat stays at 1; none has no values."
    ]
    groups = {"test": {"a": (0.8125, 0.75, 0.875), "b": (0.5, None, None)}}
    assert Dots("accuracy", groups, "accuracy", "a").words() == [
        "accuracy on test, with intervals: a 0.8125 (0.75 to 0.875); b 0.5 ( to ). a is the reference."
    ]
    matrix = HeatMap([[0.25, math.nan], [0.75, 0.5]], "Gate mass", "expert", "layer", ["0", "1"], ["4", "9"])
    assert matrix.words() == [
        "Gate mass: 2 rows (layer) by 2 columns (expert); lowest 0.25 at layer 4, expert 0, "
        "highest 0.75 at layer 9, expert 0."
    ]


def test_rounding_is_not_told_as_a_change() -> None:
    lines = {
        "flat": Line([0.0, 1.0, 2.0], [0.3, 0.1 + 0.2, 0.3 - 1e-16]),
        "start": Line([0.0, 1.0, 2.0], [2e-17, 0.5, 0.5 + 1e-15]),
    }
    assert Curves("", [Panel("gold", lines, "step", "gold")]).words() == [
        "gold against step from 0 to 2: flat stays at 0.3; start goes from 0 to 0.5."
    ]


def test_tables_hold_every_number(curves: Curves) -> None:
    (table,) = curves.tables()
    assert table.header == ["KL (nats)", "hill", "dale", "flat", "none"]
    assert table.rows[1] == ["1", "4 (3.5 to 4.5)", "", "1", ""]
    assert [row[2] for row in table.rows] == ["1", "", "0.25", "2"]
    (matrix,) = HeatMap([[0.25, 0.123456]], "m", "expert", "layer", ["0", "1"], ["4"]).tables()
    assert matrix.rows == [["4", "0.25", "0.1235"]]


def test_a_figure_on_disk_is_what_was_drawn(tmp_path: Path, curves: Curves) -> None:
    plotting.panels(curves.panels, tmp_path / "c.png", "Best of n")
    plotting.dots({"t": {"a": (np.float32(0.5), 0, 1)}}, tmp_path / "d.png", "accuracy", "a")
    plotting.heat_map(np.array([[0.5, math.nan]]), tmp_path / "h.png", "two\nlines", "x", "y", y_ticks=[7])
    found = Figure.load(tmp_path / "c.png")
    assert found.title == "Best of n" and found.alt == curves.words()[0]
    assert found.tables == curves.tables()
    assert Figure.load(tmp_path / "d.png").plot == Dots(
        "Accuracy", {"t": {"a": (0.5, 0, 1)}}, "accuracy", "a"
    )
    drawn = HeatMap([[0.5, None]], "two lines", "x", "y", ["0", "1"], ["7"])
    assert Figure.load(tmp_path / "h.png").plot == drawn
    for path in tmp_path.glob("*.plot.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_foreign_picture_is_told_by_its_name(tmp_path: Path) -> None:
    found = Figure.load(tmp_path / "loss_by_step.png")
    assert (found.title, found.alt, found.tables) == ("loss by step", "loss by step", [])


def test_svgs_are_one_per_panel_with_text_and_two_themes(curves: Curves) -> None:
    twice = Curves("t", [*curves.panels, Panel("other", curves.panels[0].lines, "x", "y")])
    images = plotting.svgs(twice)
    assert len(images) == len(twice.words()) == 2 and images == plotting._drawn_svgs(twice)
    for image, title in zip(images, ("gold score", "other"), strict=True):
        root = ElementTree.fromstring(image)
        texts = {"".join(text.itertext()) for text in root.iter(f"{SVG}text")}
        assert {title, "hill", "dale", "flat"} <= texts
        assert "prefers-color-scheme:dark" in image
        for colour in (plotting.INK, plotting.COLOURS[0], plotting.GRID):
            assert image.count(colour) == 1, "once, where the theme defines it"


def test_the_same_plot_is_drawn_once(curves: Curves, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plotting, "_svg", lambda figure: drawn.append(figure) or f"svg {len(drawn)}")
    monkeypatch.setattr(plotting, "_svgs_by_plot", OrderedDict())
    dots = [Dots("t", {"g": {"a": (value, 0.0, 1.0)}}, "x") for value in (0.5, math.nan, math.inf, None)]
    kept = [plotting.svgs(plot) for plot in (curves, *dots, replace(curves, log_x=True))]
    assert len({image for images in kept for image in images}) == len(drawn) == 6, "each is its own"
    plotting.svgs(curves).clear()
    arrays = HeatMap(np.array([[0.5]]), "", "", "", ["a"], ["b"])
    assert [plotting.svgs(plot) for plot in (curves, *dots)] == kept[:5]
    assert plotting.svgs(arrays) == plotting.svgs(arrays) == ["svg 7"]
    monkeypatch.setattr(plotting, "KEPT_SVGS", 5)
    assert plotting.svgs(dots[0]) == kept[1] and len(plotting._svgs_by_plot) == 1
    assert plotting.svgs(curves) == ["svg 8"], "what is kept has a bound"


def test_hostile_names_are_text_in_pictures(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "$\\frac{1", "a\x00\x1b\ud800b", "]]>", "x" * 500, "评分 🎉"]
    lines = {name: Line([0, 1], [number, 1]) for number, name in enumerate(names)}
    plotting.panels([Panel("$x_$ <b>", lines, "x & y", "y")], tmp_path / "p.png", "$$")
    figure = Figure.load(tmp_path / "p.png")
    assert figure.plot is not None
    (image,) = plotting.svgs(figure.plot)
    root = ElementTree.fromstring(image)
    texts = {"".join(text.itertext()) for text in root.iter(f"{SVG}text")}
    assert {names[0], names[1], "$x_$ <b>", "x & y", "a\ufffd\ufffd\ufffdb"} <= texts
    assert not list(root.iter(f"{SVG}script"))


def test_long_names_are_shortened_wherever_they_are_shown(tmp_path: Path) -> None:
    """In words, tables and pictures; what is kept of the plot has them whole. Texts in cells stay."""
    long, most = "s" * 5000, 1000
    line = Line([0.0, 1.0], [0.0, 1.0])
    plots = [
        Curves(long, [Panel(long, {long: line, "a": line}, "x", "y")]),
        Dots("accuracy", {long: {long: (0.5, 0.4, 0.6)}}, "accuracy", long),
        HeatMap([[1.0, 2.0]], long, "x", "y", [long, "b"], [long]),
    ]
    for plot in plots:
        (words,) = plot.words()
        (table,) = plot.tables()
        assert len(words) < most and "s … s" in words
        assert max(map(len, [table.title, *table.header, *table.rows[0]])) <= 200
        (image,) = plotting.svgs(plot)
        texts = ["".join(t.itertext()) for t in ElementTree.fromstring(image).iter(f"{SVG}text")]
        assert max(map(len, texts)) <= 100 and any("s … s" in text for text in texts)
    table = Table(long, ["model", long], [["a" + long, long], ["b", "1"]])
    assert len(table.header[1]) == len(table.rows[0][0]) == 100 and table.rows[0][1] == long
    assert table.rows[0][0].startswith("as") and shortened("short") == "short"


def test_heat_maps_side_by_side_have_one_scale(tmp_path: Path) -> None:
    """A value that several maps show has one colour in all of them."""
    files = {"a": [[0.1, 0.5]], "b": [[0.5, 0.9]]}
    for name, matrix in files.items():
        plotting.heat_map(matrix, tmp_path / f"{name}.png", name, "x", "y")
    alone = [Figure.load(tmp_path / f"{name}.png") for name in files]
    lines = Figure(tmp_path / "c.png", Curves("c", []))
    first, second, other = on_one_scale([*alone, lines])
    assert first.plot.scale == second.plot.scale == (0.1, 0.9) and other == lines  # type: ignore[union-attr]
    assert on_one_scale(alone[:1]) == alone[:1] and alone[0].plot.scale is None  # type: ignore[union-attr]
    (drawn,) = plotting.svgs(first.plot)  # type: ignore[arg-type]
    assert drawn != plotting.svgs(alone[0].plot)[0]  # type: ignore[arg-type]

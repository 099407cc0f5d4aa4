"""Pages: everything in one file, all text inert, markup that is whole; the same in markdown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from html_page import check_page

from moemerge.reports import plotting
from moemerge.reports.figures import Figure, Line
from moemerge.reports.heat_text import MOST_WORDS, HeatText
from moemerge.reports.html import Section, write_report
from moemerge.reports.provenance import provenance_section
from moemerge.reports.table import HIDDEN, Table, visible

EVIL = '</td></table><script>alert("1")</script><img src=x onerror=alert(1)> & "\' {{ 7 * 7 }}'


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which every text is hostile, with a drawn figure and a foreign one; its folder."""
    tmp_path = tmp_path_factory.mktemp("report")
    plotting.lines({EVIL: Line([0, 1], [1, 2])}, tmp_path / "own.png", EVIL, EVIL, EVIL)
    figures = [Figure.load(tmp_path / "own.png")]
    (tmp_path / "a b.png").write_bytes((tmp_path / "own.png").read_bytes())
    figures.append(Figure.load(tmp_path / "a b.png"))
    table = Table(
        EVIL, [EVIL, "n"], [[EVIL, "1"], ["![x](http://outside/x.png) [y](javascript:1)", "2"]], EVIL
    )
    heat = HeatText(EVIL, [(EVIL, 0.9), (EVIL, 0.0), (f" *{EVIL}", -0.2)], 1.0, EVIL)
    sections = [Section(EVIL, [EVIL], [table], figures, [table], EVIL, [heat]), Section("Empty")]
    write_report(tmp_path, EVIL, sections)
    return tmp_path


def test_hostile_text_is_text(report: Path) -> None:
    outline = check_page((report / "report.html").read_text())
    for tag in ("title", "h1", "h2", "h3", "h4", "p", "span", "th", "a", "summary"):
        assert EVIL in "".join(outline.text[tag]), tag
    assert len(outline.all("img")) == 2 and {one["alt"] for one in outline.all("img")} > {"a b"}


def test_hostile_text_is_text_in_markdown(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert "<" not in re.sub(r"\]\(<a b\.png>\)", "", text)
    assert re.findall(r"(?<!\\)!\[", text) == ["!["] * 2, "the two figures"
    assert re.findall(r"\]\(([^)]*)\)", text) == ["own.png", "<a b.png>"]


def test_words_are_coloured_by_their_numbers(tmp_path: Path) -> None:
    """Shades by fourths of the scale, what has none joined; the rest of a long text is counted."""
    words = [("a", 0.12), (" b", -0.1), ("\n", 0.5), (" c", 1.7), (" d", -0.25)]
    heat = HeatText("t", words, 1.0)
    shades = [(shade.text, shade.style, shade.title) for shade in heat.shades]
    assert shades == [
        ("a b", "", ""), ("\n", "up2", "+0.50"), (" c", "up4", "+1.70"), (" d", "down1", "-0.25")
    ]  # fmt: skip
    assert "a b  **c** (+1.70) d" in heat.markdown()
    page = check_page(write_report(tmp_path, "t", [Section("s", texts=[heat])]).read_text())
    assert [(span["class"], span["title"]) for span in page.all("span")] == [
        ("up2", "+0.50"), ("up4", "+1.70"), ("down1", "-0.25")
    ]  # fmt: skip
    assert HeatText("t", [("w", 1.0)] * (MOST_WORDS + 7), 0.0).shades[-1].text == " … (7 words more)"


TURNED = "a\u202eb\x1b[2J\rc\x9b\u2066d\n# Heading\r\r[x]: http://outside"


def test_hidden_characters_are_shown_as_escapes(tmp_path: Path) -> None:
    shown = "a\\u202eb\\x1b[2J\\rc\\x9b\\u2066d"
    assert visible(TURNED).startswith(shown + "\n") and visible("ä\tb\r\nc\n") == "ä\tb\r\nc\n"
    table = Table(TURNED, [TURNED, "n"], [[TURNED, "1"]], TURNED)
    assert len(table.aligned().splitlines()) == 3 and shown in table.aligned()
    page = write_report(tmp_path, TURNED, [Section(TURNED, [TURNED], [table], lead=TURNED)])
    for text in (page.read_bytes().decode(), page.with_suffix(".md").read_bytes().decode()):
        assert shown in text and not HIDDEN.search(text)
    markdown = page.with_suffix(".md").read_text()
    assert "\n# Heading" not in markdown and "http://" not in markdown and "http&#58;//" in markdown


def test_the_page_holds_tables_and_figures_as_given(tmp_path: Path) -> None:
    tall = Table(
        "Numbers", ["model", "accuracy", "why"], [["a", "0.5", "x" * 61], ["b", "0.25", "y"]], "A note."
    )
    page = write_report(tmp_path, "Title", [Section("One", ["Words."], [tall], lead="Lead.")])
    outline = check_page(page.read_text())
    assert page == tmp_path / "report.html"
    heads = [attributes for attributes in outline.all("th") if attributes["scope"] == "col"]
    assert [one.get("class") for one in heads] == [None, "number", None]
    assert [one.get("class") for one in outline.all("td")] == ["number", "prose"] * 2
    assert outline.text["td"] == ["0.5", "x" * 61, "0.25", "y"]
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Title\n\n## One\n\n**Lead.**\n\nWords.\n\n" + tall.markdown())


def test_tables_without_rows_are_shown(tmp_path: Path) -> None:
    page = write_report(tmp_path, "t", [Section("s", tables=[Table("none", ["a", "b"], [])])])
    assert len(check_page(page.read_text()).all("th")) == 2


def test_provenance_tells_checksums_and_settings_but_no_paths() -> None:
    digest = "0123456789abcdef" * 4
    manifest = {
        "inputs": {
            "model": {"path": "/home/me/rm", "sha256": digest},
            "pairs": {"test": {"hub": "owner/data:test", "sha256": "owner/data:test"}},
        },
        "options": {
            "model": "/home/me/rm",
            "pairs": {"test": "owner/data:test"},
            "output": "/home/me/out",
            "seed": 3,
            "search": {"learning_rate": [0.1, 0.2]},
            "fields": {},
            "baseline": None,
        },
        "versions": {"python": "3.11", "torch": "2.13"},
        "hardware": {"machine": "x86_64", "cpus": 2, "system": "Linux"},
        "started": "2026-01-02T03:04:05+00:00",
    }
    section = provenance_section({"one": manifest, "two": manifest})
    assert section.text == ["Made with python 3.11, torch 2.13; Linux on x86_64, 2 CPUs; 2026-01-02."]
    rows = [["model", "rm", digest[:16]], ["pairs test", "owner/data:test", ""]]
    inputs, given = section.folded
    assert inputs.rows == [[step, *row] for step in ("one", "two") for row in rows] and not section.tables
    settings = [["seed", "3"], ["search.learning_rate", "0.1, 0.2"]]
    assert given.rows == [[step, *row] for step in ("one", "two") for row in settings]

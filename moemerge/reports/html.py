"""Reports as pages: one HTML file that holds everything it shows, and the same as markdown with PNGs.

Every text is escaped, so whatever a model's name or an answer says stays text. The page runs no script and,
by its Content-Security-Policy, loads nothing.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from moemerge.artifacts.disk import write_whole
from moemerge.artifacts.environment import package_version
from moemerge.reports import plotting
from moemerge.reports.figures import Figure
from moemerge.reports.heat_text import HeatText
from moemerge.reports.table import Table, inert_markdown, visible

TEMPLATE = "page.html.jinja"
SVG_SIZE = re.compile(r'width="([\d.]+)pt" height="([\d.]+)pt"')
PIXELS_PER_POINT = 4 / 3
WIDE = 560


@dataclass(frozen=True)
class Section:
    """A part of a report, shown in this order: a sentence to remember, paragraphs, tables, texts, figures.

    All text is plain text. `folded` tables are there for who asks. pictures_first: before the tables;
    closing: paragraphs below both.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    folded: Sequence[Table] = ()
    lead: str = ""
    texts: Sequence[HeatText] = ()
    pictures_first: bool = False
    closing: Sequence[str] = ()


@dataclass(frozen=True)
class Image:
    """What an <img> needs; sizes in CSS pixels."""

    source: str
    alt: str
    width: int
    height: int

    @property
    def wide(self) -> bool:
        """Whether it would be too small to read on a phone, and scrolls there instead."""
        return self.width > WIDE


def write_report(folder: Path, title: str, sections: Sequence[Section], name: str = "report") -> Path:
    """Write NAME.html and NAME.md into `folder`; returns the page. Markdown shows the PNGs where they are."""
    write_markdown(folder / f"{name}.md", title, sections)
    return write_page(folder / f"{name}.html", title, sections)


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write one self-contained HTML file; the first section is what is seen first."""
    loader = PackageLoader("moemerge.reports", "")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=loader,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    page = environment.get_template(TEMPLATE).render(
        title=title, sections=sections, version=package_version(), images=lambda f: list(_images(f))
    )
    write_whole(path, page, errors="replace")
    return path


def write_markdown(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write the same as GitHub markdown, whose pictures are the figures' files."""
    parts = [f"# {inert_markdown(title)}\n"]
    for section in sections:
        parts.append(f"## {inert_markdown(section.title)}\n")
        parts += [f"**{inert_markdown(section.lead)}**\n"] if section.lead else []
        parts += [inert_markdown(paragraph) + "\n" for paragraph in section.text]
        tables = [table.markdown() for table in section.tables]
        tables += [text.markdown() for text in section.texts]
        figures = [_markdown_figure(figure, path.parent) for figure in section.figures]
        parts += [*figures, *tables] if section.pictures_first else [*tables, *figures]
        parts += [inert_markdown(paragraph) + "\n" for paragraph in section.closing]
        parts += [table.markdown() for table in section.folded]
    write_whole(path, "\n".join(parts), errors="replace")
    return path


def _markdown_figure(figure: Figure, folder: Path) -> str:
    alt = inert_markdown(" ".join(figure.alt.split())).replace("[", "\\[").replace("]", "\\]")
    address = Path(os.path.relpath(figure.file, folder)).as_posix()
    return f"![{alt}](<{address}>)\n" if " " in address else f"![{alt}]({address})\n"


def _images(figure: Figure) -> Iterator[Image]:
    """One image per panel of the plot; the PNG as it is when there is nothing else."""
    if figure.plot is None:
        width, height = _png_size(figure.file)
        yield Image(_data("image/png", figure.file.read_bytes()), figure.alt, width, height)
        return
    for svg, alt in zip(plotting.svgs(figure.plot), figure.plot.words(), strict=True):
        size = SVG_SIZE.search(svg)
        assert size is not None, "matplotlib states the size of every SVG"
        width, height = (round(float(points) * PIXELS_PER_POINT) for points in size.groups())
        yield Image(_data("image/svg+xml", svg.encode(errors="replace")), alt, width, height)


def _png_size(file: Path) -> tuple[int, int]:
    """Half the pixels of a PNG, which are drawn for dense screens."""
    head = file.read_bytes()[:24]
    return int.from_bytes(head[16:20], "big") // 2, int.from_bytes(head[20:24], "big") // 2


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

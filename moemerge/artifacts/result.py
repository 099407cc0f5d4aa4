"""What a stage gives back: the folder that it wrote, with its numbers at hand."""

from __future__ import annotations

import base64
import html
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.artifacts.manifest import read_manifest, written_by_stages
from moemerge.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    import pandas

    Folder = Path
else:
    Folder = type(Path())  # before Python 3.12 only the system's own kind of path can be inherited from

Row = Mapping[str, Any]
RowsOf = Callable[[Path], Iterable[Row]]
SHOWN = 30  # rows that a notebook shows


def numbers_in(values: Mapping[str, Any], before: str = "") -> Iterator[Row]:
    """Every single value of nested results with its dotted name, a row each."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers_in(value, f"{before}{name}.")
        elif isinstance(value, bool | int | float | str):
            yield {"name": f"{before}{name}", "value": value}


def results_of(folder: Path) -> Iterator[Row]:
    """A stage's results, a row each: the table of a stage that has none of its own."""
    return numbers_in(read_manifest(folder)["results"])


class Result(Folder):
    """The folder that a stage wrote, as a path like any other, and what came of the stage.

    Numbers and rows are read from the folder whenever they are asked for. They raise ArtifactError for a
    folder that no stage wrote, that is gone, or that is of another version.
    """

    _rows: RowsOf = staticmethod(results_of)

    @classmethod
    def of(cls, folder: Path, rows: RowsOf) -> Result:
        """What a stage wrote into `folder`; `rows` reads its table."""
        result = cls(folder)
        result._rows = rows
        return result

    @property
    def path(self) -> Path:
        """The folder as a plain path."""
        return Path(self)

    @property
    def manifest(self) -> dict[str, Any]:
        """What the folder says of itself: stage, options, inputs, results, versions."""
        return read_manifest(self)

    @property
    def numbers(self) -> dict[str, Any]:
        """The stage's results, by name."""
        return dict(self.manifest["results"])

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the stage's table."""
        with written_by_stages(f"{self} cannot be shown", "run the stage that wrote it again"):
            return [dict(row) for row in self._rows(Path(self))]

    def table(self) -> pandas.DataFrame:
        """The rows as a DataFrame. Raises UnsupportedError where pandas is not installed."""
        return data_frame(self.rows())

    def with_segments(self, *segments: Any) -> Path:
        """What is inside of the folder is a plain path."""
        return Path(*segments)

    if sys.version_info < (3, 12):  # which do not ask with_segments

        @classmethod
        def _from_parsed_parts(cls, *parts: Any) -> Path:
            return Folder._from_parsed_parts(*parts)  # type: ignore[attr-defined,no-any-return]

    def _repr_html_(self) -> str | None:
        """What a notebook shows; of a folder without results its plain text."""
        try:
            stage, rows = self.manifest["stage"], self.rows()
        except ArtifactError:
            return None
        return f"<p><b>{html.escape(stage)}</b> {html.escape(str(self))}</p>{html_table(rows)}"


def data_frame(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """`rows` as a DataFrame. Raises UnsupportedError where pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise UnsupportedError(
            "a table needs pandas",
            given=f"pandas cannot be imported: {error}",
            expected="pandas, which moemerge needs for nothing else",
            fix="pip install pandas, or take the same rows as dictionaries: .rows()",
        ) from error
    return pandas.DataFrame(rows)


def html_table(rows: list[dict[str, Any]]) -> str:
    """The first rows as a table of HTML."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    body = [_line("td", [_cell(row.get(name)) for name in columns]) for row in rows[:SHOWN]]
    more = f"<p>and {len(rows) - SHOWN} rows more</p>" if len(rows) > SHOWN else ""
    return f"<table>{_line('th', columns)}{''.join(body)}</table>{more}"


def picture_html(path: Path) -> str:
    """A picture within the page, since a notebook may be opened elsewhere; nothing for one that is gone."""
    if not path.is_file():
        return ""
    text = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{text}" style="max-width: 100%">'


def _line(kind: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

"""Rows of data files: reading any supported kind, counting the bad ones, writing gzip'd JSON lines."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import NotRequired, TypedDict

from moemerge.artifacts.hub import bounded_hub, words_of
from moemerge.artifacts.paths import DATA_SUFFIXES, near_path
from moemerge.data.shards import all_shards, refuse_part_of_saved
from moemerge.errors import DataError

HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?:(?P<split>[\w.%\[\]:-]+)")
SHOWN, MOST_TOLD, MOST_REASONS = 10, 4, 40
MANY = 0.1  # share of rows left out that is warned of
CORRECT = "correct these rows, or say what the file calls its fields: fields such as chosen=NAME (--fields)"
SHORTEN = "raise max_length, or shorten these rows"
MAX_LINE, LEAST_LINE = 16_000_000, 100  # bytes; an empty line costs time, too
MAX_UNPACKED, MAX_RATIO = 256_000_000, 100
PARQUET_ROWS = 1000

log = logging.getLogger(__name__)


class BadRow(Exception):
    """A row that cannot be used; the message is the reason, worded so that equal faults count together.

    `fix` is what to do about it.
    """

    def __init__(self, reason: str, fix: str = CORRECT) -> None:
        super().__init__(reason)
        self.fix = fix


Row = dict[str, Any]
Text = str | list[dict[str, str]]


class BadRows(TypedDict):
    """How many rows were left out for one reason, and the numbers of the first of them."""

    count: int
    rows: list[int]


class RowSummary(TypedDict):
    """What became of the rows of one source, in a report; `not_drawn` where only some were wanted."""

    source: str
    total: int
    kept: int
    bad: dict[str, BadRows]
    not_drawn: NotRequired[int]


def listed(rows: Sequence[int]) -> str:
    """The first of these row numbers, for people to look the rows up."""
    return ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")


@dataclass
class RowReport:
    """What became of the rows of one source: how many there were, and which were bad for what reason.

    Row numbers count from 1 (line numbers in JSON lines). A row is listed under one reason only. `fixes` says
    what to do about each reason; `not_drawn` counts those that nobody needed; `told_plain`, that a warning
    was given on plain text for a chat model.
    """

    source: str
    total: int = 0
    reasons: dict[str, list[int]] = field(default_factory=dict)
    fixes: dict[str, str] = field(default_factory=dict, repr=False)
    not_drawn: int = 0
    told_plain: bool = field(default=False, repr=False)

    @property
    def bad(self) -> int:
        """Number of bad rows."""
        return sum(map(len, self.reasons.values()))

    @property
    def kept(self) -> int:
        """Number of rows that can be used."""
        return self.total - self.bad - self.not_drawn

    def add(self, reason: str, row: int, fix: str = CORRECT) -> None:
        """Count row number `row` as bad for `reason`, about which `fix` can be done."""
        self.reasons.setdefault(reason, []).append(row)
        self.fixes[reason] = fix

    def summary(self, shown: int | None = SHOWN) -> RowSummary:
        """Counts and the first `shown` row numbers (None: all) per reason, as JSON values."""
        bad: dict[str, BadRows] = {
            why: {"count": len(rows), "rows": rows[:shown]} for why, rows in self.reasons.items()
        }
        summary: RowSummary = {"source": self.source, "total": self.total, "kept": self.kept, "bad": bad}
        return {**summary, "not_drawn": self.not_drawn} if self.not_drawn else summary

    def told(self) -> RowSummary:
        """`summary`; what share of the rows is left out, and why, is logged: a warning where it is large."""
        looked_at = self.kept + self.bad
        if self.bad:
            many = self.bad > MANY * looked_at
            reasons = sorted(self.reasons.items(), key=lambda item: -len(item[1]))[:MOST_TOLD]
            why = ", ".join(f"{reason} {len(rows) / looked_at:.1%}" for reason, rows in reasons)
            advice = f" ({self._all_fixes()})" if many else ""
            left_out = f"{self.bad / looked_at:.1%} of {looked_at} rows of {self.source} are left out"
            log.log(logging.WARNING if many else logging.INFO, "%s: %s%s", left_out, why, advice)
        return self.summary()

    def check(self, bad_rows: str, expected: str) -> None:
        """Raise DataError if no row is left, or if any is bad and `bad_rows` is "refuse"."""
        if not self.kept or (bad_rows != "skip" and self.bad):
            fixes, way_on = self._all_fixes(), ", or set bad_rows to skip to go on without them"
            raise self.refusal(expected, fixes + way_on * (self.kept > 0))

    def refusal(self, expected: str, fix: str) -> DataError:
        """The fault of a source whose rows cannot be used."""
        return DataError(
            f"{self.bad} of {self.total} rows of {self.source} cannot be used",
            given="; ".join(self._lines()) or "no rows at all",
            expected=expected,
            fix=fix,
        )

    def _lines(self) -> Iterator[str]:
        for reason, rows in itertools.islice(self.reasons.items(), MOST_REASONS):
            yield f"{reason}: {len(rows)} (row {listed(rows)})"
        if len(self.reasons) > MOST_REASONS:
            yield f"{len(self.reasons) - MOST_REASONS} other reasons"

    def _all_fixes(self) -> str:
        if not self.total:
            return "give a file that has rows"
        return "; ".join(dict.fromkeys(self.fixes.values()))


def read_rows(source: str) -> Iterator[tuple[int, Row | BadRow]]:
    """Number (from 1) and content of each row of `source`; a BadRow stands for a row that cannot be read.

    `source` is a .jsonl, .json (a list) or .parquet file, the first two also gzip'd; a folder with the shards
    of one dataset in such files, whose rows are numbered through; or a dataset on the hub, owner/name:split
    or owner/name:configuration:split. Raises DataError if it cannot be opened.
    """
    path = Path(source)
    if path.is_file():
        return _file_rows(path)
    if path.is_dir():
        return _rows_in_turn(all_shards(path, DATA_SUFFIXES))
    hub = HUB.fullmatch(source)
    if hub and not path.exists():
        return _numbered(_hub_rows(source, **hub.groupdict()))
    _refuse(path)


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write `rows` as gzip'd JSON lines; equal rows give equal bytes. Returns their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=6, mtime=0))
    return len(lines)


def _rows_in_turn(files: Iterable[Path]) -> Iterator[tuple[int, Row | BadRow]]:
    before = 0
    for file in files:
        number = 0
        for number, row in _file_rows(file):
            yield before + number, row
        before += number


def _file_rows(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    refuse_part_of_saved(path)
    name = path.name.lower().removesuffix(".gz")
    packed = path.name.lower().endswith(".gz")
    if name.endswith(".jsonl"):
        return _lines(path, packed)
    if name.endswith(".json"):
        return _numbered(_json_list(path, packed))
    if name.endswith(".parquet") and not packed:
        return _numbered(_parquet_rows(path))
    raise DataError(
        f"{path}: files of this kind cannot be read",
        given=path.suffix or "no suffix",
        expected=", ".join(DATA_SUFFIXES),
        fix="convert the file; if it is of such a kind, rename it to end so",
    )


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[int, Row | BadRow]]:
    for number, row in enumerate(rows, 1):
        yield number, row if isinstance(row, (dict, BadRow)) else BadRow("not an object")


def _lines(path: Path, packed: bool) -> Iterator[tuple[int, Row | BadRow]]:
    budget = _Budget(path)
    try:
        with gzip.open(path) if packed else path.open("rb") as handle:
            for number, line in enumerate(_short_lines(handle, budget), 1):
                if line is None or line.removeprefix(BOM_UTF8).strip():
                    yield number, BadRow("longer than 16 MB") if line is None else _parse(line)
    except (OSError, EOFError, zlib.error) as error:
        _refuse_damaged(path, error)


def _short_lines(handle: BufferedIOBase, budget: _Budget) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, which is never held whole."""
    while line := handle.readline(MAX_LINE):
        budget.spend(max(len(line), LEAST_LINE))
        # What remains of a line that is too long is read in pieces and dropped.
        whole = len(line) < MAX_LINE or line.endswith(b"\n")
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = handle.readline(MAX_LINE)
            budget.spend(len(line))
        yield line if whole else None


class _Budget:
    """How much a file may unpack to: DataError for a small file that becomes a very large one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = max(MAX_UNPACKED, MAX_RATIO * path.stat().st_size)

    def spend(self, size: int) -> None:
        """Count `size` unpacked bytes."""
        self.left -= size
        if self.left < 0:
            raise DataError(
                f"{self.path} unpacks to far more than a file of preference data would",
                given=f"{self.path.stat().st_size} bytes that become more than {MAX_RATIO} times as many",
                expected=f"at most {MAX_UNPACKED} bytes, or {MAX_RATIO} times the file's own size",
                fix="give the file unpacked, if you trust it",
            )


def _parse(line: bytes) -> Row | BadRow:
    try:
        row = _json(line)
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, RecursionError):
        return BadRow("broken JSON")
    return row if isinstance(row, (dict, BadRow)) else BadRow("not an object")


def _json(text: bytes) -> Any:
    """The value of a JSON text; a BadRow stands for each object in which a field is given twice.

    A byte order mark before it, which Windows' tools write, is left out.
    """
    return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_once)


def _once(fields: list[tuple[str, Any]]) -> Row | BadRow:
    """An object of `fields`; a BadRow if two in it have one name, as no one can say which is meant."""
    row = dict(fields)
    if len(row) < len(fields) or any(map(_holds_bad, row.values())):
        return BadRow("a field is given twice")
    return row


def _holds_bad(value: Any) -> bool:
    return isinstance(value, BadRow) or (isinstance(value, list) and any(map(_holds_bad, value)))


def _json_list(path: Path, packed: bool) -> list[Any]:
    budget = _Budget(path)
    try:
        with gzip.open(path) if packed else path.open("rb") as handle:
            text = handle.read(budget.left + 1)
        budget.spend(len(text))
        rows = _json(text)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        _refuse_damaged(path, error, "; JSON lines need the suffix .jsonl")
    if isinstance(rows, list):
        return rows
    raise DataError(
        f"{path} holds no list",
        given="a JSON object" if isinstance(rows, (dict, BadRow)) else f"JSON {type(rows).__name__}",
        expected="a list of objects",
        fix="write the rows as one JSON list, or as JSON lines with the suffix .jsonl",
    )


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        budget = _Budget(path)
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=PARQUET_ROWS):
            budget.spend(batch.nbytes)
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        _refuse_damaged(path, error)


def _hub_rows(source: str, name: str, config: str | None, split: str) -> Iterable[Any]:
    import datasets

    try:
        with bounded_hub():
            return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # an answer that makes no sense can raise anything
        raise DataError(
            f"dataset {name} cannot be loaded",
            given=f"{source} ({type(error).__name__}: {words_of(error)})",
            expected="a dataset that the hub has and this account may read, as owner/name:split",
            fix="check name, configuration, split, network and token, or give a file",
        ) from None


def _refuse(path: Path) -> NoReturn:
    raise DataError(
        f"{path} does not exist",
        given=str(path),
        expected=f"a file ({', '.join(DATA_SUFFIXES)}), or a dataset on the hub as owner/name:split",
        fix=f"{near_path(path)}correct the path, or add the split: owner/name:train",
    )


def _refuse_damaged(path: Path, error: Exception, hint: str = "") -> NoReturn:
    raise DataError(
        f"{path} cannot be read",
        given=f"{type(error).__name__}: {error}"[:300],
        expected="a whole, undamaged file of the kind that its suffix names",
        fix=f"make or fetch the file again{hint}",
    ) from error

"""Preference data: reading, checking, tokenising and splitting pairs and scored candidates.

Formats are TRL's: prompt/chosen/rejected, or chosen/rejected that hold their prompt, each as plain text or
as chat messages; for best-of-n, a prompt with candidates[{text, score}].
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from moemerge.artifacts import Draft, stage, write_json
from moemerge.errors import DataError, OptionError, suggest
from moemerge.options import TextFormat
from moemerge.preferences import CandidateSet, Pair, parse_candidates, parse_pair, parse_prompt, value_of
from moemerge.recipe import Data
from moemerge.rows import SHORTEN, SHOWN, BadRow, Row, RowReport, Text, read_rows, write_rows
from moemerge.tokenise import Encoded, EncodedCandidates, EncodedPair, encode, encode_all

T = TypeVar("T")

PAIR_ROWS = "rows with prompt, chosen, rejected (or the last two only), each text or messages {role, content}"
CANDIDATE_ROWS = "rows with prompt and candidates, a list of two or more {text, score}"
PROMPT_ROWS = "rows with prompt, text or messages {role, content}"
SHORT_ROWS = "rows of at most max_length tokens that the tokenizer can encode"

__all__ = [
    "CandidateSet",
    "Encoded",
    "EncodedCandidates",
    "EncodedPair",
    "Pair",
    "RowReport",
    "Text",
    "distinct",
    "encode",
    "encode_candidates",
    "encode_pairs",
    "prepare",
    "read_candidates",
    "read_pairs",
    "read_prompts",
]

log = logging.getLogger(__name__)


def read_pairs(source: str, format: TextFormat) -> tuple[list[Pair], RowReport]:
    """All usable pairs of `source` (see rows.read_rows), and a report on the others.

    Chat pairs without a prompt share their leading messages: those become the prompt. Raises DataError if
    the source cannot be opened, has no usable row, or has a bad one while format.bad_rows is "refuse".
    """
    rows = list(read_rows(source))
    has_prompt = any(isinstance(r, dict) and value_of(r, "prompt", format) is not None for _, r in rows)
    return collect(source, rows, format, partial(parse_pair, has_prompt=has_prompt), PAIR_ROWS)


def read_candidates(
    source: str, format: TextFormat, scored: bool = True
) -> tuple[list[CandidateSet], RowReport]:
    """All usable candidate sets of `source`, and a report on the other rows. Raises as read_pairs does.

    Unless `scored`, sets without gold scores are taken too.
    """
    rows = list(read_rows(source))
    return collect(source, rows, format, partial(parse_candidates, scored=scored), CANDIDATE_ROWS)


def read_prompts(source: str, format: TextFormat) -> tuple[list[CandidateSet], RowReport]:
    """The prompts of `source`, whatever else its rows hold, as sets without answers.

    Raises as read_pairs does, and DataError for chats and plain texts side by side.
    """
    found, report = collect(source, list(read_rows(source)), format, parse_prompt, PROMPT_ROWS)
    if len({type(one.prompt) for one in found}) > 1:
        raise DataError(
            f"prompts of {source} are of different kinds",
            given="texts and chats",
            expected="one kind",
            fix="make two files of them",
        )
    return found, report


def distinct(sets: Sequence[CandidateSet]) -> list[CandidateSet]:
    """The first of those with equal prompts."""
    first = {json.dumps(one.prompt): one for one in reversed(sets)}
    return [one for one in sets if first[json.dumps(one.prompt)] is one]


def collect(
    source: str,
    rows: list[tuple[int, Row | BadRow]],
    format: TextFormat,
    parse: Callable[[Row, int, TextFormat], T],
    expected: str,
) -> tuple[list[T], RowReport]:
    """What `parse` makes of each of `rows`, and a report on those for which it raises BadRow.

    Raises DataError, which tells what was `expected`, as read_pairs does.
    """
    report, kept = RowReport(source, total=len(rows)), []
    for number, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            kept.append(parse(row, number, format))
        except BadRow as bad:
            report.add(str(bad), number)
    names = next((list(row) for _, row in rows if isinstance(row, dict)), None)
    report.check(format.bad_rows, expected + (f"; found fields: {', '.join(names)}" if names else ""))
    return kept, report


def encode_pairs(
    tokenizer: Any, pairs: Sequence[Pair], format: TextFormat, report: RowReport
) -> list[EncodedPair]:
    """Encode both sides of each pair; a pair that is too long is a bad row, counted in `report`.

    Raises DataError if bad rows are refused, or if none is left.
    """
    items = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    groups = _fitting(tokenizer, items, [2] * len(pairs), [pair.row for pair in pairs], format, report)
    return [EncodedPair(g[0], g[1], pair) for g, pair in zip(groups, pairs, strict=True) if g]


def encode_candidates(
    tokenizer: Any, sets: Sequence[CandidateSet], format: TextFormat, report: RowReport
) -> list[EncodedCandidates]:
    """Encode each set's answers; one that is too long makes the set a bad row. Raises as encode_pairs."""
    items = [(one.prompt, text) for one in sets for text in one.texts]
    sizes = [len(one.texts) for one in sets]
    groups = _fitting(tokenizer, items, sizes, [one.row for one in sets], format, report)
    return [EncodedCandidates(g, one) for g, one in zip(groups, sets, strict=True) if g]


def _fitting(
    tokenizer: Any,
    items: list[tuple[Text, Text]],
    sizes: list[int],
    rows: list[int],
    format: TextFormat,
    report: RowReport,
) -> list[list[Encoded]]:
    """The encoded items of each row, or an empty list where the row turned out to be bad."""
    stream, groups = iter(encode_all(tokenizer, items)), []
    for size, row in zip(sizes, rows, strict=True):
        group = list(itertools.islice(stream, size))
        good = [one for one in group if isinstance(one, Encoded) and len(one.ids) <= format.max_length]
        if len(good) < size:
            bad = next((str(one) for one in group if isinstance(one, BadRow)), None)
            report.add(bad or f"longer than {format.max_length} tokens", row)
        groups.append(good if len(good) == size else [])
    report.check(format.bad_rows, SHORT_ROWS, SHORTEN)
    return groups


@stage("data", Data)
def prepare(options: Data, draft: Draft) -> None:
    """Read, check, split and cap preference data; write it as gzip'd JSON lines in plain field names.

    Writes train, validation and fit .jsonl.gz (each only if there is one), tests/NAME.jsonl.gz,
    candidates/NAME.jsonl.gz and report.json with the row numbers of all bad rows. Lengths are checked if
    `tokenizer` is given. Values of `split_by` (else equal prompts) never straddle a split.
    Raises DataError for unusable data, OptionError if no data are named.
    """
    reader = _Reader(options)
    pairs = reader.pairs()
    sizes = {name: write_rows(draft.folder / f"{name}.jsonl.gz", _plain(p)) for name, p in pairs.items()}
    for name, source in options.candidates.items():
        sets = reader.candidates(f"candidates/{name}", source)
        sizes[f"candidates/{name}"] = write_rows(draft.folder / f"candidates/{name}.jsonl.gz", _plain(sets))
    overlap = _overlap(pairs, options.split_by)
    draft.results |= {"sizes": sizes, "rows": reader.summary(), "seen_in_train": overlap}
    write_json(draft.folder / "report.json", draft.results | {"rows": reader.summary(None)})


def _plain(items: Sequence[Pair] | Sequence[CandidateSet]) -> Iterator[Row]:
    return (item.plain() for item in items)


class _Reader:
    """Reads what the options name, keeps the reports, measures lengths, draws the samples."""

    def __init__(self, options: Data) -> None:
        self.options = options
        self.reports: dict[str, RowReport] = {}
        self.tokenizer = _load_tokenizer(options.tokenizer)

    def summary(self, shown: int | None = SHOWN) -> dict[str, Any]:
        return {name: report.summary(shown) for name, report in self.reports.items()}

    def pairs(self) -> dict[str, list[Pair]]:
        """All sets of pairs by name: train, validation, fit, tests/NAME."""
        options = self.options
        named = {"train": options.train, "validation": options.validation, "fit": options.fit}
        named |= {f"tests/{name}": source for name, source in options.tests.items()}
        found = {name: self._read(name, source) for name, source in named.items() if source}
        if not found and not options.candidates:
            raise OptionError(
                "no data are named",
                given="none of train, validation, fit, tests, candidates",
                expected="at least one of them",
                fix="name a file or a dataset on the hub, e.g. train: pairs.jsonl",
            )
        if "train" in found:
            found = _split(found, options)
        return {name: self._draw(pairs, self._cap(name)) for name, pairs in found.items()}

    def candidates(self, name: str, source: str) -> list[CandidateSet]:
        """One set of candidate sets, capped."""
        sets, report = read_candidates(source, self.options, self.options.scored)
        self.reports[name] = report
        if self.tokenizer is not None:
            sets = [e.candidates for e in encode_candidates(self.tokenizer, sets, self.options, report)]
        return self._draw(sets, self.options.max_prompts)

    def _read(self, name: str, source: str) -> list[Pair]:
        pairs, report = read_pairs(source, self.options)
        self.reports[name] = report
        if self.tokenizer is not None:
            pairs = [e.pair for e in encode_pairs(self.tokenizer, pairs, self.options, report)]
        return pairs

    def _cap(self, name: str) -> int | None:
        options = self.options
        caps = {"train": options.max_train, "validation": options.max_validation, "fit": None}
        return caps.get(name, options.max_test)

    def _draw(self, items: list[T], most: int | None) -> list[T]:
        if most is None or len(items) <= most:
            return items
        chosen = np.random.default_rng(self.options.seed).choice(len(items), most, replace=False)
        return [items[i] for i in sorted(chosen)]


def _load_tokenizer(source: str | None) -> Any:
    if source is None:
        return None
    from moemerge.scoring import load_tokenizer

    return load_tokenizer(source)


def _split(found: dict[str, list[Pair]], options: Data) -> dict[str, list[Pair]]:
    """Split tests/test and, where it is not given, validation off train, whole groups at a time."""
    shares = {"tests/test": options.test_share}
    shares |= {} if "validation" in found else {"validation": options.validation_share}
    shares = {name: share for name, share in shares.items() if share}
    if "tests/test" in shares and "tests/test" in found:
        raise OptionError(
            "two test sets are called test",
            given="tests: {test: ...} and test_share",
            expected="one of them",
            fix="rename the one under tests, or leave test_share out",
        )
    groups = _groups(found["train"], options.split_by)
    parts = _partition(groups, shares, options.seed)
    return found | {name: sorted(pairs, key=lambda p: p.row) for name, pairs in parts.items()}


def _groups(pairs: list[Pair], split_by: str | None) -> list[list[Pair]]:
    """Pairs that must stay together, in order of first appearance."""
    absent = [pair.row for pair in pairs if split_by and pair.source.get(split_by) is None]
    if absent:
        raise DataError(
            f"{len(absent)} rows have no field {split_by!r} to split by",
            given=f"rows {', '.join(map(str, absent[:SHOWN]))}; fields {', '.join(pairs[0].source)}",
            expected="every training row to have it",
            fix=suggest(split_by or "", pairs[0].source),
        )
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_group(pair, split_by), []).append(pair)
    return list(groups.values())


def _group(pair: Pair, split_by: str | None) -> str:
    key: Any = pair.source.get(split_by) if split_by else pair.prompt or (pair.chosen, pair.rejected)
    return json.dumps(key, sort_keys=True, default=str)


def _partition(groups: list[list[Pair]], shares: dict[str, float], seed: int) -> dict[str, list[Pair]]:
    """Shuffled groups dealt out: to each name so many as come nearest to its share of rows, then to train."""
    if len(groups) <= len(shares):
        raise DataError(
            f"train cannot be split into {len(shares) + 1} parts",
            given=f"{len(groups)} group(s) of rows that must stay together",
            expected=f"at least {len(shares) + 1}: one for each of train, {', '.join(shares)}",
            fix="give more data, another split_by, or files of their own for validation and tests",
        )
    total = sum(map(len, groups))
    left = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    parts = {}
    for waiting, (name, share) in zip(range(len(shares), 0, -1), shares.items(), strict=True):
        ends = np.cumsum([len(group) for group in left[: len(left) - waiting]])
        count = int(np.abs(ends - share * total).argmin()) + 1
        parts[name], left = list(itertools.chain(*left[:count])), left[count:]
    return parts | {"train": list(itertools.chain(*left))}


def _overlap(pairs: dict[str, list[Pair]], split_by: str | None) -> dict[str, int]:
    """Per set, the number of pairs whose group (prompt, or value of split_by) is in train too."""
    train = {_group(pair, split_by) for pair in pairs.get("train", [])}
    others = {name: some for name, some in pairs.items() if name != "train"}
    overlap = {name: sum(_group(p, split_by) in train for p in some) for name, some in others.items()}
    for name, count in overlap.items():
        if train and count:
            log.info("%d of %d pairs of %s share their group with train", count, len(pairs[name]), name)
    return overlap

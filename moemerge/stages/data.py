"""The stage data: preference data read, split and written in the plain field names."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.stage import Draft, stage
from moemerge.data.draw import draw
from moemerge.data.folds import deal
from moemerge.data.pairs import CandidateSet, Pair, prompt_key
from moemerge.data.reading import read_candidates, read_pairs
from moemerge.data.rows import SHOWN, Row, RowReport, RowSummary, write_rows
from moemerge.data.tokenise import encode_candidates, encode_pairs
from moemerge.errors import DataError, OptionError, suggest
from moemerge.options.data import Data

T = TypeVar("T")
UNSPLIT = ("prompt", "chosen", "rejected", "margin")  # columns that tell no groups of rows apart
PLAIN_VALUE = (str, int, float)

log = logging.getLogger(__name__)


@stage("data", Data)
def prepare(options: Data, draft: Draft) -> None:
    """Read, check, split and cap preference data; write it as gzip'd JSON lines in plain field names.

    Writes train, validation and fit .jsonl.gz (each only if there is one), tests/NAME.jsonl.gz,
    candidates/NAME.jsonl.gz, folds/N/train and held_out .jsonl.gz, and report.json with the row numbers of
    all bad rows. Lengths are checked if `tokenizer` is given. Values of `split_by` (else equal prompts) never
    straddle a split.
    Raises DataError for unusable data, OptionError if no data are named.
    """
    reader = _Reader(options)
    pairs = reader.pairs()
    sizes = {name: write_rows(draft.folder / f"{name}.jsonl.gz", _plain(p)) for name, p in pairs.items()}
    for name, source in options.candidates.items():
        sets = reader.candidates(f"candidates/{name}", source)
        sizes[f"candidates/{name}"] = write_rows(draft.folder / f"candidates/{name}.jsonl.gz", _plain(sets))
    overlap = _overlap(pairs, options.split_by)
    draft.results |= {"sizes": sizes, "rows": reader.told(), "seen_in_train": overlap}
    whole = {name: report.summary(None) for name, report in reader.reports.items()}
    write_json(draft.folder / "report.json", draft.results | {"rows": whole})


def read_parts(options: Data) -> dict[str, list[Pair]]:
    """The pairs of each file that `prepare` writes, by name, too long ones as well. Raises as it does."""
    return _Reader(options.model_copy(update={"tokenizer": None})).pairs()


def _plain(items: Sequence[Pair] | Sequence[CandidateSet]) -> Iterator[Row]:
    return (item.plain() for item in items)


class _Reader:
    """Reads what the options name, keeps the reports, measures lengths, draws the samples."""

    def __init__(self, options: Data) -> None:
        self.options = options
        self.reports: dict[str, RowReport] = {}  # of each source; parts split off train have train's
        self.tokenizer = _load_tokenizer(options.tokenizer)

    def told(self) -> dict[str, RowSummary]:
        return {name: report.told() for name, report in self.reports.items()}

    def pairs(self) -> dict[str, list[Pair]]:
        """All sets of pairs by name: train, validation, fit, tests/NAME."""
        options = self.options
        named = {"train": options.train, "validation": options.validation, "fit": options.fit}
        named |= {f"tests/{name}": source for name, source in options.tests.items()}
        read = {name: self._read(name, source) for name, source in named.items() if source}
        if not read and not options.candidates:
            raise OptionError(
                "no data are named",
                given="none of train, validation, fit, tests, candidates",
                expected="at least one of them",
                fix="name a file or a dataset on the hub, e.g. train: pairs.jsonl",
            )
        if "train" in read:
            read = _split(read, options)
        drawn = {name: self._drawn(name, pairs) for name, pairs in read.items()}
        return drawn | (_folds(drawn["train"], options) if options.folds else {})

    def candidates(self, name: str, source: str) -> list[CandidateSet]:
        """One set of candidate sets, capped."""
        sets, report = read_candidates(source, self.options, self.options.scored)
        self.reports[name] = report

        def usable(some: Sequence[CandidateSet]) -> Sequence[CandidateSet]:
            if self.tokenizer is None:
                return some
            return [e.candidates for e in encode_candidates(self.tokenizer, some, self.options, report)]

        return draw(sets, self.options.max_prompts, self.options.seed, usable, report)

    def _read(self, name: str, source: str) -> list[Pair]:
        pairs, self.reports[name] = read_pairs(source, self.options)
        return pairs

    def _drawn(self, name: str, pairs: Sequence[Pair]) -> list[Pair]:
        """Pairs that are short enough, as many as are wanted of this set."""
        report = self.reports.get(name, self.reports.get("train"))
        assert report is not None

        def usable(some: Sequence[Pair]) -> Sequence[Pair]:
            if self.tokenizer is None:
                return some
            return [e.pair for e in encode_pairs(self.tokenizer, some, self.options, report)]

        drawn = draw(pairs, self._cap(name), self.options.seed, usable, report)
        if not drawn:
            raise report.refusal(f"a usable row in the part {name}", "raise max_length, or give more rows")
        return drawn

    def _cap(self, name: str) -> int | None:
        options = self.options
        caps = {"train": options.max_train, "validation": options.max_validation, "fit": None}
        return caps.get(name, options.max_test)


def _load_tokenizer(source: str | None) -> Any:
    if source is None:
        return None
    from moemerge.models.scorers import open_scorer

    return open_scorer(source).reader()


def _split(sets: dict[str, list[Pair]], options: Data) -> dict[str, list[Pair]]:
    """Split tests/test and, where it is not given, validation off train, whole groups at a time."""
    shares = {"tests/test": options.test_share}
    shares |= {} if "validation" in sets else {"validation": options.validation_share}
    shares = {name: share for name, share in shares.items() if share}
    if "tests/test" in shares and "tests/test" in sets:
        raise OptionError(
            "two test sets are called test",
            given="tests: {test: ...} and test_share",
            expected="one of them",
            fix="rename the one under tests, or leave test_share out",
        )
    groups = _groups(sets["train"], options)
    parts = _partition(groups, shares, options)
    return sets | {name: sorted(pairs, key=lambda p: p.row) for name, pairs in parts.items()}


def _groups(pairs: list[Pair], options: Data) -> list[list[Pair]]:
    """Pairs that must stay together, in order of first appearance."""
    split_by = options.split_by
    absent = [pair.row for pair in pairs if split_by and pair.source.get(split_by) is None]
    if absent:
        raise DataError(
            f"{len(absent)} rows have no field {split_by!r} to split by",
            given=f"rows {', '.join(map(str, absent[:SHOWN]))}; fields {', '.join(pairs[0].source)}",
            expected="every training row to have it",
            fix=_other_field(split_by or "", pairs, options),
        )
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_group(pair, split_by), []).append(pair)
    return list(groups.values())


def _other_field(name: str, pairs: list[Pair], options: Data) -> str:
    """Advice on a missing field to split by: one that every row has, and that is none of the texts."""
    texts = {options.fields.get(column, column) for column in UNSPLIT}
    whole = [key for key in pairs[0].source if all(isinstance(p.source.get(key), PLAIN_VALUE) for p in pairs)]
    known = [key for key in whole if key not in texts]
    return suggest(name, known) if known else "leave split_by out: rows of one prompt then stay together"


def _group(pair: Pair, split_by: str | None) -> str:
    if not split_by:
        return prompt_key(pair)
    return json.dumps(pair.source.get(split_by), sort_keys=True, default=str)


def _too_few(what: str, groups: list[list[Pair]], needed: int, options: Data, others: str) -> DataError:
    """The fault of data with fewer groups than parts; `others`: more of what helps."""
    one, shared = f"value of {options.split_by}", f"values of {options.split_by}"
    if not options.split_by:
        one, shared = "prompt", "prompts"
    found = f"with {len(groups)} different {shared}" if len(groups) > 1 else f"all with one {one}"
    return DataError(
        what,
        given=f"{sum(map(len, groups))} rows, {found}",
        expected=f"{needed} different {shared} at least: rows that share one stay together",
        fix=f"give rows with more {shared}{_other_groups(groups, needed, options)}{others}",
    )


def _other_groups(groups: list[list[Pair]], needed: int, options: Data) -> str:
    """How the same rows would make more groups, if they can."""
    if options.split_by:
        prompts = {prompt_key(pair) for group in groups for pair in group}
        out = ", or leave split_by out: rows of one prompt then stay together"
        return out if len(prompts) >= needed else ""
    prompt = groups[0][0].prompt
    if len(groups) > 1 or not prompt or not isinstance(prompt, str):
        return ""
    return (
        ", or write the one prompt in front of its answers and give fields prompt=none, so that each row "
        "stands alone"
    )


def _partition(groups: list[list[Pair]], shares: dict[str, float], options: Data) -> dict[str, list[Pair]]:
    """Shuffled groups dealt out: to each name so many as come nearest to its share of rows, then to train."""
    if len(groups) <= len(shares):
        what, own = f"train cannot be split into {len(shares) + 1} parts", ", or files of their own for "
        raise _too_few(what, groups, len(shares) + 1, options, own + "validation and tests")
    total = sum(map(len, groups))
    left = [groups[i] for i in np.random.default_rng(options.seed).permutation(len(groups))]
    parts = {}
    for waiting, (name, share) in zip(range(len(shares), 0, -1), shares.items(), strict=True):
        ends = np.cumsum([len(group) for group in left[: len(left) - waiting]])
        # The last groups are left out of the choice: one for each part to come, train among them.
        count = int(np.abs(ends - share * total).argmin()) + 1
        parts[name], left = list(itertools.chain(*left[:count])), left[count:]
    return parts | {"train": list(itertools.chain(*left))}


def _folds(pairs: list[Pair], options: Data) -> dict[str, list[Pair]]:
    """Each part of `pairs` in turn, and all others; parts are of like size, and so is a subset in each."""
    groups = _groups(pairs, options)
    if len(groups) < options.folds:
        what, fewer = f"train cannot be dealt to {options.folds} parts", f", or folds {len(groups)}"
        raise _too_few(what, groups, options.folds, options, fewer * (len(groups) > 1))
    kinds = [group[0].subset for group in groups]
    parts = deal(groups, kinds, options.folds, options.seed)
    folds = {}
    for number, part in enumerate(parts):
        held_out = {pair.row for pair in part}
        folds[f"folds/{number}/train"] = [pair for pair in pairs if pair.row not in held_out]
        folds[f"folds/{number}/held_out"] = [pair for pair in pairs if pair.row in held_out]
    return folds


def _overlap(pairs: dict[str, list[Pair]], split_by: str | None) -> dict[str, int]:
    """Per set, the number of pairs whose group (prompt, or value of split_by) is in train too."""
    train = {_group(pair, split_by) for pair in pairs.get("train", [])}
    others = {name: p for name, p in pairs.items() if name != "train" and not name.startswith("folds/")}
    overlap = {name: sum(_group(p, split_by) in train for p in some) for name, some in others.items()}
    for name, count in overlap.items():
        if train and count:
            log.info("%d of %d pairs of %s share their group with train", count, len(pairs[name]), name)
    return overlap

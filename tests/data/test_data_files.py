"""Files of data as other tools write them: byte order marks, shards, save_to_disk, double fields."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path

import pytest

from moemerge.artifacts.staleness import why_stale
from moemerge.data.reading import read_pairs
from moemerge.errors import DataError
from moemerge.options.base import TextFormat
from moemerge.options.data import Data
from moemerge.run.recipe_file import read_yaml
from moemerge.stages.data import prepare

BOM = b"\xef\xbb\xbf"
ROWS = [{"prompt": f"p{i} ", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def answers(source: Path) -> list[tuple[int, str]]:
    pairs, report = read_pairs(str(source), TextFormat())
    assert not report.bad
    return [(pair.row, pair.chosen) for pair in pairs]


def expected(numbers: list[int]) -> list[tuple[int, str]]:
    return [(row, f"good {number}") for row, number in enumerate(numbers, 1)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_a_byte_order_mark_is_no_fault(tmp_path: Path, name: str) -> None:
    text = BOM + (lines(ROWS) if "jsonl" in name else json.dumps(ROWS).encode())
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert answers(tmp_path / name) == expected([0, 1, 2, 3, 4])


def test_files_with_marks_put_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(BOM + lines(ROWS[:1]) + BOM + lines(ROWS[1:2]) + BOM)
    assert answers(tmp_path / "a.jsonl") == expected([0, 1])


def test_a_recipe_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_bytes(BOM + "model: é\n".encode())
    assert read_yaml(tmp_path / "a.yml") == {"model": "é"}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_a_folder_of_shards_is_read_whole_and_in_order(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    for number, part in ((2, ROWS[3:]), (0, ROWS[:2]), (1, ROWS[2:3])):
        path = tmp_path / f"train-0000{number}-of-00003.{kind}"
        if kind == "parquet":
            datasets.Dataset.from_list(part).to_parquet(str(path))
        else:
            text = json.dumps(part).encode() if kind == "json" else lines(part)
            path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert answers(tmp_path) == expected([0, 1, 2, 3, 4])


def test_bad_rows_of_shards_are_numbered_through(tmp_path: Path) -> None:
    (tmp_path / "a-0-of-2.jsonl").write_bytes(lines(ROWS[:2]))
    (tmp_path / "a-1-of-2.jsonl").write_bytes(lines(ROWS[2:3]) + b"{\n" + lines(ROWS[3:]))
    pairs, report = read_pairs(str(tmp_path), TextFormat(bad_rows="skip"))
    assert [pair.row for pair in pairs] == [1, 2, 3, 5, 6] and report.reasons == {"broken JSON": [4]}


def test_a_shard_that_was_changed_makes_the_step_stale(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        (shards / f"a-0000{number}-of-00002.jsonl").write_bytes(lines(ROWS[2 * number : 2 * number + 2]))
    options = {"train": str(shards), "output": tmp_path / "out", "validation_share": 0.0}
    out = prepare(**options)
    rows = [json.loads(line) for line in gzip.decompress((out / "train.jsonl.gz").read_bytes()).splitlines()]
    assert rows == ROWS[:4] and why_stale("data", Data(**options)) is None
    (shards / "a-00001-of-00002.jsonl").write_bytes(lines(ROWS[3:]))
    assert why_stale("data", Data(**options)) == "changed input: train"


FOLDERS: dict[str, tuple[list[str], str, str]] = {
    "no data": (["README.md"], "no data file", "give a file"),
    "one file": (["pairs.jsonl"], "pairs.jsonl", "pairs.jsonl"),
    "a shard is missing": (["a-0-of-3.jsonl", "a-2-of-3.jsonl"], "2 of 3 shards", "fetch the others"),
    "a shard twice": (["a-0-of-2.jsonl", "a-00-of-2.jsonl", "a-1-of-2.jsonl"], "3 of 2", "fetch"),
    "two datasets": (["train-0-of-1.jsonl", "test-0-of-1.jsonl"], "test-0-of-1.jsonl", "folder of their own"),
    "two kinds": (["a-0-of-2.jsonl", "a-1-of-2.json"], "a-1-of-2.json", "folder of their own"),
    "another file": (["a-0-of-1.jsonl", "b.jsonl"], "b.jsonl", "folder of their own"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_other_folders_are_refused(tmp_path: Path, case: str) -> None:
    names, given, fix = FOLDERS[case]
    for name in names:
        (tmp_path / name).write_bytes(lines(ROWS))
    with pytest.raises(DataError) as error:
        read_pairs(str(tmp_path), TextFormat())
    assert given in error.value.given and fix in error.value.fix


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "a-0-of-2.jsonl").write_bytes(lines(ROWS))
    os.mkfifo(tmp_path / "a-1-of-2.jsonl")
    with pytest.raises(DataError, match="1 of 2 shards"):
        read_pairs(str(tmp_path), TextFormat())


def test_a_shard_alone_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a-00000-of-00002.jsonl", "b-00000-of-00001.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(lines(ROWS))
        assert answers(tmp_path / name) == expected([0, 1, 2, 3, 4])
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        f"{tmp_path / 'a-00000-of-00002.jsonl'} is one of 2 shards: rows of the others are not read"
    ]


@pytest.mark.parametrize("splits", [False, True])
def test_what_save_to_disk_writes_is_named_with_a_remedy_that_works(
    tmp_path: Path, splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data = datasets.DatasetDict({"train": data, "test": data}) if splits else data
    saved = tmp_path / "saved"
    data.save_to_disk(str(saved))
    inner = saved / "train" if splits else saved
    for source in (saved, inner, inner / "dataset_info.json", inner / "state.json", *inner.glob("*.arrow")):
        with pytest.raises(DataError, match="as save_to_disk writes it") as error:
            read_pairs(str(source), TextFormat())
    with pytest.raises(DataError) as error:
        read_pairs(str(saved), TextFormat())
    assert ("test, train" in error.value.given) == splits
    remedy = error.value.fix.split(" of datasets")[0]
    monkeypatch.chdir(tmp_path)
    eval(remedy, {"load_from_disk": datasets.load_from_disk})
    assert answers(tmp_path / ("test.parquet" if splits else "data.parquet")) == expected([0, 1, 2, 3, 4])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_double_fields_are_counted_in_every_kind(tmp_path: Path, name: str) -> None:
    good = json.dumps(ROWS[0])
    double = '{"prompt": "p", "chosen": "a", "chosen": "c", "rejected": "b"}'
    deep = '{"prompt": "p", "chosen": [[{"role": "user", "role": "x", "content": "a"}]], "rejected": "b"}'
    rows = [good, double, deep, "3", good]
    (tmp_path / name).write_text("\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]")
    pairs, report = read_pairs(str(tmp_path / name), TextFormat(bad_rows="skip"))
    assert [pair.row for pair in pairs] == [1, 5]
    assert report.reasons == {"a field is given twice": [2, 3], "not an object": [4]}

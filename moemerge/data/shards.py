"""Datasets in folders: shards of one dataset (NAME-00000-of-00002.parquet), and what save_to_disk writes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from moemerge.errors import DataError

SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<kind>\.[a-z.]+)", re.IGNORECASE)
# Files of the library datasets that tell of the data and hold none.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SHOWN = 10

log = logging.getLogger(__name__)


def all_shards(folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    """The files, with suffixes of `kinds`, of the one dataset that `folder` holds in shards, in their order.

    Raises DataError if the folder holds anything else: no data, other files of data, several datasets, some
    of the shards only, or a dataset as save_to_disk writes it.
    """
    _refuse_saved(folder)
    data = [path for path in sorted(folder.iterdir()) if path.name.lower().endswith(kinds) and path.is_file()]
    files = [path for path in data if path.name not in DESCRIPTIONS]
    shards = [shard for path in files if (shard := SHARD.fullmatch(path.name))]
    datasets = {(shard["name"], shard["count"], shard["kind"]) for shard in shards}
    if not files or len(shards) < len(files) or len(datasets) > 1:
        raise _no_dataset(folder, files, kinds, len(datasets))
    by_number = {int(shard["number"]): path for shard, path in zip(shards, files, strict=True)}
    count = int(shards[0]["count"])
    if not len(by_number) == len(files) == count or max(by_number) - min(by_number) >= count:
        raise DataError(
            f"{folder} holds a part of a dataset only",
            given=f"{len(files)} of {count} shards: {_listed(files)}",
            expected="all shards of one dataset",
            fix="fetch the others, or give one file, if you mean that part",
        )
    return [by_number[number] for number in sorted(by_number)]


def tell_lone_shard(source: str) -> None:
    """Warn if `source` is a file that holds one of several shards: who gives it may mean all of them."""
    path = Path(source)
    shard = SHARD.fullmatch(path.name)
    if shard and int(shard["count"]) > 1 and path.is_file():
        log.warning("%s is one of %s shards: rows of the others are not read", source, int(shard["count"]))


def refuse_part_of_saved(path: Path) -> None:
    """Raise DataError if the file `path` is part of what Dataset.save_to_disk wrote."""
    if path.suffix == ".arrow" or path.name in DESCRIPTIONS:
        _refuse_saved(path.parent)


def _refuse_saved(folder: Path) -> None:
    is_dict = (folder / "dataset_dict.json").is_file()
    if not is_dict and not ((folder / "state.json").is_file() and any(folder.glob("*.arrow"))):
        return
    splits = sorted(path.parent.name for path in folder.glob("*/state.json")) if is_dict else []
    name = splits[0] if splits else "data"
    split = f'["{name}"]' if is_dict else ""
    raise DataError(
        f"{folder} is a dataset as save_to_disk writes it",
        given=f"a folder of arrow files{' with the splits ' + ', '.join(splits[:SHOWN]) if splits else ''}",
        expected="the same data as parquet or JSON lines",
        fix=f'load_from_disk("{folder}"){split}.to_parquet("{name}.parquet") of datasets, and give that file',
    )


def _no_dataset(folder: Path, files: list[Path], kinds: tuple[str, ...], datasets: int) -> DataError:
    fix = f"give {files[0]}" if files else "give a file"
    if datasets:
        fix = "put the shards of one dataset into a folder of their own, and give that"
    return DataError(
        f"{folder} is a folder",
        given=f"a folder with {_listed(files) or 'no data file'}",
        expected=f"one file ({', '.join(kinds)}), a folder of one dataset's shards, or owner/name:split",
        fix=fix,
    )


def _listed(files: list[Path]) -> str:
    return ", ".join(path.name for path in files[:SHOWN]) + (", ..." if len(files) > SHOWN else "")

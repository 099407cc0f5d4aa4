"""Writing checkpoints: tensors come back bit for bit, however they lie in memory, in shards as asked."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moemerge.artifacts.weight_files import order_metadata
from moemerge.models import checkpoint
from moemerge.models.checkpoint import INDEX, SINGLE, Checkpoint, write_checkpoint

ALL = 10**9


def awkward() -> dict[str, Tensor]:
    """Views, transposed tensors, two names of one tensor, nothing, one number, and other dtypes."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "whole": base,
        "again": base,
        "rows": base[1:3],
        "columns": base[:, 1:3],
        "transposed": base.T,
        "expanded": base[0].expand(3, 6),
        "empty": torch.empty(0, 5),
        "number": torch.tensor(2.5),
        "half": base.to(torch.bfloat16),
        "whole numbers": torch.arange(5),
    }


@pytest.mark.parametrize("shard_size", [ALL, 200, 1])
def test_any_tensor_comes_back(shard_size: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, iter(awkward().items()), shard_size)
    written = Checkpoint(tmp_path)
    assert set(written.names) == set(awkward())
    for name, tensor in awkward().items():
        found = written.tensor(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        where_it_lies = written.mapped(name)
        assert where_it_lies.dtype == tensor.dtype and torch.equal(where_it_lies, tensor), name


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_kept_views_of_many_shards_are_mapped_to_be_read_only(tmp_path: Path) -> None:
    """Private mappings that may be written to are what `ulimit -d` and strict overcommit count."""
    write_checkpoint(tmp_path, iter(awkward().items()), 1)
    written = Checkpoint(tmp_path)
    views = {name: written.mapped(name) for name in written.names}
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    kept = [line for line in maps if line.split()[1] == "r--s"]
    assert len(kept) >= len(views) and not any("w" in line.split()[1] for line in maps)


def test_shards_are_filled_in_order_named_and_indexed(tmp_path: Path) -> None:
    """Tensors of 40, 40, 40 and 400 bytes in shards of 100: two, one, and one that is too large for any."""
    sizes = {"a": 10, "b": 10, "c": 10, "d": 100}
    write_checkpoint(tmp_path, ((name, torch.full((n,), 1.0)) for name, n in sizes.items()), 100)
    index = json.loads((tmp_path / INDEX).read_text())
    one, two, three = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
    assert index["weight_map"] == {"a": one, "b": one, "c": two, "d": three}
    assert index["metadata"]["total_size"] == 4 * 130
    assert {path.name for path in tmp_path.iterdir()} == {one, two, three, INDEX}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in tmp_path.glob("*.safetensors"))


def test_equal_metadata_give_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    """safetensors keeps them in a hash table, which is seeded anew in every process."""
    meta = {f"key {number}": f'{number} \u00e4 \n "' for number in range(20)}
    written = set()
    for place, names in enumerate((list(meta), list(reversed(meta)))):
        path = tmp_path / f"{place}.safetensors"
        save_file({"a": torch.arange(3)}, path, metadata={name: meta[name] for name in names})
        order_metadata(path)
        written.add(path.read_bytes())
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == meta and opened.get_tensor("a").tolist() == [0, 1, 2]
    assert len(written) == 1


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [("a", torch.ones(3))], ALL)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_no_more_than_one_shard_is_held(tmp_path: Path) -> None:
    """When a tensor is asked for, those of shards before it are gone but for the one that ended the last."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for number in range(12):
            most = max(most, sum(ref() is not None for ref in alive))
            tensor = torch.full((10,), float(number))
            alive.append(weakref.ref(tensor))
            yield str(number), tensor
            del tensor

    write_checkpoint(tmp_path, stream(), 120)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert 0 < most <= 3


def test_a_shard_that_cannot_reach_the_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "flush_and_forget", full)
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(tmp_path, [("a", torch.ones(3))], ALL)

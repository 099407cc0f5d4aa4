"""The fuzzer's short form; `make fuzz` is the long one."""

from __future__ import annotations

from pathlib import Path
from random import Random

import fuzz
import pytest

from moemerge.errors import DataError


def test_fuzz_short() -> None:
    """A few hundred broken inputs: each gives a valid result or a MoemergeError."""
    report = fuzz.fuzz(len(fuzz.TARGETS) * 20, seed=1)
    assert report.failures == []
    assert sum(report.refused.values()) > 100 and sum(report.read.values()) > 10
    assert set(report.read + report.refused) == set(fuzz.TARGETS)


def test_the_fuzzer_finds_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another exception, a written file and a hang are failures; a MoemergeError is none."""

    def refuse(folder: Path) -> None:
        raise DataError("no", given="", expected="", fix="")

    def crash(folder: Path) -> None:
        raise KeyError("x")

    def write(folder: Path) -> None:
        (folder / "new").write_text("x")

    def hang(folder: Path) -> None:
        while True:
            pass

    readers = {"refuse": refuse, "crash": crash, "write": write, "hang": hang}
    monkeypatch.setattr(fuzz, "SECONDS", 3)
    monkeypatch.setattr(
        fuzz, "TARGETS", {name: fuzz.Target(lambda f, d: None, read) for name, read in readers.items()}
    )
    found = fuzz.fuzz(len(readers))
    assert dict(found.refused) == {"refuse": 1}
    assert [failure.split(":")[0] for failure in found.failures] == ["crash 0", "write 0", "hang 0"]


def test_equal_seeds_give_equal_inputs(tmp_path: Path) -> None:
    # The order of a safetensors file's metadata is drawn anew each time.
    packed = ("checkpoints", "coefficients", "routing")
    for name, target in ((n, t) for n, t in fuzz.TARGETS.items() if n not in packed):
        made = []
        for turn in "ab":
            folder = tmp_path / f"{name}-{turn}"
            folder.mkdir()
            target.make(folder, Random(f"0 {name} 3"))
            made.append([path.read_bytes() for path in sorted(folder.iterdir())])
        assert made[0] == made[1], name

"""The fuzzer's short form; `make fuzz` is the long one."""

from __future__ import annotations

import os
from pathlib import Path

import fuzz
import pytest
from fuzz_tools import Dice, Target

from moemerge.errors import DataError, MoemergeError


@pytest.mark.slow
def test_fuzz_short() -> None:
    """Some two hundred broken inputs: each gives a valid result or a MoemergeError."""
    report = fuzz.fuzz(len(fuzz.order()), seed=1)
    assert report.failures == []
    assert sum(report.refused.values()) > 100 and sum(report.read.values()) > 10
    assert set(report.read + report.refused) == set(fuzz.TARGETS)


@pytest.mark.slow
def test_the_fuzzer_finds_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another exception, a panic, a written file, a hang, the process's end; no MoemergeError."""

    def refuse(folder: Path) -> None:
        raise DataError("no", given="", expected="", fix="")

    def crash(folder: Path) -> None:
        raise KeyError("x")

    def write(folder: Path) -> None:
        (folder / "new").write_text("x")

    def hang(folder: Path) -> None:
        while True:
            pass

    def panic(folder: Path) -> None:
        raise BaseException("as Rust's panics come")

    def die(folder: Path) -> None:
        os._exit(0)

    readers = {"refuse": refuse, "crash": crash, "panic": panic, "write": write, "die": die, "hang": hang}
    monkeypatch.setattr(fuzz, "SECONDS", 3)
    table = {name: Target(lambda f, d: None, read, turns=1) for name, read in readers.items()}
    monkeypatch.setattr(fuzz, "TARGETS", {**table, "again": Target(lambda f, d: None, refuse, turns=2)})
    found = fuzz.fuzz(len(readers) + 2)
    assert dict(found.refused) == {"refuse": 1, "again": 2}
    failed = [failure.split(":")[0] for failure in found.failures]
    assert failed == [f"{name} 0" for name in readers if name != "refuse"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "heads")) for name in fuzz.TARGETS]
)
def test_inputs_that_are_not_broken_are_read(name: str, tmp_path: Path) -> None:
    """A target that refuses whatever it is given would find nothing."""
    fuzz.library()
    refused = []
    for number in range(6):
        draw, folder = Dice(number), tmp_path / str(number)
        draw.calm = True
        folder.mkdir()
        fuzz.TARGETS[name].make(folder, draw)
        try:
            fuzz.TARGETS[name].read(folder)
            return
        except MoemergeError as error:
            refused.append(str(error))
    pytest.fail(f"all are refused: {refused}")


def test_equal_seeds_give_equal_inputs(tmp_path: Path) -> None:
    # The order of a safetensors file's metadata is drawn anew each time.
    packed = ("checkpoints", "coefficients", "routing")
    for name, target in ((n, t) for n, t in fuzz.TARGETS.items() if n not in packed):
        made = []
        for turn in "ab":
            folder = tmp_path / f"{name}-{turn}"
            folder.mkdir()
            target.make(folder, Dice(f"0 {name} 3"))
            texts = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
            here = str(folder).encode()
            made.append({str(name): path.read_bytes().replace(here, b"") for name, path in texts.items()})
        assert made[0] == made[1], name

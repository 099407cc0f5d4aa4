"""The torture harness in short, and that it sees a broken promise when there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save_dense
from torture import Known, digests, look
from torture_forks import Ending
from torture_scenarios import Scenario, scenarios

import moemerge
from moemerge.artifacts.stage import artifact
from moemerge.options.upcycle import Upcycle
from moemerge.stages import ROWS

HERE = Path(__file__).parent
GOOD = Ending(0, "done", 1.0)
FOUR = "disk full\n  given: 1\n  expected: 2\n  to fix: 3"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, tmpfs and the preloaded shim")
def test_twenty_kills_and_bad_disks_break_no_promise() -> None:
    same = {
        "PYTHONPATH": os.pathsep.join([str(Path(moemerge.__file__).parent.parent), *sys.path])
    }  # of the moemerge under test
    command = [sys.executable, str(HERE / "torture.py"), "--trials", "21", "--seed", "5", "--stages"]
    done = subprocess.run(
        [*command, "upcycle", "merge", "overwrite"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **same},
    )
    assert "21 trials, 0 broken promises" in done.stdout, done.stdout + done.stderr[-2000:]
    assert done.returncode == 0 and re.search(r"killed at a time: exit codes .*-9: \d", done.stdout)
    strikes = re.findall(r"(\d+) of (\d+) struck before", done.stdout)
    assert strikes and all(struck == tried != "0" for struck, tried in strikes), done.stdout


def test_every_stage_is_tortured(tmp_path: Path) -> None:
    named = [scenario.name for scenario in scenarios(tmp_path, tmp_path, tmp_path)]
    others = ["decode", "overwrite", "run", "combine"]
    assert sorted(named) == sorted([*(row.command for row in ROWS), *others])


@pytest.fixture
def known(tmp_path: Path) -> Known:
    """A whole output of a stage, and the inputs that it had."""
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "rows").write_text("row")
    output = tmp_path / "work" / "out"
    with artifact("upcycle", Upcycle(model="org/dense", output=output)) as draft:
        save_dense(draft.folder)
    return Known(Scenario("upcycle", [], output), 1.0, 1, 1, digests(output))


def broken(known: Known, ending: Ending, harm: Callable[[Path, Path], object]) -> list[str]:
    """What `look` says after `harm` was done to output and inputs."""
    output, inputs = known.scenario.output, known.scenario.home.parent / "inputs"
    given = digests(inputs)
    harm(output, inputs)
    return list(look(known, ending, lambda: digests(inputs), given))


def nothing(output: Path, inputs: Path) -> None:
    pass


def test_a_good_end_breaks_nothing(known: Known) -> None:
    assert broken(known, GOOD, nothing) == []
    assert broken(known, Ending(2, FOUR, 1.0), nothing) == []
    assert broken(known, Ending(-9, "", 1.0), nothing) == []


@pytest.mark.parametrize(
    ("ending", "seen"),
    [
        (Ending(1, "Traceback (most recent call last):\nValueError: x", 1.0), "traceback"),
        (Ending(1, "", 1.0), "exit code 1"),
        (Ending(2, "it failed", 1.0), "not in four parts"),
    ],
)
def test_what_is_printed_is_looked_at(ending: Ending, seen: str, known: Known) -> None:
    assert any(seen in one for one in broken(known, ending, nothing))


HARMS: dict[str, Callable[[Path, Path], object]] = {
    "not what its manifest says": lambda output, _: (output / "config.json").write_text("{}"),
    "inputs changed": lambda _, inputs: (inputs / "rows").write_text("other"),
    "says done, has no output": lambda output, _: output.rename(output.with_name(".draft.tmp")),
    "No such file": lambda output, _: (output / "manifest.json").rename(output / "other.json"),
}


@pytest.mark.parametrize("seen", HARMS)
def test_what_is_left_is_looked_at(seen: str, known: Known) -> None:
    assert any(seen in one for one in broken(known, GOOD, HARMS[seen]))


def test_other_bytes_in_a_whole_output_are_seen(known: Known) -> None:
    other = Known(known.scenario, 1.0, 1, 1, {**known.digests, "config.json": "0"})
    assert broken(other, GOOD, nothing) == ["other bytes than an undisturbed run: config.json"]

"""Kills, full disks and failing writes, hundreds of times, against every stage; are the promises kept?

    python tests/promises/torture.py [--trials 600] [--minutes 240] [--seed 0] [--stages merge train ...]
        [--ways "killed at a time" ...]

What is promised, whatever happens to a command: an output that exists is whole (its manifest's files, nothing
else, and the bytes of an undisturbed run); inputs do not change; no traceback is printed, and a failure that
the command survives is told in four parts with exit code 2; the command, repeated, gives the same bytes.

The stages run in forks of this process, which has imported everything: a trial takes as long as the stage.
"""

from __future__ import annotations

import argparse
import errno
import gc
import hashlib
import importlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "support"))

import environment  # noqa: F401  (one thread, no network)
from torture_forks import SHIM, Ending, arm, fork, in_a_fork, preload_and_restart

if __name__ == "__main__":  # before all that takes seconds to import
    preload_and_restart()

from torture_scenarios import MEASURED, NEEDED, Scenario, make_inputs, prepare, scenarios

from moemerge.stages import STAGES

RUN_PAGE = {"report.html", "report.md"}
KILL, FAIL, FULL = 1, 2, 3  # as faulty_disk.c has them
WAYS = (
    "killed at a time",
    "killed at a call",
    "EIO",
    "full disk (shim)",
    "full disk (tmpfs)",
    "file limit",
    "signal",
)
KILLS = WAYS[:2]  # twice in every round
TIMED = ("killed at a time", "signal")
TRIES = 12  # of a signal at a time, each at half the delay of the one before: the last comes at once
Digests = dict[str, str]


@dataclass
class Known:
    """A scenario, and what an undisturbed run of it takes and gives."""

    scenario: Scenario
    seconds: float
    calls: int
    bytes: int
    digests: Digests


@dataclass
class Tally:
    """What became of the trials, by stage and way; the broken promises in words.

    `struck` counts, by way, the signals at a time that came before the command's end.
    """

    trials: Counter = field(default_factory=Counter)
    struck: Counter = field(default_factory=Counter)
    endings: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list)
    leftovers: Counter = field(default_factory=Counter)


# --- what is looked at afterwards


def digests(folder: Path) -> Digests:
    """sha256 of all files below, by name; not of manifests, hidden files, a run's page with times."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"]
    named = {p.relative_to(folder).as_posix(): p for p in files}
    if not (folder / "manifest.json").exists():
        named = {name: path for name, path in named.items() if name not in RUN_PAGE}
    visible = {n: p for n, p in named.items() if not any(part.startswith(".") for part in n.split("/"))}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in visible.items()}


def broken_artifacts(folder: Path, of_a_run: bool) -> Iterator[str]:
    """What is wrong with an artifact, or those of a run: no manifest, files missing, added or changed."""
    for home in _steps(folder) if of_a_run else [folder]:
        try:
            wanted = json.loads((home / "manifest.json").read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            yield f"{home.name}: {error}"
            continue
        if {name: record["sha256"] for name, record in wanted.items()} != digests(home):
            yield f"{home.name}: not what its manifest says"


def _steps(run: Path) -> Iterator[Path]:
    """The folders of a run's steps; a folder that holds nothing but such folders is none."""
    for path in (path for path in sorted(run.iterdir()) if path.is_dir() and path.name[0] != "."):
        inside = [child for child in path.iterdir() if child.name[0] != "."]
        yield from _steps(path) if all(child.is_dir() for child in inside) else [path]


def look(known: Known, ending: Ending, inputs: Callable[[], Digests], given: Digests) -> Iterator[str]:
    """The promises that the end of a command broke."""
    output = known.scenario.output
    if "Traceback" in ending.text or "Exception ignored" in ending.text:
        yield f"traceback: {ending.text.strip().splitlines()[-1][:200]}"
    parts = ("given:", "expected:", "to fix:")
    if ending.code == 2 and not all(part in ending.text for part in parts):
        yield f"not in four parts: {ending.text.strip()[-200:]}"
    if ending.code not in (0, 2, 130, 143, -signal.SIGKILL, -signal.SIGTERM):
        yield f"exit code {ending.code}"
    if inputs() != given:
        yield "inputs changed"
    if output.exists():
        yield from broken_artifacts(output, known.scenario.again)
    elif ending.code == 0:
        yield "says done, has no output"
    yield from _other_bytes(known, ending)


def _other_bytes(known: Known, ending: Ending) -> Iterator[str]:
    scenario, whole = known.scenario, [known.digests]
    if scenario.before is not None and ending.code != 0:
        whole.append(digests(scenario.before))
    if scenario.before is not None and not scenario.output.exists():
        yield "the old output is gone before the new one is there"
    elif scenario.again and ending.code != 0:
        made = digests(scenario.output) if scenario.output.exists() else {}
        wrong = [name for name in made if "/" in name and made[name] != known.digests.get(name)]
        yield from (f"other bytes in {name}" for name in wrong)
    elif scenario.output.exists() and digests(scenario.output) not in whole:
        found, wanted = digests(scenario.output), known.digests
        names = sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name))
        yield f"other bytes than an undisturbed run: {', '.join(names[:5])}"


# --- trials


@dataclass(frozen=True)
class Trial:
    """How to spoil a command: from within (`spoil`), from outside (`delay`, `kind`), by its disk (`room`)."""

    way: str
    spoil: Callable[[], None] = lambda: None
    delay: float | None = None
    kind: int = signal.SIGKILL
    room: int | None = None


def draw(way: str, known: Known, dice: random.Random) -> Trial:
    """A trial of this way, at a random point."""
    at = dice.randint(1, max(1, known.calls))
    if way == "killed at a time":
        return Trial(way, delay=dice.uniform(0, known.seconds))
    if way == "signal":
        return Trial(
            way, delay=dice.uniform(0, known.seconds), kind=dice.choice((signal.SIGINT, signal.SIGTERM))
        )
    if way == "full disk (tmpfs)":
        return Trial(way, room=dice.randint(1, max(1, known.bytes // 4096)) * 4096)
    if way == "file limit":
        size = dice.randint(8 << 10, 128 << 10)  # what is printed is shorter
        return Trial(way, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))
    action, error = {"killed at a call": (KILL, 0), "EIO": (FAIL, errno.EIO)}.get(way, (FULL, errno.ENOSPC))
    return Trial(way, lambda: arm(at, action, error))


def attempt(known: Known, trial: Trial, inputs: Callable[[], Digests], given: Digests, tally: Tally) -> None:
    """One trial. A signal that came after the command's end is sent again, earlier, until it strikes.

    How long a command takes was measured once, and may be less now; a kill that is late would test nothing.
    """
    scenario = known.scenario
    tally.trials[scenario.name, trial.way] += 1
    for _ in range(TRIES):
        code = spoil(known, trial, inputs, given, tally)
        if trial.delay is None:
            return
        if code != 0:
            tally.struck[trial.way] += 1
            return
        trial = replace(trial, delay=trial.delay / 2)
    tally.faults.append(f"{scenario.name}, {trial.way}: {TRIES} signals, and all came after its end")


def spoil(known: Known, trial: Trial, inputs: Callable[[], Digests], given: Digests, tally: Tally) -> int:
    """Spoil one command, look at what it left, repeat it undisturbed, look again; the first exit code."""
    scenario = known.scenario
    with disk(scenario.home, trial.room):
        prepare(scenario)
        if trial.room is not None:
            resize(scenario.home, shutil.disk_usage(scenario.home).used + trial.room)
        ending = fork(scenario.arguments, scenario.home, trial.spoil, trial.delay, trial.kind)
        code, where = ending.code, f"{scenario.name}, {trial.way}"
        tally.endings[trial.way][code] += 1
        tally.faults += [f"{where}: {one}" for one in look(known, ending, inputs, given)]
        if trial.room is not None:
            resize(scenario.home, 1 << 30)
        if code != 0 and (scenario.again or scenario.before or not scenario.output.exists()):
            ending = fork(scenario.arguments, scenario.home, lambda: None, None, signal.SIGKILL)
            again = [
                *look(known, ending, inputs, given),
                *([f"exit code {ending.code}"] if ending.code else []),
            ]
            tally.faults += [f"{where}, repeated: {one}" for one in again]
        hidden = [path.name for path in scenario.home.rglob(".*") if not path.name.endswith("lock")]
        tally.leftovers[scenario.name] += len(hidden) > 0
    return code


@contextmanager
def disk(folder: Path, room: int | None) -> Iterator[None]:
    """A file system of its own at `folder`, to be cut to size; the one that is there if `room` is None."""
    if room is None:
        yield
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def may_mount(folder: Path) -> bool:
    if os.geteuid() != 0:
        return False
    (folder / "probe").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder / "probe")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", str(folder / "probe")], check=True)
    return True


# --- the whole


def import_all(only: list[str]) -> None:
    """What the stages import, so that forks need not. Nothing is computed: that could start threads."""
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification  # noqa: F401

    if not only:
        import matplotlib.pyplot  # noqa: F401
        import trl  # noqa: F401
    for name in STAGES:
        if not only or name in only or name in NEEDED:
            STAGES.get(name)
    logging.getLogger().handlers.clear()


def references(all_scenarios: list[Scenario], made: Path, only: list[str]) -> Iterator[Known]:
    """Run each scenario twice undisturbed; both must give the same bytes. The second one's times count.

    What is only read by those that are tortured runs once.
    """
    for scenario in all_scenarios:
        for _ in range(2 if not only or scenario.name in only else 1):
            before = digests(scenario.output) if scenario.output.exists() else None
            prepare(scenario)
            ending = fork(scenario.arguments, scenario.home, lambda: None, None, signal.SIGKILL)
            if ending.code != 0 or list(broken_artifacts(scenario.output, scenario.again)):
                raise RuntimeError(f"{scenario.name} fails undisturbed:\n{ending.text}")
            for name in ending.modules:
                with suppress(Exception):
                    importlib.import_module(name)
            gc.collect()
            gc.freeze()
        found = digests(scenario.output)
        if scenario.before is None and before is not None and found != before:
            other = [name for name in found if found[name] != before.get(name)]
            raise RuntimeError(f"{scenario.name}: two undisturbed runs differ in {other}")
        size = sum(path.stat().st_size for path in scenario.home.rglob("*") if path.is_file())
        shutil.copytree(scenario.output, made / scenario.name)
        shutil.rmtree(scenario.home)
        yield Known(scenario, ending.seconds, ending.calls, size, found)


def torture(
    root: Path, trials: int, seed: int, only: list[str], minutes: float, wanted_ways: list[str] | None = None
) -> Tally:
    """`trials` trials over the stages named in `only` and the `wanted_ways` (all if empty), spread over both.

    After `minutes` no more of them are begun.
    """
    deadline = time.monotonic() + 60 * minutes
    import_all(only)
    inputs, made, work = (root / name for name in ("inputs", "made", "work"))
    work.mkdir()
    in_a_fork(lambda: make_inputs(inputs, measured=not only or bool(MEASURED & {*only})))
    wanted = [
        one for one in scenarios(inputs, made, work) if not only or one.name in only or one.name in NEEDED
    ]
    known = [one for one in references(wanted, made, only) if not only or one.scenario.name in only]
    for one in known:
        say(f"{one.scenario.name:<10} {one.seconds:6.2f} s, {one.calls} calls that write, {one.bytes} bytes")
    ways = [way for way in wanted_ways or WAYS if _possible(way, root)]
    tally, dice = Tally(), random.Random(seed)

    def read() -> Digests:
        return {**digests(inputs), **{f"made/{name}": one for name, one in digests(made).items()}}

    given = read()
    for number, (one, way) in enumerate(islice(_rounds(known, ways, dice), trials)):
        seen = len(tally.faults)
        attempt(one, draw(way, one, dice), read, given, tally)
        for fault in tally.faults[seen:]:
            say(f"broken: {fault}")
        if (number + 1) % 20 == 0:
            say(f"{number + 1} trials, {len(tally.faults)} broken promises")
        if time.monotonic() > deadline:
            break
    return tally


def _rounds(known: list[Known], ways: list[str], dice: random.Random) -> Iterator[tuple[Known, str]]:
    """All stages in all ways, round after round, slow ones in a share of the rounds."""
    while True:
        for way in (*ways, *(way for way in KILLS if way in ways)):
            yield from ((one, way) for one in known if dice.random() < one.scenario.share)


def _possible(way: str, root: Path) -> bool:
    if way in ("killed at a call", "EIO", "full disk (shim)"):
        return bool(os.environ.get(SHIM))
    return way != "full disk (tmpfs)" or may_mount(root)


def table(tally: Tally) -> str:
    """Trials by stage and way, endings by way, broken promises."""
    stages = list(dict.fromkeys(stage for stage, _ in tally.trials))
    ways = [way for way in WAYS if any(way == used for _, used in tally.trials)]
    lines = ["| stage | " + " | ".join(ways) + " | all |", "| --- " * (len(ways) + 2) + "|"]
    for stage in stages:
        counts = [tally.trials[stage, way] for way in ways]
        lines.append(f"| {stage} | " + " | ".join(map(str, [*counts, sum(counts)])) + " |")
    counts = [sum(tally.trials[stage, way] for stage in stages) for way in ways]
    lines.append("| all | " + " | ".join(map(str, [*counts, sum(counts)])) + " |")
    for way in ways:
        lines.append(f"{way}: exit codes {dict(sorted(tally.endings[way].items()))}")
        if way in TIMED:
            count = sum(tally.trials[stage, way] for stage in stages)
            lines.append(f"{way}: {tally.struck[way]} of {count} struck before the command's end")
    lines.append(f"stages with leftovers after the repeated command: {dict(+tally.leftovers)}")
    lines += [f"{count} x {text}" for text, count in Counter(tally.faults).most_common()]
    return "\n".join([*lines, f"{sum(counts)} trials, {len(tally.faults)} broken promises"])


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", default=[])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=[])
    parser.add_argument("--minutes", type=float, default=240.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        started = time.perf_counter()
        tally = torture(root, given.trials, given.seed, given.stages, given.minutes, given.ways)
        say(table(tally))
        say(f"{time.perf_counter() - started:.0f} s, seed {given.seed}")
    return int(bool(tally.faults))


if __name__ == "__main__":
    sys.exit(main())

"""Mutation fuzzing of everything that moemerge reads from elsewhere: a valid result or a MoemergeError.

`python tests/promises/fuzz.py --count 20000 --seed 0` prints counts, and exits with 1 if an input led to
another exception, took longer than SECONDS, needed more than MEMORY, ended the process, or changed a file.
Inputs are good ones, in pieces: bytes flipped, cut, doubled, spliced, swapped for awkward ones; structure
kept where a checksum or length would stop a blind mutation too early. What is read how, fuzz_targets.py says.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "support"))

import environment  # noqa: F401  (one thread, no network)
from fuzz_library import library
from fuzz_targets import TARGETS
from fuzz_tools import Dice

from moemerge.errors import MoemergeError

SECONDS = 20
MEMORY = 8 * 2**30  # of address space, above what the process has at the start
READ, REFUSED = "read", "refused"


@dataclass
class Report:
    """What came of the inputs, by target: how many were read, how many refused; and those that failed."""

    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, number: int, outcome: str) -> None:
        """Count input `number` of a target: read, refused, or in words what went wrong."""
        if outcome in (READ, REFUSED):
            (self.read if outcome == READ else self.refused)[name] += 1
        else:
            self.failures.append(f"{name} {number}: {outcome}")

    def table(self) -> str:
        """Counts in a line per target."""
        lines = [f"{name:<16} {self.read[name]:>6} read  {self.refused[name]:>6} refused" for name in TARGETS]
        total = sum(self.read.values()) + sum(self.refused.values()) + len(self.failures)
        return "\n".join([*lines, f"{total} inputs, {len(self.failures)} failures"])


class TooSlow(BaseException):
    """An input took longer than SECONDS; no `except Exception` takes it for a fault of the input."""


class _Formatted(logging.Handler):
    """Puts every message together, as a terminal would, and shows none."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


@contextmanager
def limits() -> Iterator[None]:
    """Time for one input."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file in `folder` and what it holds."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def order() -> list[tuple[str, int]]:
    """The targets of one round, each with the number of its turn."""
    turns = range(max(target.turns for target in TARGETS.values()))
    return [(name, turn) for turn in turns for name, target in TARGETS.items() if turn < target.turns]


def one(name: str, number: int, seed: int) -> str:
    """Make and read input `number` of a target; equal arguments give equal inputs. What came of it."""
    target, draw = TARGETS[name], Dice(f"{seed} {name} {number}")
    with tempfile.TemporaryDirectory(prefix="moemerge-fuzz-") as home:
        folder = Path(home)
        target.make(folder, draw)
        before = files_of(folder)
        try:
            with limits():
                target.read(folder)
            outcome = READ
        except MoemergeError:
            outcome = REFUSED
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            last = "".join(traceback.format_exception(error)[-3:])
            outcome = f"{type(error).__name__}: {error}\n{last}"[:3000]
        return outcome if files_of(folder) == before else "files were changed"


def fuzz(count: int, seed: int = 0) -> Report:
    """Read `count` broken inputs, in rounds of all targets.

    They are read in a fork of this process, and after one that ended the fork in another.
    """
    library()
    rounds, report, done = order(), Report(), 0
    turns = Counter(name for name, _ in rounds)
    inputs = [
        (name, count_before * turns[name] + turn)
        for count_before in range(-(-count // len(rounds)))
        for name, turn in rounds
    ][:count]
    with suppress(KeyboardInterrupt):  # an interrupt ends early, with the counts so far
        while done < count:
            for outcome in _outcomes(inputs[done:], seed):
                report.add(*inputs[done], outcome)
                done += 1
    return report


def _outcomes(inputs: list[tuple[str, int]], seed: int) -> Iterator[str]:
    """What came of one input after the other, up to the first that ends the process which reads them."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _read_all(inputs, seed, writer)
    os.close(writer)
    told = 0
    for line in _lines(reader):
        told += 1
        yield json.loads(line)
    os.close(reader)
    os.kill(child, signal.SIGKILL)  # it has ended, or hangs; until it is waited for, its number is its own
    _, status = os.waitpid(child, 0)
    if told < len(inputs):
        yield f"the process ended, or hung in what is not Python: status {status}"


def _lines(reader: int) -> Iterator[bytes]:
    """Lines of a pipe until its writer is gone, or says nothing for twice the time that an input may take."""
    rest = b""
    while select.select([reader], [], [], 2 * SECONDS)[0] and (piece := os.read(reader, 1 << 16)):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def _read_all(inputs: list[tuple[str, int]], seed: int, writer: int) -> None:
    try:
        for name, number in inputs:
            os.write(writer, json.dumps(one(name, number, seed)).encode() + b"\n")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def limit_memory() -> None:
    """Keep the process from taking more than MEMORY on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    """Fuzz, print the counts and every failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(handlers=[_Formatted()], level=logging.INFO, force=True)
    warnings.simplefilter("ignore")
    library()
    limit_memory()
    clock = time.perf_counter()
    report = fuzz(given.count, given.seed)
    print(*report.failures, report.table(), f"{time.perf_counter() - clock:.0f} s", sep="\n")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())

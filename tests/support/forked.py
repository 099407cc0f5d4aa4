"""Work in a process of its own that pays for no imports: a fork of this one."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from tempfile import TemporaryFile
from typing import IO, NamedTuple

PATIENCE = 600  # seconds, after which a fork that hangs is ended


class Ended(NamedTuple):
    """How a process ended: exit code (negative: the signal that killed it), what it printed."""

    code: int
    out: str
    err: str


def forked(work: Callable[[], object]) -> Ended:
    """`work` in a fork, to its end; the code is that of a SystemExit, 1 after any other exception."""
    return forked_together([work])[0]


def forked_together(works: Sequence[Callable[[], object]]) -> list[Ended]:
    """Each work in a fork, all at the same time, to the end of all."""
    started = [_start(work) for work in works]
    return [_end(*one) for one in started]


def _start(work: Callable[[], object]) -> tuple[int, IO[bytes], IO[bytes]]:
    out, err = TemporaryFile(), TemporaryFile()
    child = os.fork()
    if child == 0:
        _be(work, out, err)
    return child, out, err


def _be(work: Callable[[], object], out: IO[bytes], err: IO[bytes]) -> None:
    code = 1
    signal.alarm(PATIENCE)
    try:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(code)


def _end(child: int, out: IO[bytes], err: IO[bytes]) -> Ended:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    told = []
    for file in (out, err):
        with file:
            file.seek(0)
            told.append(file.read().decode(errors="replace"))
    return Ended(code, *told)

"""Commands in forks of one warm process, and the disk under them that fails when told to (faulty_disk.c)."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
SHIM = "MOEMERGE_FAULTY_DISK"
PATIENCE = 300.0


@dataclass
class Ending:
    """How a command ended: exit code (negative: the signal), what it printed, seconds, calls that write."""

    code: int
    text: str
    seconds: float
    calls: int = 0
    modules: list[str] = field(default_factory=list)


def fork(
    arguments: list[str], home: Path, spoil: Callable[[], None], delay: float | None, kind: int
) -> Ending:
    """Run the command line in a fork; `spoil` is called in it first; signal `kind` is sent after `delay`."""
    log, report = home.parent / "log", home.parent / "report"
    log.unlink(missing_ok=True)
    report.unlink(missing_ok=True)
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _be_the_command(arguments, log, report, spoil)
    code = _await(child, started, delay, kind)
    seconds = time.perf_counter() - started
    told = json.loads(report.read_text()) if report.exists() else {}
    return Ending(code, log.read_text(errors="replace") if log.exists() else "", seconds, **told)


def _be_the_command(arguments: list[str], log: Path, report: Path, spoil: Callable[[], None]) -> None:
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1), os.dup2(handle, 2)
        before = set(sys.modules)
        arm(0)
        spoil()
        code = _run(arguments)
        told = {"calls": counted(), "modules": sorted(set(sys.modules) - before)}
        arm(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        report.write_text(json.dumps(told))
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str]) -> int:
    from moemerge.run import cli

    try:
        cli.main(arguments)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)


def _await(child: int, started: float, delay: float | None, kind: int) -> int:
    """The child's exit code; sends the signal on the way, and ends a child that hangs."""
    due = None if delay is None else started + delay
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        now = time.perf_counter()
        if due is not None and now >= due:
            os.kill(child, kind)
            due = None
        if now - started > PATIENCE:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError("a command hangs")
        time.sleep(0.0005 if due is not None and due - now < 0.01 else 0.002)


def arm(at: int, action: int = 0, error: int = 0) -> None:
    """Tell the shim which call to spoil; nothing without it."""
    if os.environ.get(SHIM):
        ctypes.CDLL(None).arm(ctypes.c_long(at), action, error)


def counted() -> int:
    return int(ctypes.CDLL(None).counted()) if os.environ.get(SHIM) else 0


def in_a_fork(work: Callable[[], None]) -> None:
    """`work` in a fork, so that what it imports and starts is not here; RuntimeError if it fails."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("the inputs could not be made")


def preload_and_restart() -> None:
    """Compile the shim and start this program again under it; without a compiler, go on without."""
    if not sys.platform.startswith("linux"):
        return
    if SHIM in os.environ:  # started again: the shim is in memory, and other programs shall not have it
        os.environ.pop("LD_PRELOAD", None)
        if os.environ[SHIM]:
            shutil.rmtree(Path(os.environ[SHIM]).parent)
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    os.environ[SHIM] = ""
    if compiler is not None:
        library = Path(tempfile.mkdtemp()) / "faulty_disk.so"
        command = [
            compiler,
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            str(library),
            str(HERE / "faulty_disk.c"),
            "-ldl",
        ]
        subprocess.run(command, check=True)
        os.environ |= {SHIM: str(library), "LD_PRELOAD": str(library)}
    os.execv(sys.executable, [sys.executable, *sys.argv])

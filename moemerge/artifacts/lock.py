"""One process per folder: a lock that goes with the process, however it ends."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moemerge.errors import ArtifactError

NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}

log = logging.getLogger(__name__)


def lock_of(output: Path) -> Path:
    """The file beside `output` that is locked while it is made."""
    return output.with_name(f".{output.name}.lock")


@contextmanager
def hold(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stands for `folder`; it is gone afterwards.

    Raises ArtifactError if another process, or this one elsewhere, holds it. A file that a killed process
    left is no lock: the system lets go of it. Without locks in the file system there is a warning only.
    """
    handle = _acquire(path, folder)
    try:
        yield
    finally:
        # Removed while it is held: whoever has opened it by then sees that it has lost its name.
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, folder: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _lock(handle, path, folder)
            if _is_named(handle, path):
                _sign(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        raise ArtifactError(
            "another run is at work in this folder",
            given=f"{folder}, held by {holder or 'another process'}",
            expected="one run or stage per folder at a time",
            fix="wait for it, or choose another output",
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
        log.warning("%s: the file system has no locks; see to it that nothing else writes there", folder)


def _is_named(handle: int, path: Path) -> bool:
    """Whether `path` is still the file that is locked: the holder before may have removed it meanwhile."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _sign(handle: int) -> None:
    with suppress(OSError):  # who holds it is a help, no need: the disk may be full
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

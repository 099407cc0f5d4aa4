"""Putting files on the disk so that a kill, a power cut or a full disk leaves the old or the new, whole."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from moemerge.errors import ArtifactError, MoemergeError, first_line

THREADS = 8
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
DRAFT = r"\.{name}\.[a-z0-9_]{{8}}\.tmp"
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EFBIG: "the file system takes no file of this size",
    errno.EIO: "the disk does not work as it should",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is missing",
    errno.EPERM: "permission is missing",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EEXIST: "a file is where a folder should be",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "a link is where a file should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
}
WRAPPED_BY_LIBRARIES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
# torch's writer has no number, and says the same whatever is wrong with the disk.
FULL_DISK_WORDS = (
    "PytorchStreamWriter failed",
    "No space left",
    "inline_container.cc",
    "iostream error",
)
NOT_FOR_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF}


def flush(path: Path) -> None:
    """Wait until the file or the folder's list of names is on the disk, where the system can say so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NOT_FOR_FOLDERS):
            raise
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Flush everything in `folder`, and itself."""
    with ThreadPoolExecutor(THREADS) as pool:  # what waits for the disk at the same time waits together
        list(pool.map(flush, [path for path in folder.rglob("*") if not path.is_symlink()]))
    flush(folder)


def flush_and_forget(path: Path) -> None:
    """Flush a file, and drop the system's copy in memory: who reads it next reads the disk."""
    flush(path)
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write `text` so that `path` holds either its old content or all of the new.

    errors: what becomes of characters that UTF-8 cannot hold, as for open().
    """
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8", errors=errors)
    flush(new)
    new.replace(path)
    flush(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to the file `source`, or a copy where the file system has no links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def exists(path: Path) -> bool:
    """Whether there is anything at `path`, a dangling link included."""
    return os.path.lexists(path)


def remove(path: Path) -> None:
    """Remove a folder, file or link; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def new_draft(output: Path) -> Path:
    """A new folder beside `output`, to be put in its place when it is whole."""
    # Not by tempfile, whose folders are closed to all others, whatever the umask says.
    draft = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    draft.mkdir()
    return draft


def usual_mode(folder: Path) -> int:
    """The mode that the umask gives to a new file in `folder`."""
    probe = folder / f".{secrets.token_hex(4)}.mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def obey_umask(folder: Path) -> None:
    """Give the files in `folder` the usual mode: safetensors and others close theirs to all but the owner.

    Files that have other names too are left as they are: they may be someone else's.
    """
    mode = usual_mode(folder)
    for path in folder.rglob("*"):
        if stat.S_ISREG(path.lstat().st_mode) and path.stat().st_nlink == 1:
            path.chmod(mode)


@contextmanager
def parents(output: Path) -> Iterator[None]:
    """Make the folders that `output` is to lie in; those still empty at the end are removed again."""
    made = [folder for folder in output.absolute().parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):  # the first that holds something, or was not made
            for folder in made:
                folder.rmdir()


def put_in_place(folder: Path, output: Path) -> None:
    """Give `folder`, flushed before, the name `output`. What was there is kept until then, and removed after.

    The two are exchanged in one step where the system can. Elsewhere the old one steps aside first; if the
    process dies between, `recover` puts it back.
    """
    aside = _aside(output)
    if not exists(output):
        folder.rename(output)
    elif not _exchange(folder, output):
        output.rename(aside)
        folder.rename(output)
    flush(output.parent)
    remove(folder)
    remove(aside)


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.old.tmp")


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0)


def recover(output: Path) -> None:
    """Undo what a killed process left: an old output goes back to its place, drafts are removed.

    For whoever holds the output's lock.
    """
    aside = _aside(output)
    if exists(aside) and not exists(output):
        aside.rename(output)
    for path in leftovers(output):
        remove(path)


def leftovers(output: Path) -> list[Path]:
    """Drafts, and an old output that stepped aside, which a killed process left beside `output`."""
    draft = re.compile(DRAFT.format(name=re.escape(output.name)))
    neighbours = output.parent.iterdir() if output.parent.is_dir() else ()
    return [path for path in neighbours if path == _aside(output) or draft.fullmatch(path.name)]


def require_space(folder: Path, needed: int) -> None:
    """Raise ArtifactError unless the disk of `folder` has room for `needed` bytes."""
    free = free_space(folder)
    if free < needed:
        raise ArtifactError(
            "not enough space on the disk",
            given=f"{in_words(free)} free for {folder}",
            expected=f"{in_words(needed)}",
            fix=f"free {in_words(needed - free)}, or choose an output on another disk",
        )


def free_space(folder: Path) -> int:
    """Bytes free on the disk where `folder` is or is to be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def size_of(folder: Path) -> int:
    """Bytes of all files in `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def in_words(size: int) -> str:
    """`size` bytes as GB, MB or kB."""
    unit, factor = next((u for u in (("GB", 10**9), ("MB", 10**6)) if size >= u[1]), ("kB", 1000))
    return f"{size / factor:.1f} {unit}"


@contextmanager
def disk_faults(
    output: Path, folder: Path | None = None, needed: Callable[[], int | None] = lambda: None
) -> Iterator[None]:
    """An ArtifactError for what keeps `output` from being written; `folder` is its draft, if there is one.

    needed: gives the bytes that the whole output takes, if that is known by then.
    """
    try:
        yield
    except MoemergeError:
        raise
    except Exception as error:
        code = _errno(error)
        if code is None:
            raise
        written = size_of(folder) if folder is not None and folder.is_dir() else 0
        free = free_space(output)
        raise ArtifactError(
            f"{output} cannot be made: {REASONS[code]}",
            given=f"{first_line(error)}; {in_words(written)} written, {in_words(free)} left free",
            expected=_expected(code, output, written, needed()),
            fix="correct that, or choose another output, then run the same command again; nothing was left "
            "that looks complete",
        ) from error


def _expected(code: int, output: Path, written: int, needed: int | None) -> str:
    if code not in (errno.ENOSPC, errno.EDQUOT):
        return f"files that can be read, and a disk that can be written, at {output.parent}"
    return f"room for {in_words(needed)}" if needed else f"room for more than {in_words(written)}"


def _errno(error: BaseException) -> int | None:
    """The system's error behind `error`: its own, or one that a library wrapped or put into words."""
    if isinstance(error, OSError) and error.errno in REASONS:
        return error.errno
    cause: BaseException | None = error
    while cause is not None:
        code = cause.errno if isinstance(cause, OSError) else _errno_in_words(str(cause))
        if code in WRAPPED_BY_LIBRARIES:
            return code
        cause = cause.__cause__ or cause.__context__
    return None


def _errno_in_words(text: str) -> int | None:
    """The number in a message of safetensors; torch's writer only says that it failed."""
    number = re.search(r"\(os error (\d+)\)", text)
    if number:
        return int(number.group(1))
    return errno.ENOSPC if any(words in text for words in FULL_DISK_WORDS) else None

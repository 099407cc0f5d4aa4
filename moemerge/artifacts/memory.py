"""Too little memory: a fault of the machine, whichever library says so and whoever took it for another."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moemerge.errors import ArtifactError, MoemergeError, first_line

# As torch, GPUs, the system, C++, threads without a stack and libraries that cannot be loaded say it.
WORDS = (
    "allocate memory",
    "out of memory",
    "os error 12",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
)


def shortage(error: BaseException | None) -> BaseException | None:
    """The exception behind `error`, or itself, that says that memory ran out; None if there is none."""
    while error is not None:
        system = isinstance(error, OSError) and error.errno == errno.ENOMEM
        quoted = isinstance(error, MoemergeError)  # of what it wraps, or of a user's data
        if isinstance(error, MemoryError) or system or any(w in str(error) for w in WORDS if not quoted):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def memory_faults(output: Path) -> Iterator[None]:
    """An ArtifactError where memory runs out before `output` is made."""
    try:
        yield
    except Exception as error:
        short = shortage(error)
        if short is None:
            raise
        raise ArtifactError(
            f"{output} cannot be made: there is too little memory",
            given=first_line(short) if str(short) else "no memory is left",
            expected="memory for the model, and for a batch of texts where texts are read",
            fix="close what else runs, raise the limit (ulimit -v), lower batch_tokens or batch_size, or "
            "take a larger machine, then run the same command again; nothing was left that looks complete",
        ) from error

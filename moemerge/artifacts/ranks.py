"""Which of several processes this one is, by what torchrun and accelerate launch put into its environment."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from moemerge.errors import ArtifactError, OptionError

PATIENCE = timedelta(seconds=5)
LONGEST_SLEEP = 0.5  # seconds between looks at whether the first process is done
_asked = itertools.count()  # processes ask in the same order
OF_OTHERS = re.compile(r"^Dist\w*Error|gloo|nccl|[Cc]onnection (closed|reset|refused)", re.IGNORECASE)


def several() -> bool:
    """Whether other processes do the same work together with this one."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def leads() -> bool:
    """Whether this is the only process, or the first of several: the one that writes and tells."""
    return os.environ.get("RANK", "0") == "0"


def number() -> int:
    """Which of the processes that do the same work together this is, from 0."""
    return int(os.environ["RANK"]) if several() else 0


def count() -> int:
    """How many processes do the same work together."""
    return int(os.environ["WORLD_SIZE"]) if several() else 1


def first_to_fail() -> bool:
    """Whether this process is the first to end with an error, of those that work together: it alone tells.

    They agree in the store at which they met. Where that has gone, all tell.
    """
    if not several():
        return True
    mine = os.environ["RANK"]
    try:
        return bool(_store().compare_set(_key("failed"), "", mine).decode() == mine)
    except (RuntimeError, ValueError, LookupError):
        return True


def led(make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON values: the first of several processes makes it, the others wait for it.

    For long reading of files before the processes have joined: they meet in torchrun's store. Where that is
    not there, or the first one fails, each makes it itself, and so finds the same fault.
    """
    if not several() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return make()
    store, key = _store(), _key(f"led/{next(_asked)}")
    if not leads():
        sleep = 0.01
        # Torchrun ends this process, too, if the first one has ended.
        while not store.check([key]):
            time.sleep(sleep)
            sleep = min(2 * sleep, LONGEST_SLEEP)
        made = json.loads(store.get(key))
        return make() if made is None else made
    made = None
    try:
        made = make()
    finally:
        store.set(key, json.dumps(made))
    return made


def _store() -> Any:
    """Where the processes that torchrun started meet. RuntimeError and the like if it is not there."""
    from torch import distributed

    at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(*at, is_master=False, wait_for_workers=False, timeout=PATIENCE)  # type: ignore[attr-defined]


def _key(name: str) -> str:
    return f"moemerge/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


@contextmanager
def lost_processes() -> Iterator[None]:
    """While open, what torch says where another process has gone becomes an ArtifactError."""
    try:
        yield
    except RuntimeError as error:
        if not several() or not OF_OTHERS.search(f"{type(error).__name__}: {error}"):
            raise
        raise ArtifactError(
            "another of the processes that work together has ended",
            given=str(error).splitlines()[0][:200],
            expected=f"all {count()} to the end",
            fix="fix what its message says, or whatever ended it (memory, a signal), then start them again",
        ) from error


def refuse_several(command: str) -> None:
    """Raise OptionError in each of several processes: all would do the same."""
    if several():
        raise OptionError(
            f"{command} does not share its work among processes",
            given=f"{os.environ['WORLD_SIZE']} processes, this one of rank {os.environ['RANK']}, as torchrun "
            "starts them",
            expected="one process; several do attack, calibrate, evaluate, fit, route, sample, strength and "
            "train",
            fix=f"start it without torchrun: moemerge {command} ...",
        )


def require_several() -> None:
    """Raise OptionError unless there are several processes to hold the parts of a model."""
    if not several():
        raise OptionError(
            "sharded needs several processes",
            given="one process, which holds all of the weights",
            expected="two or more, each with a part of them",
            fix="leave sharded out, or start it with torchrun --nproc-per-node N -m moemerge ...",
        )

"""Ending in good order when a signal asks for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SOON = 0.01  # seconds


class Stopped(BaseException):
    """A signal asked the program to end."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped, so that everything is cleared away; a second one ends at once.

    What libraries make of it, a ValueError out of compiled code for one, is Stopped again at the end. Where
    Python ignores exceptions, as in a destructor, the signal is sent once more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        _listen(before, signal.SIG_DFL)
        struck.append(number)
        raise Stopped(number)

    def ignored(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, Stopped):
            hook(what)
            return
        _listen(before, stop)
        repeats.append(threading.Timer(SOON, os.kill, (os.getpid(), what.exc_value.number)))
        repeats[-1].start()

    struck: list[int] = []
    repeats: list[threading.Timer] = []
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    try:
        sys.unraisablehook = ignored
        _listen(before, stop)
        yield
    except Exception as error:
        if struck:
            raise Stopped(struck[0]) from error
        raise
    finally:
        sys.unraisablehook = hook
        for repeat in repeats:
            repeat.cancel()
        for one, handler in before.items():
            signal.signal(one, handler)


def _listen(signals: Iterable[int], handler: Any) -> None:
    for one in signals:
        signal.signal(one, handler)

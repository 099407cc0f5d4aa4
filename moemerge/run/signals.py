"""Ending in good order when a signal asks for it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
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

    def stop(number: int, frame: FrameType | None) -> None:
        if _is_within(frame, ignored.__code__):  # raised there it would be lost
            send_again(number)
            return
        _listen(before, signal.SIG_DFL)
        struck.append(number)
        raise Stopped(number)

    def ignored(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, Stopped):
            hook(what)
            return
        _listen(before, stop)
        send_again(what.exc_value.number)

    def send_again(number: int) -> None:
        if not waiting:
            waiting.append(number)
            _thread.start_new_thread(send_soon, (len(struck),))  # takes no lock, unlike threading

    def send_soon(count: int) -> None:
        time.sleep(SOON)
        number = waiting.pop()
        if len(struck) == count:
            os.kill(os.getpid(), number)

    waiting: list[int] = []
    struck: list[int] = []
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
        struck.append(0)  # what is still to be sent again, is not
        for one, handler in before.items():
            signal.signal(one, handler)


def _is_within(frame: FrameType | None, code: CodeType) -> bool:
    """Whether `frame` runs `code`, or was called out of it."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _listen(signals: Iterable[int], handler: Any) -> None:
    for one in signals:
        signal.signal(one, handler)

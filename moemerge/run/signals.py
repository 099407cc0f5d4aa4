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
    listener = _Listener()
    try:
        listener.start()
        yield
    except Exception as error:
        if listener.received:
            raise Stopped(listener.received[0]) from error
        raise
    finally:
        listener.end()


class _Listener:
    """Handles SIGINT and SIGTERM from start to end, and a Stopped that Python cannot raise and ignores.

    received: numbers of the signals that raised Stopped; to_send: the one that is to be sent again, if any.
    Both are lists because their methods are atomic: a signal may come between any two lines here.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.to_send: list[int] = []
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.hook = sys.unraisablehook

    def start(self) -> None:
        sys.unraisablehook = self.ignored
        _listen(self.handlers, self.stop)

    def end(self) -> None:
        """Put everything back as it was."""
        sys.unraisablehook = self.hook
        self.received.append(0)  # so that what is still to be sent again, is not
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame: FrameType | None) -> None:
        if _is_within(frame, _Listener.ignored.__code__):  # an exception raised there would be lost
            self.send_again(number)
            return
        _listen(self.handlers, signal.SIG_DFL)
        self.received.append(number)
        raise Stopped(number)

    def ignored(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Called by Python with each exception that it ignores."""
        if not isinstance(unraisable.exc_value, Stopped):
            self.hook(unraisable)
            return
        _listen(self.handlers, self.stop)
        self.send_again(unraisable.exc_value.number)

    def send_again(self, number: int) -> None:
        if not self.to_send:
            self.to_send.append(number)
            _thread.start_new_thread(
                self._send_soon, (len(self.received),)
            )  # takes no lock, unlike threading

    def _send_soon(self, count: int) -> None:
        """Send the signal unless another was received meanwhile, or the end came."""
        time.sleep(SOON)
        number = self.to_send.pop()
        if len(self.received) == count:
            os.kill(os.getpid(), number)


def _is_within(frame: FrameType | None, code: CodeType) -> bool:
    """Whether `frame` runs `code`, or was called out of it."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _listen(signals: Iterable[int], handler: Any) -> None:
    for number in signals:
        signal.signal(number, handler)

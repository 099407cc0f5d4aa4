"""Ending in good order when a signal asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """A signal asked the program to end."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped, so that everything is cleared away; a second one ends at once.

    What libraries make of it, a ValueError out of compiled code for one, is Stopped again at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        struck.append(number)
        raise Stopped(number)

    struck: list[int] = []

    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        for one in before:
            signal.signal(one, stop)
        yield
    except Exception as error:
        if struck:
            raise Stopped(struck[0]) from error
        raise
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)

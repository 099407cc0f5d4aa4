"""Asking the Hugging Face Hub: how long and how large an answer may be, and its words without the token.

A server, or what stands between, may answer nonsense, without end, or never. huggingface_hub itself waits for
ever, obeys any Retry-After, and reads an answer as long as it comes.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import getproxies

from moemerge.artifacts.redaction import holds_piece_of, redact

PATIENCE = 60.0  # seconds without a byte
LONGEST_WAIT = 300  # seconds that a server may ask to wait before the next try
MAX_ANSWER_BYTES, MAX_ANSWER_SECONDS = 64_000_000, 600.0  # of an answer; files are as large as they are
WAITS = {"retry-after": re.compile(r"(\d+)"), "ratelimit": re.compile(r"t\s*=\s*(\d+)")}
NOT_REPEATED = "its words hold a part of the token, and are not repeated here"


class EndlessAnswer(ValueError):
    """An answer that is longer, in bytes or in time, than any that makes sense."""


@contextmanager
def bounded_hub() -> Iterator[None]:
    """Within, every request to the hub is bounded in time and every answer but files in size.

    Where the program has handlers of log lines, such as our command line, huggingface_hub's own one rests: it
    would say everything twice, and tokens with it.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    # The user's own factory, with its proxies and certificates, makes the clients here too.
    factory = _http._GLOBAL_CLIENT_FACTORY
    set_client_factory(lambda: _bounded(factory()))
    log = logging.getLogger("huggingface_hub")
    handlers = log.handlers
    log.handlers = [] if log.propagate and logging.root.handlers else handlers
    try:
        yield
    finally:
        log.handlers = handlers
        set_client_factory(factory)


def _bounded(client: Any) -> Any:
    added = {"request": _be_patient_no_longer, "response": _bound}
    client.event_hooks = {kind: [*client.event_hooks[kind], hook] for kind, hook in added.items()}
    return client


def _be_patient_no_longer(request: Any) -> None:
    """Called with each request. A limit on the client would not do: calls of huggingface_hub say `None`."""
    _require_network(request.url.host)
    limits = request.extensions.get("timeout", {})
    names = ("connect", "read", "write", "pool")
    bounded = {name: PATIENCE if limits.get(name) is None else limits[name] for name in names}
    request.extensions = {**request.extensions, "timeout": bounded}


def _require_network(host: str) -> None:
    """Raise what huggingface_hub takes for being offline where `host` has no address.

    It would ask five more times, for half a minute; offline it looks at once at what is on this disk. Behind
    a proxy addresses are not ours to look up.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    if getproxies():
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise OfflineModeIsEnabled(f"there is no network, or no host {host} in it ({error})") from None


def _bound(response: Any) -> None:
    """Called with each answer before its body is read."""
    for header, pattern in WAITS.items():
        asked = pattern.search(response.headers.get(header, ""))
        if asked and (len(asked[1]) > 9 or int(asked[1]) > LONGEST_WAIT):
            del response.headers[header]
    request = response.request
    if request.method != "GET" or request.url.path.startswith("/api/"):
        # Decoded bytes are counted: a few packed ones can stand for many.
        response.iter_bytes = _counted(response.iter_bytes)


def _counted(read: Callable[..., Iterator[bytes]]) -> Callable[..., Iterator[bytes]]:
    def counted(*size: Any, **named: Any) -> Iterator[bytes]:
        total, end = 0, time.monotonic() + MAX_ANSWER_SECONDS
        for piece in read(*size, **named):
            total += len(piece)
            if total > MAX_ANSWER_BYTES or time.monotonic() > end:
                raise EndlessAnswer(f"an answer without end, {total} bytes so far")
            yield piece

    return counted


def words_of(error: BaseException) -> str:
    """What an error of the hub says, on one line, cut to 300 characters, without the token, however spelt.

    Where there is no network, that is what is said.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    told = next((cause for cause in causes if isinstance(cause, OfflineModeIsEnabled)), error)
    words = " ".join(redact(str(told), get_token()).split())[:300]
    return NOT_REPEATED if holds_piece_of(get_token(), words) else words

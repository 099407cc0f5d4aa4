"""Messages of the package as a person is shown them: on the command line, and in notebooks."""

from __future__ import annotations

import logging
import sys
from functools import cache

from moemerge.artifacts.redaction import redact
from moemerge.reports.table import visible

log = logging.getLogger("moemerge")


class Discreet(logging.Formatter):
    """Log lines without passwords, tokens and what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return visible(redact(super().format(record)))


@cache
def tell_in_notebook() -> None:
    """Have messages shown under a notebook's cell, as long as nobody has set up logging otherwise."""
    if log.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Discreet("%(message)s"))
    # Who sets up logging afterwards is not to read everything twice.
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    log.addHandler(handler)
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)

"""Where progress bars are seen: on a terminal and in a notebook."""

from __future__ import annotations

import sys

from moemerge.artifacts.ranks import leads


class Progress:
    """How far the step at work has come, in words, for those who see no bar."""

    words = ""


PROGRESS = Progress()


def in_notebook() -> bool:
    """Whether the kernel of a notebook runs this; its stderr is no terminal, and still a person sees it."""
    ipython = sys.modules.get("IPython")
    get_shell = getattr(ipython, "get_ipython", None)  # missing while IPython itself is imported
    return get_shell is not None and hasattr(get_shell(), "kernel")


def hidden() -> bool:
    """Whether nobody would see a progress bar, as in a file of logs, or see it from several processes."""
    return not leads() or not (sys.stderr.isatty() or in_notebook())

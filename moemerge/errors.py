"""The one family of exceptions for faults that a user can cause and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoemergeError(Exception):
    """A fault in what the user gave, reported in four parts.

    The command line prints the four parts without a traceback and exits with code 2.
    """

    def __init__(self, what: str, *, given: str, expected: str, fix: str) -> None:
        self.what, self.given, self.expected, self.fix = what, given, expected, fix
        super().__init__(f"{what}\n  given:    {given}\n  expected: {expected}\n  to fix:   {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        parts = {"given": self.given, "expected": self.expected, "fix": self.fix}
        return (_rebuild, (type(self), self.what, parts))


class OptionError(MoemergeError):
    """A recipe, flag or argument is unknown, mistyped, missing or contradicts another."""


class DataError(MoemergeError):
    """A preference or candidate file cannot be used as it is."""


class CheckpointError(MoemergeError):
    """A model folder is incomplete, damaged or of another shape than asked for."""


class UnsupportedError(MoemergeError):
    """An architecture or combination that cannot work; says why."""


class ArtifactError(MoemergeError):
    """A stage's output folder exists, is damaged, or belongs to another stage."""


class Faults(OptionError):
    """Several option faults found in one go; `faults` holds them in the order of discovery."""

    def __init__(self, what: str, faults: list[MoemergeError]) -> None:
        self.faults = faults
        Exception.__init__(self, "\n".join([f"{what}: {len(faults)} fault(s)", *map(str, faults)]))
        self.what = what

    def __reduce__(self) -> tuple[object, ...]:
        return (Faults, (self.what, self.faults))


def _rebuild(kind: type[MoemergeError], what: str, parts: dict[str, str]) -> MoemergeError:
    return kind(what, **parts)


def together(where: str, faults: list[MoemergeError]) -> MoemergeError:
    """The one fault there is, or all of them as the Faults of `where`: what to raise."""
    return faults[0] if len(faults) == 1 else Faults(where, faults)


def few(names: Iterable[object], most: int = 4) -> str:
    """`names` in a line for people to read; of more than `most` the others are only counted."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def unexpected(error: BaseException) -> bool:
    """Whether a library failed at a value: an exception, or what Rust's libraries raise when they give up.

    That is no Exception, and its class stands in no module from which it could be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def unknown(kind: str, name: str, known: Iterable[str]) -> OptionError:
    """The fault of a `name` that is none of the `known` ones of its kind, with a near name."""
    known = list(known)
    return OptionError(
        f"unknown {kind}",
        given=repr(name),
        expected=f"one of: {', '.join(known)}",
        fix=suggest(name, known),
    )


def suggest(name: str, known: Iterable[str]) -> str:
    """Advice for a misspelt name: the nearest known one, or the whole list."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known)}"

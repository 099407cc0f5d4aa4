"""Rules that say whether an answer is right, and what makes a right one wrong: the user's, or ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from moemerge.data.pairs import as_answer
from moemerge.data.rows import Text
from moemerge.data.tokenise import Item
from moemerge.errors import DataError, MoemergeError
from moemerge.evaluation.attack_edits import CHANGE_CONTENT
from moemerge.evaluation.gold import Reward, load_function
from moemerge.evaluation.probes.edits import apply, last_message
from moemerge.options.refresh import RefreshSettings

EDITS = 3  # of words, that make a right answer wrong


def load_rule(settings: RefreshSettings, gold: Reward) -> Callable[[Sequence[Item]], list[int | None]]:
    """Of each (prompt, answer): 1 right, 0 wrong, None if the rule cannot say.

    The rule is the user's function, or gold above a score. What is returned raises DataError if the function
    raises or gives anything else. Raises OptionError if there is no such function.
    """
    if settings.verifier is None:
        least = settings.right_above
        assert least is not None  # the options see to it
        return lambda items: [int(score > least) for score in gold(items)] if items else []
    function = _loaded(settings.verifier)
    return lambda items: [_verdict(function, *item) for item in items]


def load_corrupt(settings: RefreshSettings) -> Callable[[Text, Text, Random], Text | None]:
    """What makes a wrong answer of a right one, or tries to; None if it has nothing to change.

    Without a function of the user's, three words are deleted or change places. Raises as `load_rule`.
    """
    if settings.corrupt is None:
        return _garbled
    function = _loaded(settings.corrupt)
    return lambda prompt, right, _: as_answer(prompt, _text(function, prompt, right))


def _garbled(prompt: Text, right: Text, draw: Random) -> Text | None:
    if not last_message(right).strip():
        return None
    text = right
    for _ in range(EDITS):
        edit = CHANGE_CONTENT[draw.choice(sorted(CHANGE_CONTENT))]
        text = apply(edit, prompt, text, "", draw) or text  # the last word is never deleted
    return text


def _loaded(named: Any) -> Callable[..., Any]:
    return load_function(named) if isinstance(named, str) else named  # type: ignore[no-any-return]


def _verdict(function: Callable[..., Any], prompt: Text, answer: Text) -> int | None:
    value = _called(function, "verifier", prompt, answer)
    if value is None or value in (0, 1):
        return None if value is None else int(value)
    raise _useless("verifier", repr(value), answer, "1 (right), 0 (wrong) or None (it cannot say)")


def _text(function: Callable[..., Any], prompt: Text, answer: Text) -> str:
    text = _called(function, "corrupt", prompt, answer)
    if isinstance(text, str):
        return text
    raise _useless("corrupt", repr(text), answer, "the text of a wrong answer")


def _called(function: Callable[..., Any], what: str, prompt: Text, answer: Text) -> Any:
    try:
        return function(prompt, answer)
    except MoemergeError:
        raise
    except Exception as error:
        given, expected = f"{type(error).__name__}: {error}", "a function of any prompt and answer of the run"
        raise _useless(what, given, answer, expected) from error


def _useless(what: str, given: str, answer: Text, expected: str) -> DataError:
    return DataError(
        f"the function {what} cannot be used",
        given=f"{given[:300]}, for the answer {str(answer)[:100]!r}",
        expected=expected,
        fix="correct the function",
    )

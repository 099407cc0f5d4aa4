"""Gold scores that are made, not read: by another reward model, or by a function that the user names.

C answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moemerge.errors import DataError, MoemergeError
from moemerge.options import TextFormat
from moemerge.policy_settings import GoldSource
from moemerge.preferences import CandidateSet
from moemerge.rows import BadRow, Text
from moemerge.scoring import load_reward_model, load_tokenizer, score
from moemerge.tokenise import Encoded, Item, encode_all
from moemerge.user_function import load_function

Floats = NDArray[np.float64]
Judge = Callable[[Sequence[Item]], Floats]
BATCH_TOKENS = 8192


def told(source: GoldSource) -> str:
    """Where gold scores come from, in a few words."""
    named = source.model_dump(mode="json")
    return str(named["gold_model"] or named["gold_function"] or "scores in the file")


def judge(source: GoldSource, device: torch.device, format: TextFormat, trust: bool = False) -> Judge | None:
    """What gives (prompt, answer) items their gold scores, [C]; None if the scores are to be read.

    Raises CheckpointError for an unusable model, OptionError if there is no such function.
    """
    if source.gold_model:
        return model_judge(source.gold_model, device, format.max_length, trust)
    return function_judge(source.gold_function) if source.gold_function else None


def regrade(sets: Sequence[CandidateSet], judge: Judge) -> list[CandidateSet]:
    """The sets with gold scores by `judge`."""
    scores = iter(judge([(one.prompt, text) for one in sets for text in one.texts]).tolist())
    return [replace(one, gold=[next(scores) for _ in one.texts]) for one in sets]


def model_judge(path: str, device: torch.device, max_length: int, trust: bool = False) -> Judge:
    """A reward model as a judge: its own tokenizer and chat template, texts as evaluate makes them.

    The judge raises DataError for a text that is longer than `max_length` tokens or cannot be encoded.
    """
    tokenizer = load_tokenizer(path, trust)
    model = load_reward_model(path, device, trust_remote_code=trust)

    def scores(items: Sequence[Item]) -> Floats:
        encoded = [_usable(one, path, max_length) for one in encode_all(tokenizer, items)]
        return score(model, tokenizer, encoded, BATCH_TOKENS).double().numpy()

    return scores


def _usable(one: Encoded | BadRow, path: str, max_length: int) -> Encoded:
    if isinstance(one, Encoded) and len(one.ids) <= max_length:
        return one
    raise DataError(
        f"{path} cannot score a text",
        given=f"{len(one.ids)} tokens" if isinstance(one, Encoded) else str(one),
        expected=f"texts of at most {max_length} tokens that its tokenizer can encode",
        fix="raise max_length if the model can take more, or leave the text out",
    )


def function_judge(named: str | Callable[[Text, Text], float]) -> Judge:
    """A function of prompt and answer, both as they are in the data, as a judge.

    `named` is the function, FILE.py:NAME or MODULE:NAME. The judge raises DataError if the function raises,
    or if it gives no finite number. Raises OptionError if there is no such function.
    """
    function: Any = load_function(named) if isinstance(named, str) else named

    def scores(items: Sequence[Item]) -> Floats:
        return np.array([_call(function, *item) for item in items], dtype=np.float64)

    return scores


def _call(function: Callable[[Text, Text], float], prompt: Text, answer: Text) -> float:
    try:
        found = float(function(prompt, answer))
    except MoemergeError:
        raise
    except Exception as error:
        raise _useless(f"{type(error).__name__}: {error}", answer) from error
    if not math.isfinite(found):
        raise _useless(str(found), answer)
    return found


def _useless(given: str, answer: Text) -> DataError:
    return DataError(
        "the gold function gives no score",
        given=f"{given[:300]}, for the answer {str(answer)[:100]!r}",
        expected="a finite number for every prompt and answer of the data",
        fix="mend the function",
    )

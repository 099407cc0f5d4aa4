"""Gold scores that are made, not read: by another reward model, or by a function that the user names.

C answers.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from moemerge.artifacts.ranks import leads
from moemerge.data.pairs import CandidateSet
from moemerge.data.rows import BadRow, Text
from moemerge.data.tokenise import Encoded, Item, encode_all
from moemerge.errors import DataError, MoemergeError, OptionError, suggest
from moemerge.models import processes
from moemerge.models.scorers import Loaded, Scorer, open_scorer
from moemerge.options.base import TextFormat
from moemerge.options.gold import GoldSource
from moemerge.reports.statistics import Floats

Reward = Callable[[Sequence[Item]], Floats]
BATCH_TOKENS = 8192
# Recipes and manifests of version 0.1 may name a function by its module's place then.
MOVED = {"moemerge.synthetic": "moemerge.data.world"}


def source_of_gold(source: GoldSource) -> str:
    """Where gold scores come from, in a few words."""
    named = source.model_dump(mode="json")
    return str(named["gold_model"] or named["gold_function"] or "scores in the file")


def load_gold(
    source: GoldSource, device: torch.device, format: TextFormat, trust: bool = False
) -> Reward | None:
    """What gives (prompt, answer) items their gold scores, [C]; None if the scores are to be read.

    Raises CheckpointError for an unusable model, OptionError if there is no such function.
    """
    if source.gold_model:
        return model_reward(open_scorer(source.gold_model, trust), device, format.max_length)
    return function_reward(source.gold_function) if source.gold_function else None


def regrade(sets: Sequence[CandidateSet], gold: Reward) -> list[CandidateSet]:
    """The sets with the scores that `gold` gives their texts."""
    scores = iter(
        gold([(candidates.prompt, text) for candidates in sets for text in candidates.texts]).tolist()
    )
    return [replace(candidates, gold=[next(scores) for _ in candidates.texts]) for candidates in sets]


def model_reward(source: Scorer | str, device: torch.device, max_length: int) -> Reward:
    """The scores of a reward model or another scorer: its own tokenizer, texts as evaluate makes them.

    What is returned raises DataError for a text that is longer than `max_length` tokens or cannot be encoded.
    """
    scorer = open_scorer(source) if isinstance(source, str) else source
    return loaded_reward(scorer.load(device), scorer.reader(), scorer.source, max_length)


def loaded_reward(loaded: Loaded, reader: Any, source: str, max_length: int) -> Reward:
    """As `model_reward`, of a scorer in memory that is called `source`; `reader` makes tokens for it."""

    def scores(items: Sequence[Item]) -> Floats:
        encoded = [usable(text, source, max_length) for text in encode_all(reader, items)]
        return loaded.score(encoded, BATCH_TOKENS).double().numpy()

    return scores


def usable(text: Encoded | BadRow, path: str, max_length: int) -> Encoded:
    """The encoded text; DataError if it could not be encoded, or is longer than `max_length` tokens."""
    if isinstance(text, Encoded) and len(text.ids) <= max_length:
        return text
    raise DataError(
        f"{path} cannot score a text",
        given=f"{len(text.ids)} tokens" if isinstance(text, Encoded) else str(text),
        expected=f"texts of at most {max_length} tokens that its tokenizer can encode",
        fix="raise max_length if the model can take more, or leave the text out",
    )


def function_reward(named: str | Callable[[Text, Text], float]) -> Reward:
    """The scores that a function of prompt and answer gives, both as they are in the data.

    `named` is the function, FILE.py:NAME or MODULE:NAME. What is returned raises DataError if the function
    raises, or if it gives no finite number. Raises OptionError if there is no such function.
    """
    function: Any = load_function(named) if isinstance(named, str) else named

    def scores(items: Sequence[Item]) -> Floats:
        # It may be dear, or give another number each time: of several processes the first one calls it.
        called = [_call(function, *item) for item in items] if leads() else [0.0] * len(items)
        return processes.summed(torch.tensor(called, dtype=torch.float64)).numpy()

    return scores


def _call(function: Callable[[Text, Text], float], prompt: Text, answer: Text) -> float:
    try:
        value = float(function(prompt, answer))
    except MoemergeError:
        raise
    except Exception as error:
        raise _useless(f"{type(error).__name__}: {error}", answer) from error
    if not math.isfinite(value):
        raise _useless(str(value), answer)
    return value


def _useless(given: str, answer: Text) -> DataError:
    return DataError(
        "the gold function gives no score",
        given=f"{given[:300]}, for the answer {str(answer)[:100]!r}",
        expected="a finite number for every prompt and answer of the data",
        fix="correct the function",
    )


def load_function(named: str) -> Callable[..., Any]:
    """The function FILE.py:NAME or MODULE:NAME. The code of its file or module is run.

    Raises OptionError if there is none, or the file or module cannot be imported.
    """
    home, colon, name = named.rpartition(":")
    if not colon or not home or not name:
        raise _no_function(named, "neither FILE.py:NAME nor MODULE:NAME", "name the file, then the function")
    try:
        module = _open(Path(home)) if home.endswith(".py") else importlib.import_module(MOVED.get(home, home))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise _no_function(
            named, reason, "correct the name of the file or module, or what it holds"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise _no_function(named, f"{home} has no function {name}", suggest(name, known))
    return function


def _open(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _no_function(named: str, given: str, fix: str) -> OptionError:
    return OptionError(
        f"there is no function {named}",
        given=given,
        expected="a function in a Python file or an installed module",
        fix=fix,
    )

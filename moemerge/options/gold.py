"""Who says what an answer is truly worth: a part of the options of sample, optimise, evaluate and attack."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, SerializationInfo, WrapValidator, model_validator

from moemerge.options.base import CODE, Options, Source


def _or_callable(value: Any, validate: Any) -> Any:
    """A function as it is; its name with `~` in front written out."""
    return value if callable(value) else validate(os.path.expanduser(value) if value else value)


def _by_name(value: Any, info: SerializationInfo) -> Any:
    return f"{value.__module__}:{value.__qualname__}" if info.mode == "json" and callable(value) else value


# In Python a function too; manifests then hold its name.
Function = Annotated[str | None, CODE, WrapValidator(_or_callable), PlainSerializer(_by_name)]


class GoldSource(Options):
    """Who says what an answer is truly worth, if not scores in the file."""

    gold_model: Source | None = Field(
        None, description="reward model, or a scorer.json, whose scores are gold"
    )
    gold_function: Function = Field(
        None,
        description="FILE.py:NAME or MODULE:NAME, a function of prompt and answer that gives the gold score",
    )

    @model_validator(mode="after")
    def _one_gold(self) -> GoldSource:
        if self.gold_model and self.gold_function:
            raise ValueError("gold_model and gold_function exclude each other: give one of them")
        return self

    @property
    def has_gold(self) -> bool:
        """Whether gold scores are made, and not read."""
        return bool(self.gold_model or self.gold_function)

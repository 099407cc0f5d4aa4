"""What options are, and those that stages share. Imports nothing heavy, as recipe.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moemerge.errors import suggest


class _Input:
    """Marks a field whose value names something read from disk or the hub."""


INPUT = _Input()
Source = Annotated[str, INPUT]
Sources = Annotated[dict[str, str], INPUT]
Layers = str
COLUMNS = ("prompt", "chosen", "rejected", "subset", "margin", "candidates", "text", "score")


class Options(BaseModel):
    """Base of all options: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)


class Run(Options):
    """What every stage takes besides its own settings."""

    output: Path = Field(description="folder to write; must not exist yet")
    seed: int = Field(0, ge=0, description="seed of every random draw")
    threads: int | None = Field(None, ge=1, description="CPU threads (default: leave as it is)")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N")
    overwrite: bool = Field(False, description="replace an existing output once the new one is whole")


class TextFormat(Options):
    """How rows of preference data become token sequences."""

    fields: dict[str, str] = Field(
        default_factory=dict,
        description="other names for prompt, chosen, rejected, subset, margin, candidates, text, score",
    )
    bad_rows: Literal["refuse", "skip"] = Field(
        "refuse", description="what to do with broken rows; either way they are counted and reported"
    )
    max_length: int = Field(
        1024, ge=2, description="longest prompt + answer in tokens; longer ones are bad rows"
    )

    @field_validator("fields")
    @classmethod
    def _columns_known(cls, fields: dict[str, str]) -> dict[str, str]:
        for name in fields:
            if name not in COLUMNS:
                raise ValueError(f"{name!r} is no field to rename: {suggest(name, COLUMNS)}")
        return fields


def input_fields(options: Options) -> dict[str, Any]:
    """The options that name something to read, by field name, without the unset ones."""
    found = {}
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if value and INPUT in _marks(field):
            found[name] = value
    return found


def _marks(field: Any) -> list[object]:
    nested = [
        m for arg in getattr(field.annotation, "__args__", ()) for m in getattr(arg, "__metadata__", ())
    ]
    return [*field.metadata, *nested]

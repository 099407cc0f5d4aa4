"""What options are made of: their base, what every stage takes, what is read, what is merged.

Nothing in this folder imports anything heavy: `moemerge check` and `moemerge STAGE --help` depend on that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from moemerge.errors import suggest


class _Input:
    """Marks a field whose value names something read from disk or the hub."""


class _Code:
    """Marks a field whose value names a function, as FILE.py:NAME or MODULE:NAME, or is one."""


def _as_text(path: str | os.PathLike[str]) -> str:
    """A path as text, `~` in front as the home folder that it stands for."""
    return os.path.expanduser(os.fspath(path))


def path_as_text(value: Any) -> Any:
    """A path of any kind as text; what is no path stays, for the type's own check."""
    return _as_text(value) if isinstance(value, str | os.PathLike) else value


def _nameable(value: str | Path) -> str | Path:
    """A path or hub name that the file system can be asked about.

    Variables are not put in: a recipe of somebody else could write a secret of the environment into a path.
    """
    text = str(value)
    try:
        longest = max(len(part.encode()) for part in text.split("/"))
    except UnicodeEncodeError:
        raise ValueError("a name that can be written as UTF-8") from None
    if "\0" in text or longest > MAX_NAME or len(text) > MAX_PATH:
        raise ValueError(f"a path without NUL, of at most {MAX_PATH} characters and {MAX_NAME} bytes a part")
    if SHORTHAND.search(text):
        raise ValueError("a path written out: no variables, and ~ only for a home folder that is there")
    return value


def _file_name(name: str) -> str:
    """A name of a data set or model, which also names files and tensors: it must not lead elsewhere."""
    if not name.strip() or name in (".", "..") or "/" in name or "\\" in name or _is_long(name):
        raise ValueError(f"a name of at most {MAX_KEY} bytes without slashes, such as test")
    return name


def _is_long(name: str) -> bool:
    return len(name.encode(errors="surrogatepass")) > MAX_KEY


def name_of(source: str) -> str:
    """A short name for something to read: its last part without extension, `test` for data/test.jsonl.gz."""
    last = os.path.basename(os.path.abspath(source)).replace(":", "-")
    return last if os.path.isdir(source) else SUFFIX.sub("", last)


def by_name(sources: Any) -> Any:
    """A list of sources, or a single one, by their own names."""
    listed = [sources] if isinstance(sources, str | os.PathLike) else sources
    if not isinstance(listed, list | tuple) or not all(
        isinstance(source, str | os.PathLike) for source in listed
    ):
        return sources
    paths = [_as_text(source) for source in listed]
    if repeated := listed_twice(paths):
        raise ValueError(f"each once: {repeated[0]} is given twice")
    names = [name_of(path) for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"a name for each, as name=source: {twice[0]} would be the name of two")
    return dict(zip(names, paths, strict=True))


class Contradiction(ValueError):
    """For validators: options that do not go together, and what to do about it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def listed_twice(models: Sequence[str]) -> list[str]:
    """Those that are listed more than once, under one path or several."""
    places = [os.path.realpath(model) if os.path.exists(model) else model for model in models]
    return [model for model, place in zip(models, places, strict=True) if places.count(place) > 1]


def refuse_twice(models: Sequence[str]) -> None:
    """Raise Contradiction if a model is listed twice."""
    if twice := listed_twice(models):
        raise Contradiction(
            f"models has {twice[0]} twice",
            "list each model once",
        )


def _several(models: dict[str, str]) -> dict[str, str]:
    """The models by name, if they are two at least."""
    if len(models) < 2:
        raise ValueError("two models at least, as name=source or sources alone")
    return models


MAX_PATH, MAX_NAME, MAX_KEY = 4000, 255, 100
SUFFIX = re.compile(r"(\.scorer)?\.(jsonl|json|parquet)(\.gz)?$")
SHORTHAND = re.compile(r"^~|(^|/)\$[{A-Za-z_]")  # what a shell would have replaced
INPUT, CODE = _Input(), _Code()
Listed = str | list[str] | dict[str, str]  # what may be given
Named = Annotated[str, BeforeValidator(path_as_text), AfterValidator(_nameable)]
Source = Annotated[str, INPUT, BeforeValidator(path_as_text), AfterValidator(_nameable)]
Name = Annotated[str, AfterValidator(_file_name), AfterValidator(_nameable)]
Sources = Annotated[dict[Name, Named], INPUT, BeforeValidator(by_name, json_schema_input_type=Listed)]
Several = Annotated[
    dict[Name, Named],
    INPUT,
    BeforeValidator(by_name, json_schema_input_type=Listed),
    AfterValidator(_several),
]
SourceList = Annotated[list[Named], INPUT]
Output = Annotated[Path, BeforeValidator(path_as_text), AfterValidator(_nameable)]
MAX_SEED = 2**32 - 1  # of numpy, and so of transformers
Coordinates = Literal["average", "sum"]
COORDINATES: Any = Field(
    "average",
    description="average: weights that sum to one; sum: changes from the base (of a MoE: from the shared "
    "expert) are added, W = base + sum_i c_i (W_i - base), with any c",
)
SCALE_OF_SUM = 2.0  # what the c of a sum add up to: near the best for three members, in a pilot
OURS = "routing_normalized_average"  # the name of our own merge method
COLUMNS = ("prompt", "chosen", "rejected", "subset", "margin", "doubt", "candidates", "text", "score")


class Options(BaseModel):
    """Base of all options: unknown keys are refused, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, defer_build=True, allow_inf_nan=False
    )

    def differs(self, name: str) -> bool:
        """Whether an option is not as it is by default."""
        default: Any = type(self).model_fields[name].get_default(call_default_factory=True)
        return bool(getattr(self, name) != default)


class Run(Options):
    """What every stage takes besides its own settings.

    POSITIONAL: the inputs that a call in Python may give without their names, in order.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ()

    output: Output = Field(description="folder to write; must not exist yet")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of every random draw")
    threads: int | None = Field(None, ge=1, description="CPU threads (default: leave as it is)")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N")
    overwrite: bool = Field(False, description="replace an existing output once the new one is whole")


class TextFormat(Options):
    """How rows of preference data become token sequences."""

    fields: dict[str, str] = Field(
        default_factory=dict,
        description="other names for prompt, chosen, rejected, subset, margin, doubt, candidates, text, "
        "score",
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
                raise ValueError(f"only fields that rows have, not {name!r}: {suggest(name, COLUMNS)}")
        return fields


class Members(Options):
    """What is merged: the experts of a MoE, or models of one architecture."""

    model: Source | None = Field(None, description="MoE folder")
    models: SourceList = Field(
        default_factory=list,
        description="in place of a MoE: models of one architecture; two or more, or one and base",
    )
    base: Source | None = Field(
        None,
        description="with models: a reward model that is merged as a shared expert is; it gives config, "
        "tokenizer and what is not merged (default: the first of models gives these, and nothing is shared; "
        "with coordinates sum the start that moemerge train recorded in all models)",
    )
    scope: Literal["all", "body", "mlp"] = Field(
        "all", description="with models: what is merged: all; body, which is all but the head; mlp"
    )
    coordinates: Coordinates = COORDINATES
    calibration: Source | None = Field(
        None,
        description="with models: folder written by calibrate; each model's scores are divided by its "
        "scale first (saved coefficients know this of themselves)",
    )

    @model_validator(mode="after")
    def _one_kind_of_members(self) -> Members:
        if (self.model is None) != bool(self.models):
            raise ValueError("what is merged is either a MoE, named by model, or models, and not both")
        if self.model and (self.base or self.scope != "all"):
            raise ValueError("base and scope go with models, not with a MoE")
        found = self.base is not None or self.coordinates == "sum"
        if self.models and len(self.models) + found < 2:
            raise ValueError("one model alone cannot be merged: give two models, or one and base")
        if self.calibration and (self.model or self.scope != "all"):
            raise ValueError("calibration goes with models and scope all: it divides their heads")
        return self


def input_fields(options: Options) -> dict[str, Any]:
    """The options that name something to read, by field name, without the unset ones."""
    return _marked(options, INPUT)


def is_input(field: Any) -> bool:
    """Whether an option names something to read."""
    return INPUT in _marks(field)


def functions(options: Options) -> dict[str, Any]:
    """The options that name a function of the user's, or are one, by field name, without the unset ones."""
    return _marked(options, CODE)


def _marked(options: Options, mark: object) -> dict[str, Any]:
    fields = [name for name, field in type(options).model_fields.items() if mark in _marks(field)]
    return {name: value for name in fields if (value := getattr(options, name))}


def _marks(field: Any) -> list[object]:
    """What a field is annotated with, also inside of `X | None`."""
    nested = [
        m for arg in getattr(field.annotation, "__args__", ()) for m in getattr(arg, "__metadata__", ())
    ]
    return [*field.metadata, *nested]

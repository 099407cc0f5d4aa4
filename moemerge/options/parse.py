"""Validation of options: every fault at once, with near names for unknown keys."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from moemerge.errors import Faults, MoemergeError, OptionError, suggest
from moemerge.options.base import Options, Run

MAX_FAULTS = 100
O = TypeVar("O", bound=Run)  # noqa: E741


def parse_options(kind: type[O] | type[Options], fields: dict[str, Any], where: str = "options") -> Any:
    """Validate `fields` as `kind`; every fault at once, with near names for unknown keys."""
    try:
        return kind(**fields)
    except ValidationError as error:
        faults = [_fault(kind, where, fault) for fault in error.errors()[:MAX_FAULTS]]
    if len(faults) == 1:
        raise faults[0]
    raise Faults(where, faults)


def _fault(kind: type[Options], where: str, error: Any) -> MoemergeError:
    path = ".".join(str(part) for part in (where, *error["loc"]))
    if error["type"] == "extra_forbidden":
        known = _known_names(kind, error["loc"][:-1])
        return OptionError(
            f"unknown option {path}",
            given=str(error["loc"][-1]),
            expected="an option of this section",
            fix=suggest(str(error["loc"][-1]), known),
        )
    message = error["msg"].removeprefix("Value error, ")
    value = "nothing" if error["type"] == "missing" else repr(error["input"])
    return OptionError(f"bad option {path}", given=value[:200], expected=message, fix=f"correct {path}")


def _known_names(kind: type[Options], path: tuple[str | int, ...]) -> list[str]:
    for part in path:
        annotation = kind.model_fields[str(part)].annotation
        choices = [annotation, *getattr(annotation, "__args__", ())]
        kind = next(c for c in choices if isinstance(c, type) and issubclass(c, Options))
    return list(kind.model_fields)

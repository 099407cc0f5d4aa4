"""Validation of options: every fault at once, in plain words, with near names for unknown keys and values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from moemerge.errors import MoemergeError, OptionError, suggest, together
from moemerge.options.base import Options, Run

MAX_FAULTS = 100
STAGE = "options"  # where the options of a single stage are said to be: they need no section before them
O = TypeVar("O", bound=Run)  # noqa: E741
OF_KEY = "[key]"  # how pydantic ends the location of a fault in a name
Location = tuple[str | int, ...]
TAG = re.compile(r"(float|int|str|bool|literal\[.*\])$")  # how pydantic names the types of a union


def parse_options(kind: type[O] | type[Options], fields: dict[str, Any], where: str = STAGE) -> Any:
    """Validate `fields` as `kind`; every fault at once, with near names for unknown keys."""
    try:
        return kind(**fields)
    except ValidationError as error:
        faults = [_fault(kind, where, *alike) for alike in _by_location(error.errors()[:MAX_FAULTS])]
    raise together(where, faults)


def _by_location(errors: Sequence[Any]) -> list[tuple[Location, list[Any]]]:
    """Errors by where they are: a value that may be of several types has one for each, told by a tag."""
    grouped: dict[Location, list[Any]] = {}
    for error in errors:
        location = tuple(part for part in error["loc"] if not TAG.match(str(part)))
        grouped.setdefault(location, []).append(error)
    return list(grouped.items())


def _fault(kind: type[Options], where: str, location: Location, errors: Sequence[Any]) -> MoemergeError:
    error, value = errors[0], repr(errors[0]["input"])[:200]
    if location[-1:] == (OF_KEY,):
        return _bad_name(where, location[:-2], value, _plain(error["msg"]))
    path = ".".join(str(part) for part in (location if where == STAGE else (where, *location)))
    whole, parent = _section(kind, location), _section(kind, location[:-1])
    if error["type"] == "value_error" and whole is not None:
        remedy = getattr(error["ctx"]["error"], "fix", "")
        return _contradiction(whole, path, _plain(error["msg"]), error["input"], remedy)
    name, known = (str(location[-1]) if location else ""), parent.model_fields if parent else {}
    if error["type"] == "extra_forbidden":
        fix = suggest(name, known)
        return OptionError(
            f"unknown option {path}", given=name, expected="an option of this section", fix=fix
        )
    itself = f"{path} ({_flag(path)} on the command line)" if where == STAGE else path
    if error["type"] == "missing":
        expected = (known[name].description if name in known else None) or "a value"
        return OptionError(f"missing option {path}", given="nothing", expected=expected, fix=f"give {itself}")
    expected = ", or ".join(_plain(other["msg"]) for other in errors)
    choices = re.findall(r"'([^']*)'", expected) if errors[-1]["type"] == "literal_error" else []
    fix = suggest(str(error["input"]), choices) if choices else f"correct {itself}"
    return OptionError(f"bad option {path}", given=value, expected=expected, fix=fix)


def _bad_name(where: str, location: Location, value: str, expected: str) -> MoemergeError:
    """The fault of a name that the user gave to something, as a key of the option at `location`."""
    option = ".".join(str(part) for part in location)
    way = f"{_flag(option)} NAME=VALUE" if where == STAGE else f"{where}.{option}: {{NAME: VALUE}}"
    return OptionError(
        f"bad name in {option if where == STAGE else f'{where}.{option}'}",
        given=value,
        expected=expected,
        fix=f"give another name, as in {way}",
    )


def _contradiction(
    section: type[Options], path: str, message: str, values: Any, remedy: str = ""
) -> OptionError:
    """The fault of options that are right by themselves; `message`, of a validator, says what is wrong."""
    known, values = section.model_fields, values if isinstance(values, dict) else {}
    names = list(dict.fromkeys(word for word in re.findall(r"\w+", message) if word in known))
    named = {name: values.get(name, known[name].get_default(call_default_factory=True)) for name in names}
    given = ", ".join(
        f"{name} {'nothing' if value is None else repr(value)}" for name, value in named.items()
    )
    return OptionError(
        f"{path}: {message}" if path else message,
        given=(given or repr(values))[:200],
        expected="options that go together",
        fix=remedy or f"{'change' if names[1:] else 'correct'} {' or '.join(names) or 'these options'}",
    )


def _plain(message: str) -> str:
    """What pydantic or a validator says, as the end of "expected: "."""
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    message = message.removeprefix("Input should have ").partition(", unable to ")[0]
    return re.sub(
        r"a valid dictionary or instance of \w+", "a section: names of options with values", message
    )


def _flag(path: str) -> str:
    return "--" + path.partition(".")[0].replace("_", "-")


def _section(kind: type[Options], path: Location) -> type[Options] | None:
    """The class of the section at `path` within `kind`; None if a value stands there, and no section."""
    for part in path:
        field = kind.model_fields.get(str(part))
        choices = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        sections = [c for c in choices if isinstance(c, type) and issubclass(c, Options)]
        if not sections:
            return None
        kind = sections[0]
    return kind

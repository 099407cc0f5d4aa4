"""Options as the parameters of a Python function: its signature, its help, and what a call gives."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from inspect import Parameter, Signature, cleandoc
from operator import or_
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from moemerge.errors import OptionError
from moemerge.options.base import CODE, Run, by_name, path_as_text
from moemerge.options.parse import parse_options

F = TypeVar("F", bound=Callable[..., Any])
WIDTH = 100
PATH: Any = str | os.PathLike
# What may be given where a field is marked so, in place of the type that is kept.
GIVEN: dict[Any, Any] = {
    by_name: PATH | Sequence[PATH] | Mapping[str, PATH],
    path_as_text: PATH,
    CODE: str | Callable | None,
}


def signature(kind: type[Run], returns: Any, without: Collection[str] = ()) -> Signature:
    """Inputs that need no name, then the other options by name: required ones first, Run's own last."""
    fields = {name: field for name, field in kind.model_fields.items() if name not in without}
    unnamed = [name for name in kind.POSITIONAL if name in fields]
    named = [name for name in fields if name not in unnamed]
    named.sort(key=lambda name: (not fields[name].is_required(), name in Run.model_fields))
    forms = {Parameter.POSITIONAL_OR_KEYWORD: unnamed, Parameter.KEYWORD_ONLY: named}
    parameters = [
        Parameter(name, form, default=_default(fields[name]), annotation=accepted(fields[name]))
        for form, names in forms.items()
        for name in names
    ]
    return Signature(parameters, return_annotation=returns)


def _default(field: FieldInfo) -> Any:
    return Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)


def accepted(field: FieldInfo) -> Any:
    """The type of what may be given for an option, as annotations have it."""
    return _plain(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)


def _plain(annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        marks = [getattr(mark, "func", mark) for mark in annotation.__metadata__]
        given = [kind for mark, kind in GIVEN.items() if mark in marks]
        return given[0] if given else _plain(annotation.__origin__)
    if origin in (Union, UnionType):
        return reduce(or_, map(_plain, arguments))
    if origin is list:
        return Sequence[_plain(arguments[0])]  # type: ignore[misc]
    if origin is dict:
        return Mapping[arguments[0], _plain(arguments[1])]  # type: ignore[misc,valid-type]
    return annotation


def default_text(field: FieldInfo) -> str:
    """An option's default as help shows it, in brackets; nothing where leaving it out says all."""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if field.is_required():
        return "  [required]"
    if default is None or default == {} or default == []:
        return ""
    text = ("no", "yes")[default] if isinstance(default, bool) else default
    text = [f"{key}={value}" for key, value in text.items()] if isinstance(text, dict) else text
    return f"  [default: {', '.join(map(str, text)) if isinstance(text, list) else text}]"


def options_text(kind: type[Run], shown: Signature) -> str:
    """Every parameter of a signature with what it means: the end of a docstring."""
    lines = ["Options:"]
    for name in (name for name in shown.parameters if name in kind.model_fields):
        field = kind.model_fields[name]
        choices = f" ({', '.join(map(str, words))})" if (words := _words(field.annotation)) else ""
        text = f"{name}: {field.description}{choices}{default_text(field)}"
        lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent=" " * 8)
    return "\n".join(lines)


def show_options(function: Callable[..., Any], options: type[Run], shown: Signature) -> None:
    """Have `help` and editors show `shown` as the function's signature, and say what each option means."""
    text = [cleandoc(function.__doc__), ""] if function.__doc__ else []
    function.__doc__ = "\n".join([*text, options_text(options, shown)])
    function.__annotations__ = {name: option.annotation for name, option in shown.parameters.items()}
    function.__annotations__["return"] = shown.return_annotation
    vars(function)["__signature__"] = shown


def with_options_of(options: type[Run], without: Collection[str] = ()) -> Callable[[F], F]:
    """Show, in place of a function's * and **, the options that it neither names nor does `without`."""

    def show(function: F) -> F:
        own = inspect.signature(function, eval_str=True)
        kinds = {name: parameter.kind for name, parameter in own.parameters.items()}
        stars = [n for n, kind in kinds.items() if kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
        named = {name: option for name, option in own.parameters.items() if name not in stars}
        parameters, unnamed = [*named.values()], Parameter.VAR_POSITIONAL in kinds.values()
        for option in signature(options, None, without={*without, *named}).parameters.values():
            parameters.append(option if unnamed else option.replace(kind=Parameter.KEYWORD_ONLY))
        parameters.sort(key=lambda p: (p.kind, p.kind == p.KEYWORD_ONLY and p.default is not p.empty))
        show_options(function, options, own.replace(parameters=parameters))
        return function

    return show


def _words(annotation: Any) -> list[Any]:
    """The words that an option may be, if there are such."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for argument in get_args(annotation) for word in _words(argument)]


def parse_call(kind: type[Run], name: str, given: Sequence[Any], fields: Mapping[str, Any]) -> Any:
    """The options of a call `name(*given, **fields)`, or those that were given ready made.

    Raises OptionError for inputs too many or given twice, and whatever parse_options raises.
    """
    if len(given) == 1 and isinstance(given[0], kind) and not fields:
        return given[0]
    unnamed = kind.POSITIONAL
    twice = [option for option in unnamed[: len(given)] if option in fields]
    if len(given) > len(unnamed) or twice:
        problem = f"{twice[0]} twice" if twice else f"{len(given)} values without names"
        raise OptionError(
            f"{name} cannot tell what it is given",
            given=problem,
            expected=f"{name}({', '.join([*unnamed, 'output=...'])}), and every other option by its name",
            fix="give each once, and all but the first by name, as in output='out/folder'",
        )
    return parse_options(kind, {**dict(zip(unnamed, given, strict=False)), **fields})

"""Flags of the command line, made from a stage's options, and what was given by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from moemerge.errors import OptionError
from moemerge.registry import Registry
from moemerge.run import commands
from moemerge.run.completion import completion
from moemerge.stages import ROWS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from pydantic.fields import FieldInfo

    from moemerge.options.base import Run

# Every command with flags of its own: the stages, and what runs several of them.
COMMANDS: Registry[type[Run]] = Registry(
    "command",
    {row.command: row.options for row in ROWS} | {row.name: row.options for row in commands.ROWS},
)
# The flag that arguments before any flag belong to.
LEADING = {"audit": "--models", "compare": "--runs", "evaluate": "--models", "combine": "--models"}

OPEN = "moemerge.open"  # in a context's meta: the flag that the next word without dashes belongs to


class StageCommand(click.Command):
    """A command whose flags are made when they are needed, because that imports pydantic."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The stage's options as flags, then what every command has."""
        if not any(isinstance(param, Flag) for param in self.params):
            self.params = [*flags(str(self.name)), *self.params]
        return super().get_params(ctx)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """As click does, with the arguments that may stand without a flag."""
        leading = [f"[{LEADING[self.name][2:].upper()}]..."] if self.name in LEADING else []
        return [*leading, *super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; a flag that may be repeated takes several values at once, too."""
        leading = [LEADING[self.name]] if self.name in LEADING and not _begins_with_flag(args) else []
        if args and not (leading or _begins_with_flag(args) or ctx.resilient_parsing):
            raise click.UsageError(self._without_flag(args[0]), ctx)
        repeatable = {name: param for param in self.get_params(ctx) if _repeats(param) for name in param.opts}
        ctx.meta[OPEN] = repeatable.get(_last_flag([*leading, *args]))
        return super().parse_args(ctx, list(_spread([*leading, *args] if args else [], set(repeatable))))

    def _without_flag(self, word: str) -> str:
        inputs = COMMANDS.get(str(self.name)).POSITIONAL or ("output",)
        return f"{word} has no flag before it; inputs have names here, such as --{inputs[0]} {word}"

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click does, and where a flag takes several values its further ones."""
        param: click.Parameter | None = ctx.meta.get(OPEN)
        if param is None or incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return param.shell_complete(ctx, incomplete)


def _repeats(param: click.Parameter) -> bool:
    return isinstance(param, Flag) and param.multiple


def _begins_with_flag(args: Sequence[str]) -> bool:
    return bool(args) and args[0].startswith("-")


def _last_flag(args: Sequence[str]) -> str:
    return next((arg for arg in reversed(args) if arg.startswith("--")), "")


def _spread(args: Sequence[str], repeatable: set[str]) -> Iterator[str]:
    """`--models A B` as `--models A --models B`: stage commands have no arguments besides flags."""
    flag, filled = "", False
    for arg in args:
        if arg.startswith("--"):
            flag, filled = arg, False
        elif flag in repeatable:
            yield from [flag] * filled
            filled = True
        yield arg


class Flag(click.Option):
    """A command-line flag for one field of a stage's options; its value is checked by those."""


def flags(stage: str) -> list[Flag]:
    """One flag per option of `stage`, required ones first."""
    from moemerge.options.base import Run

    fields = COMMANDS.get(stage).model_fields
    order = sorted(fields, key=lambda name: (not fields[name].is_required(), name in Run.model_fields))
    return [_flag(stage, name, fields[name]) for name in order]


def _flag(stage: str, name: str, field: FieldInfo) -> Flag:
    from moemerge.options.signature import default_text

    dashed = "--" + name.replace("_", "-")
    help = f"{field.description}{default_text(field)}"
    kinds = _kinds(field.annotation)
    offered = completion(stage, name, field, _words(field.annotation))
    if kinds == [bool]:
        return Flag([f"{dashed}/--no-{dashed[2:]}", name], default=None, help=help)
    if dict in kinds:
        return Flag(
            [dashed, name], multiple=True, metavar=_mapping_metavar(field), help=help, shell_complete=offered
        )
    if list in kinds:
        help += "; several, or repeated"
        return Flag([dashed, name], multiple=True, metavar="VALUE", help=help, shell_complete=offered)
    if all(isinstance(kind, str) for kind in kinds):
        return Flag([dashed, name], type=click.Choice(kinds), help=help)
    metavar = "|".join(kind if isinstance(kind, str) else kind.__name__.upper() for kind in kinds)
    return Flag([dashed, name], metavar=metavar, help=help, shell_complete=offered)


def _kinds(annotation: Any) -> list[Any]:
    """The plain types and the literal values that an option may have, without None."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return list(arguments)
    if origin in (dict, list):
        return [origin]
    if hasattr(annotation, "__metadata__"):
        return _kinds(annotation.__origin__)
    if arguments:
        return [kind for argument in arguments for kind in _kinds(argument)]
    return [] if annotation is type(None) else [annotation]


def _words(annotation: Any) -> list[str]:
    """The words among the values that an option may have, or that each of its values may be."""
    kinds = _kinds(annotation)
    if kinds == [list]:
        kinds = _kinds(get_args(annotation)[0]) if get_args(annotation) else []
    return [kind for kind in kinds if isinstance(kind, str)]


def _mapping_metavar(field: FieldInfo) -> str:
    if _names_inputs(field):
        return "[NAME=]SOURCE"
    return "NAME=VALUE,..." if list in _kinds(_value_type(field.annotation)) else "NAME=VALUE"


def _names_inputs(field: FieldInfo) -> bool:
    from moemerge.options.base import INPUT

    return dict in _kinds(field.annotation) and INPUT in field.metadata


def _value_type(annotation: Any) -> Any:
    while hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    return get_args(annotation)[1]


def given_options(stage: str, values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given on the command line, as the stage's option class takes them."""
    fields = COMMANDS.get(stage).model_fields
    given = {}
    for name, value in values.items():
        if value is None or value == ():
            continue
        unnamed = _names_inputs(fields[name]) and not any("=" in text for text in value)
        given[name] = list(value) if unnamed else _parse(name, value, fields[name].annotation)
    return given


def _parse(name: str, value: Any, annotation: Any) -> Any:
    kinds = _kinds(annotation)
    if dict in kinds:
        pairs = [_pair(name, text) for text in value]
        lists = list in _kinds(_value_type(annotation))
        return {key: text.split(",") if lists else text for key, text in pairs}
    if list in kinds:
        return list(value)
    optional = type(None) in get_args(annotation)
    return None if optional and value == "none" else value


def _pair(name: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        flag = "--" + name.replace("_", "-")
        raise OptionError(f"bad option {flag}", given=text, expected="name=value", fix=f"correct {flag}")
    return key, value

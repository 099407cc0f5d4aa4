"""What the command init takes, and what its help says of goals and templates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from moemerge.errors import OptionError
from moemerge.run.completion import files, names

OPTIONS = (
    click.option(
        "--model",
        "models",
        multiple=True,
        metavar="MODEL",
        help="Your model; repeat for several.",
        shell_complete=files,
    ),
    click.option(
        "--train", metavar="DATA", help="Your pairs: a file, or a hub name:split.", shell_complete=files
    ),
    click.option("--test", metavar="DATA", help="Other pairs, to measure on.", shell_complete=files),
    click.option(
        "--goal",
        metavar="GOAL",
        help="What the recipe is to do, see below.  [default: merge or combine]",
        shell_complete=names("init", "goal"),
    ),
    click.option(
        "--hours", type=float, help="Longest time for training the mixture, in hours.  [default: 2]"
    ),
    click.option(
        "--template",
        metavar="NAME",
        help="Or copy this recipe, see below.  [default: quickstart]",
        shell_complete=names("init", "template"),
    ),
)


def init_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options of init."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


class InitCommand(click.Command):
    """Tells of templates and goals what each is."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Two lists below the options."""
        from moemerge.run.own_recipe import GOALS
        from moemerge.run.templates import summary, templates

        with formatter.section("Goals"):
            formatter.write_dl([(name, goal.summary) for name, goal in GOALS.items()])
        with formatter.section("Templates"):
            formatter.write_dl([(name, summary(path)) for name, path in templates().items()])


def refuse_half(models: Sequence[str], train: str | None, template: str | None) -> None:
    """A recipe of one's own needs model and pairs, and is no template."""
    if not models or train is None or template is not None:
        given = {"--model": models, "--train": train, "--template": template}
        raise OptionError(
            "a recipe for your own model and data cannot be written",
            given=", ".join(flag for flag, value in given.items() if value) or "neither model nor data",
            expected="--model and --train, or --template alone",
            fix="give --model MODEL --train DATA",
        )

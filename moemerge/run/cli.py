"""The command line: a command per stage, flags made from its options. Only this file prints or exits."""

from __future__ import annotations

import errno
import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from moemerge.artifacts.memory import shortage
from moemerge.artifacts.ranks import first_to_fail, leads
from moemerge.artifacts.redaction import redact
from moemerge.errors import MoemergeError, first_line, suggest
from moemerge.reports.table import Table, visible
from moemerge.run import commands
from moemerge.run.flags import StageCommand, given_options
from moemerge.run.headlines import headline
from moemerge.run.init_command import InitCommand, init_options, refuse_half
from moemerge.run.messages import Discreet
from moemerge.run.signals import Stopped, stoppable
from moemerge.stages import ROWS

if TYPE_CHECKING:
    from moemerge.artifacts.weight_files import Fault
    from moemerge.options.base import Run
    from moemerge.options.recipe import Recipe
    from moemerge.run.forecast import Forecast
    from moemerge.run.steps import RunReport, StepReport

WHOLE = 1000  # letters: more than any command's help
FAULTY, USAGE_ERROR, BY_SIGNAL = 1, 2, 128
# Of the machine, not of moemerge: a full device that is printed to, a reader that went away, too many files.
NO_WAY_ON = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE, errno.EMFILE, errno.ENFILE}


class Program(click.Group):
    """Lists commands in pipeline order and knows near names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands in the order of their definition."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each command with the whole of its first sentence, on two lines if need be."""
        rows = [(name, command.get_short_help_str(WHOLE)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command to run; a usage error with a near name if there is none."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            raise click.UsageError(f"unknown command {args[0]!r}: {suggest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def _say(text: str, err: bool = False) -> None:
    """Print, on one's own lines only: names in data and models must not steer the terminal."""
    click.echo(visible(text), err=err)


def _set_verbosity(ctx: click.Context, param: click.Parameter, value: bool | None) -> None:
    levels = {None: logging.INFO, True: logging.DEBUG, False: logging.WARNING}
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Discreet("%(message)s"))
    # Of several processes that work together the first one tells.
    logging.getLogger("moemerge").setLevel(levels[value] if leads() else logging.ERROR)
    # Read by transformers when it is imported, which is later.
    if value is not True:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _verbosity() -> click.Option:
    return click.Option(
        ["--verbose/--quiet"],
        default=None,
        expose_value=False,
        callback=_set_verbosity,
        help="More messages, or only warnings.",
    )


def run_stage(stage: str, **values: Any) -> None:
    """Run one stage with the options given on the command line, and print its main results."""
    from moemerge.artifacts.manifest import read_manifest
    from moemerge.stages import STAGES

    output = STAGES.get(stage)(**given_options(stage.replace("_", "-"), values))
    if leads():
        _say(f"{output}  {headline(read_manifest(output))}")
        if stage == "evaluate":
            _tell_evaluation(output)


def _tell_evaluation(folder: Path) -> None:
    from moemerge.evaluation.main_table import table
    from moemerge.evaluation.report import read_report
    from moemerge.evaluation.verdict import standing

    report = read_report(folder)
    parts = [table(report), standing(report), f"Report: {folder / 'report.html'}"]
    _say("\n" + "\n\n".join(part for part in parts if part))


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="moemerge")
def cli() -> None:
    """Upcycle a reward model into a mixture of experts, train it, and merge it back.

    A whole run: init writes a recipe, check finds its faults, run does every step. The other commands are the
    single steps, in order.
    """


def _command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    command = cli.command()(function)
    command.params.append(_verbosity())
    return function


_set = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Change one value of the recipe; repeat for more.",
)


@cli.command(cls=InitCommand)
@init_options
@click.argument("path", type=click.Path(path_type=Path))
def init(
    path: Path,
    models: Sequence[str],
    train: str | None,
    test: str | None,
    goal: str | None,
    hours: float | None,
    template: str | None,
) -> None:
    """Write a commented recipe to PATH: for your model and pairs, or a copy of one that comes with moemerge.

    With --model and --train, lengths, layers, experts and batch size are filled in for the data and for the
    memory at hand, and the recipe says why.
    """
    from moemerge.run.templates import write_template

    if not (models or train or test or goal) and hours is None:
        _say(f"wrote {write_template(path, template or 'quickstart')}; run it: moemerge run {path}")
        return
    from moemerge.run.own_recipe import HOURS, write_recipe

    refuse_half(models, train, template)
    written = write_recipe(path, models, str(train), test, goal, HOURS if hours is None else hours)
    _say(f"wrote {written}; look at it, then: moemerge check {path}; moemerge run {path}")


init.params.append(_verbosity())


@_command
@_set
@click.argument("recipe", type=click.Path(path_type=Path))
def check(recipe: Path, overrides: Sequence[str]) -> None:
    """Find every fault of RECIPE, or print its plan: steps, and what they will take."""
    from moemerge.run.check import load_recipe
    from moemerge.run.forecast import forecast
    from moemerge.run.plan import plan

    loaded = load_recipe(recipe, overrides)
    steps = plan(loaded)
    foreseen = forecast(loaded)
    _say("ok")
    for line in _doubts(loaded):
        _say(line)
    width = max(16, *(len(step.name) for step in steps))
    for step in steps:
        takes = "" if isinstance(foreseen, str) else foreseen.line(step.name)
        _say(f"  {step.name:<{width}} {step.stage:<10} -> {step.options.output}" + f"  {takes}" * bool(takes))
    _tell_forecast(foreseen)


def _tell_forecast(foreseen: Forecast | str, unknown: bool = True) -> None:
    """Print it; where nothing is known the reason, if `unknown` asks for that."""
    if not isinstance(foreseen, str):
        for line in foreseen.sentences():
            _say(line)
    elif unknown:
        _say(foreseen)


def _doubts(recipe: Recipe | Run) -> Iterator[str]:
    """What a recipe's user may want to know before it runs."""
    from moemerge.options.recipe import Recipe
    from moemerge.run.budget import shortfalls
    from moemerge.run.faults import taken_for_hub_names

    for key, source in taken_for_hub_names(recipe).items():
        yield f"{key} {source} is not on this disk: it will be looked for on the hub"
    for shortfall in shortfalls(recipe) if isinstance(recipe, Recipe) else ():
        yield f"warning: {shortfall}"


@_command
@_set
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of the run, in place of the recipe's."
)
@click.argument("recipe", type=click.Path(path_type=Path))
def run(recipe: Path, overrides: Sequence[str], output: Path | None) -> None:
    """Run the steps of RECIPE that are not done yet."""
    from moemerge.run.check import load_recipe
    from moemerge.run.forecast import forecast
    from moemerge.run.pipeline import run_recipe

    loaded = load_recipe(recipe, overrides, output)
    if not loaded.output.exists():  # of a run that goes on it is not known how much is left
        _tell_forecast(forecast(loaded), unknown=False)
    _tell_run(run_recipe(recipe, overrides, output, tell=_tell_step))


def _tell_run(report: RunReport) -> None:
    from moemerge.evaluation.scoring_code import how_to_score

    pictures = "".join(f"Picture: {path}\n" for path in report.pictures)
    _say(f"\n{report.overview}\n\n{report.verdict}\n\n{pictures}Report: {report.page}\n")
    made = report.merged.is_relative_to(report.output)  # an audit makes no model
    if made and (report.merged / "config.json").is_file():
        _say(how_to_score(report.merged))


@_command
@click.option(
    "--inputs", is_flag=True, help="Verify also what it was made from, as far as it is still there."
)
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path, inputs: bool) -> int:
    """Hold FOLDER, which a step wrote, against its manifest: every file, checksum, header and index.

    Ends with code 0 if nothing is wrong, 1 with a table of what is, or of what an older version wrote without
    the means to check it, 2 if FOLDER cannot be verified.
    """
    from moemerge.artifacts.verify import UNCHECKED
    from moemerge.artifacts.verify import verify as verify_artifact

    verification = verify_artifact(folder, inputs)
    faults = verification.faults
    for source in verification.gone:
        _say(f"not there to be verified: {source}")
    if faults:
        _say(fault_table(faults))
    old = sum(fault.what == UNCHECKED for fault in faults)
    _say(f"{len(verification.folders)} folder(s) verified: {len(faults) - old or 'no'} fault(s)")
    if old:
        _say(
            f"{old} manifest(s) cannot be checked: an older version wrote them, without their own checksum. "
            "To have one, run the same command with --overwrite, or the recipe again without the folder."
        )
    return FAULTY if faults else 0


def _tell_step(step: StepReport) -> None:
    from moemerge.run.steps import step_line

    _say(step_line(step))


for _row in ROWS:
    cli.add_command(
        StageCommand(
            _row.command, help=_row.summary, callback=partial(run_stage, _row.name), params=[_verbosity()]
        )
    )


def run_several(command: str, **values: Any) -> None:
    """Do the steps of a command that does many, as the flags say, and tell what came of them."""
    function = commands.FUNCTIONS.get(command)
    _tell_run(function(tell=_tell_step, **given_options(command, values)))


for _many in commands.ROWS:
    cli.add_command(
        StageCommand(
            _many.name, help=_many.summary, callback=partial(run_several, _many.name), params=[_verbosity()]
        )
    )


@cli.group()
def mergekit() -> None:
    """mergekit's own commands, knowing moemerge's merge methods."""


def _run_mergekit(context: click.Context, arguments: tuple[str, ...]) -> None:
    from moemerge.merging.mergekit.bridge import run_command

    run_command(str(context.info_name), arguments, context.command_path)


for _name in ("yaml", "multi", "pytorch"):
    # Options and help are the stock command's.
    mergekit.add_command(
        click.Command(
            _name,
            help=f"mergekit-{_name}, with the same arguments and options.",
            callback=click.pass_context(_run_mergekit),
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
            context_settings={"ignore_unknown_options": True, "help_option_names": []},
        )
    )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line. Faults that the user can fix end with code 2, a signal with 128 + its number."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stoppable():
            code = cli.main(args=arguments, prog_name="moemerge", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        _end(shown.getvalue().rstrip("\n"), error.exit_code)
    except MoemergeError as error:
        _end(redact(str(error)))
    except OSError as error:
        if error.errno not in NO_WAY_ON:
            raise
        with suppress(OSError):  # what could not be printed is not tried again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _end(redact(f"moemerge cannot go on: {error}"))
    except Stopped as stopped:
        _say_how_to_go_on(stopped.number, arguments)
    except (KeyboardInterrupt, click.Abort):
        _say_how_to_go_on(signal.SIGINT, arguments)
    except Exception as error:  # last: click.Abort is one, too
        short = shortage(error)
        if short is not None:
            _end(redact(f"moemerge cannot go on: too little memory ({first_line(short)})"))
        if first_to_fail():
            raise
        sys.exit(FAULTY)


def _end(text: str, code: int = USAGE_ERROR) -> NoReturn:
    """End with an error, told by one process if several work together."""
    if first_to_fail():
        _say(text, err=True)
    sys.exit(code)


def _say_how_to_go_on(number: int, arguments: Sequence[str]) -> NoReturn:
    command = redact(shlex.join(["moemerge", *arguments]))
    name = signal.Signals(number).name
    _end(f"stopped by {name}, nothing is left half-written; to go on: {command}", BY_SIGNAL + number)


def fault_table(faults: Sequence[Fault]) -> str:
    """One row per thing that is wrong with a folder."""
    rows = [[fault.file, fault.what, fault.recorded, fault.found] for fault in faults]
    return Table("", ["file", "what", "in the manifest", "found"], rows).aligned()

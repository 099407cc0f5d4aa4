"""patch: a reward model is attacked, trained on with a few of the answers found, and attacked again.

After REFORM (arXiv 2507.06419), by edits or by guided decoding, and with rivals of equal budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from moemerge.artifacts.manifest import read_manifest
from moemerge.artifacts.ranks import refuse_several
from moemerge.errors import together
from moemerge.options.patch import Patch
from moemerge.options.signature import parse_call, with_options_of
from moemerge.run.patch_check import patch_faults
from moemerge.run.patch_plan import Plan, every_step
from moemerge.run.steps import (
    RunReport,
    Step,
    StepReport,
    Tell,
    alone,
    keep_recipe,
    recover_steps,
    run_steps,
    tell_versions,
)


@with_options_of(Patch)
def patch(*inputs: Any, tell: Tell | None = None, **fields: Any) -> RunReport:
    """Make a reward model hold better against edits that raise its score, and measure whether it does.

    The model is attacked on its training pairs, and trained on for `rounds` rounds with a share of the
    answers found: edited ones, or with search decode written by a language model. Each edit is also made to a
    chosen answer, so that being edited is no sign of being worse. Before and after it is attacked on other
    pairs, by the patch's own kind of attack and by edits that no patch has, and so are two rivals of as many
    steps: trained on ordinary pairs, and on pairs edited at random or written without guidance. Writes a
    run's folder: the model in OUTPUT/round-N/patched, its card in OUTPUT/card, and OUTPUT/report.html. Steps
    that are done are not done again. Where no attack succeeds there is nothing to patch, and the page says
    so. Raises OptionError, ArtifactError if another run is at work there, and whatever the stages raise.
    Source: REFORM (arXiv 2507.06419).
    """
    refuse_several("patch")
    options: Patch = parse_call(Patch, "patch", inputs, fields)
    if faults := patch_faults(options):
        raise together("patch", faults)
    with alone(options.output):
        keep_recipe(options)
        plan = Plan(options)
        reports = [*_done(plan, options, tell)]
        tell_versions(reports)
        from moemerge.run.patch_page import write_pages

        return write_pages(plan, reports)


def _done(plan: Plan, options: Patch, tell: Tell | None) -> Iterator[StepReport]:
    """All steps, in order; rounds end where nothing is found."""
    again, place, count = "overwrite" if options.overwrite else "", 0, len(every_step(options))

    def run(steps: Iterable[Step]) -> Iterator[StepReport]:
        nonlocal place
        ordered = [*steps]
        recover_steps(ordered)
        yield from run_steps(ordered, tell, again, before=place, after=count - place - len(ordered))
        place += len(ordered)

    yield from run(plan.first())
    for number in range(1, options.rounds + 1):
        found = plan.found(number)
        yield from run([found])
        if not read_manifest(found.options.output)["results"]["succeeded"]:
            break
        yield from run(plan.round(number))
        plan.rounds = number
    if plan.rounds:
        yield from run(plan.last())

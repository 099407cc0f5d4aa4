"""combine: several reward models and a few pairs of one's own become the one model to use.

Candidates are made without the part of the pairs that they are judged on; then the winner is made from all.
"""

from __future__ import annotations

from typing import Any

from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.ranks import refuse_several
from moemerge.errors import together
from moemerge.options.combine import Combine
from moemerge.options.signature import parse_call, with_options_of
from moemerge.run.combine_check import input_faults, model_faults
from moemerge.run.combine_plan import CHOICE, Plan, with_start
from moemerge.run.steps import RunReport, Tell, alone, keep_recipe, recover_steps, run_steps, tell_versions

FINAL_STEPS = 2  # model and card; a fit or a merge may come before them


@with_options_of(Combine)
def combine(*inputs: Any, tell: Tell | None = None, **fields: Any) -> RunReport:
    """Find the reward model to use, given several and some labelled pairs of one's own.

    Tries each model as it is, their average, the sum of their changes from `base`, a merge with fitted
    weights, and each of these trained on the pairs; every candidate is judged on pairs that it was not made
    from, and a simpler one is taken unless a costlier one is better beyond chance. Writes a run's folder: the
    winner, made from all pairs, as an ordinary checkpoint in OUTPUT/model, its card in OUTPUT/card, and
    OUTPUT/report.html. Steps that are done are not done again. Raises OptionError, ArtifactError if another
    run is at work there, and whatever the stages raise. Source: task arithmetic (arXiv 2212.04089), WARM
    (arXiv 2401.12187).
    """
    refuse_several("combine")
    options: Combine = parse_call(Combine, "combine", inputs, fields)
    if faults := input_faults(options):
        raise together("combine", faults)
    options = with_start(options)
    if faults := model_faults(options, on_hub=True):
        raise together("combine", faults)
    steps = Plan(options)
    with alone(options.output):
        recover_steps(steps.trials())
        keep_recipe(options)
        again = "overwrite" if options.overwrite else ""
        reports = [*run_steps(steps.trials(), tell, again, after=FINAL_STEPS)]
        taken = read_object(options.output / CHOICE / "choice.json")["taken"]
        final = list(steps.winner(taken))
        recover_steps(final)
        reports += run_steps(final, tell, again, before=len(reports))
        tell_versions(reports)
        from moemerge.run.combine_page import write_pages

        return write_pages(options, reports)

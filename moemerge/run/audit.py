"""audit: reward models measured on pairs, under edits that should not matter, and under attack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.artifacts.ranks import refuse_several
from moemerge.errors import MoemergeError, together
from moemerge.options.audit import Audit
from moemerge.options.base import input_fields
from moemerge.options.signature import parse_call, with_options_of
from moemerge.run.faults import headless, missing_inputs, named, occupied
from moemerge.run.steps import (
    RunReport,
    Step,
    StepPlan,
    Tell,
    alone,
    keep_recipe,
    recover_steps,
    run_steps,
    tell_versions,
)

EVALUATION, ATTACKS, COMPARED = "evaluation", "attacks", "attacks/compared"


@with_options_of(Audit)
def audit(*inputs: Any, tell: Tell | None = None, **fields: Any) -> RunReport:
    """Measure how far reward models can be trusted, one or several on the same pairs.

    Accuracy and calibration, seven probes by edited answers, best-of-n where there are scored candidates, and
    an attack on each model: how many of its right verdicts fall to edits that leave the content as it was.
    Writes a run's folder with OUTPUT/report.html; steps that are done are not done again. Raises OptionError,
    ArtifactError if another run is at work there, and whatever the stages raise.
    """
    refuse_several("audit")
    options: Audit = parse_call(Audit, "audit", inputs, fields)
    if faults := audit_faults(options):
        raise together("audit", faults)
    steps = [*Plan(options).steps()]
    with alone(options.output):
        recover_steps(steps)
        keep_recipe(options)
        reports = [*run_steps(steps, tell, "overwrite" if options.overwrite else "")]
        tell_versions(reports)
        from moemerge.run.audit_page import write_pages

        return write_pages(options, reports)


def audit_faults(options: Audit, section: str = "") -> list[MoemergeError]:
    """Every fault that can be told before anything runs; `section` stands before option names."""
    models = {f"{named('models', section)}.{name}": model for name, model in options.models.items()}
    return [*missing_inputs(input_fields(options), section), *headless(models), *occupied(options.output)]


class Plan(StepPlan):
    """The steps of an audit."""

    def __init__(self, options: Audit) -> None:
        super().__init__(options)
        self.options = options

    def steps(self) -> Iterator[Step]:
        """Data, the evaluation of all models, an attack on each, and what holds against these."""
        o, first = self.options, next(iter(self.options.models.values()))
        candidates = {"answers": o.candidates} if o.candidates else {}
        yield self.step(
            "data", "data", tests={"test": o.pairs}, candidates=candidates, max_test=o.max_pairs,
            tokenizer=first, fields=o.fields, **self.format,
        )  # fmt: skip
        pairs = self.path("data", "tests", "test.jsonl.gz")
        answers = {name: self.path("data", "candidates", f"{name}.jsonl.gz") for name in candidates}
        probes = ["accuracy", "calibration", *(["best_of_n"] if candidates else []), "biases"]
        judged = {"confidence": o.confidence, "resamples": o.resamples}
        yield self.step(
            EVALUATION, "evaluate", models=o.models, pairs={"test": pairs}, candidates=answers, probes=probes,
            **judged, **self.format,
        )  # fmt: skip
        for name, model in o.models.items():
            yield self.step(
                f"{ATTACKS}/{name}", "attack", model=model, pairs=pairs, max_pairs=o.attack_pairs,
                steps=o.steps, proposals=o.proposals, **judged, **self.format,
            )  # fmt: skip
        if len(o.models) > 1:
            attacks = {name: self.path(ATTACKS, name) for name in o.models}
            yield self.step(COMPARED, "robustness", attacks=attacks, **judged)

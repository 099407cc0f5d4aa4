"""Stage `evaluate`: several reward models measured on the same data, side by side."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from moemerge.artifacts.environment import hardware, versions
from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.stage import Draft, stage
from moemerge.errors import OptionError, unknown
from moemerge.evaluation import gold, protocol
from moemerge.evaluation.cautions import equal_models, without_copies
from moemerge.evaluation.ensembles import check_ensembles, ensemble_facts, ensemble_scores
from moemerge.evaluation.measures import main_numbers, model_rows
from moemerge.evaluation.page import evaluation_sections
from moemerge.evaluation.probes import PROBES, expand
from moemerge.evaluation.probes.accuracy import check_sections
from moemerge.evaluation.probes.base import Probe
from moemerge.evaluation.report import FORMAT, ModelFacts, Probes, Report, TimedFacts, read_report
from moemerge.evaluation.rewardbench_files import write_results
from moemerge.evaluation.sets import (
    EvaluationSet,
    by_kind,
    edited_sets,
    probe_inputs,
    read_sets,
    score_tensors,
)
from moemerge.merging.calibration import Calibration
from moemerge.models.device import free_memory, use_device
from moemerge.models.scorers import Loaded, Scorer, open_scorer
from moemerge.options.evaluate import Evaluate, EvaluateSettings
from moemerge.reports.html import write_report
from moemerge.reports.provenance import provenance_section

log = logging.getLogger(__name__)
TEMPLATES = {"chat": "tokenizer", "plain": "none: turns joined by newlines"}


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    return model_rows(read_report(folder))


@stage("evaluate", Evaluate, shares_work=True, rows=_rows)
def evaluate(options: Evaluate, draft: Draft) -> None:
    """Score every model on every set, once, and run the probes on the scores.

    One model is in memory at a time. A row that is too long for one model's tokenizer is left out for all,
    so that comparisons stay paired. Candidates' gold scores are those of the file, or of `gold_model` or
    `gold_function`. Writes scores.safetensors, report.json, report.html, report.md, plots and, of
    RewardBench, results in its own form.
    Raises OptionError if nothing can be measured or the baseline is no model, DataError for unusable rows.
    """
    options = by_kind(options)
    check_ensembles(options)
    scales = _scales(options)
    probes = _probes(options)
    device = use_device(options)
    scorers = {name: open_scorer(path, options.trust_remote_code) for name, path in options.models.items()}
    tokenizers = {name: scorer.reader() for name, scorer in scorers.items()}
    sets = _regraded(read_sets(options, tokenizers), options, device)
    check_sections(options, {pair.subset for read in sets if read.kind == "pairs" for pair in read.items})
    described = protocol.describe(options, tokenizers, sets)
    sets += edited_sets(options, tokenizers, probes, sets)
    alike = equal_models(draft.provenance["inputs"]["models"])
    scores, models = _score_models(options, scorers, sets, scales, device, alike)
    inputs = probe_inputs(sets, scores)
    results = {
        name: probe.measure(inputs[probe.needs], options, options.seed) for name, probe in probes.items()
    }
    report: Report = {
        "format": FORMAT,
        "models": {name: _without_times(facts) for name, facts in models.items()},
        "baseline": options.baseline or next(iter(models)),
        "gold": gold.source_of_gold(options),
        "rows": {f"{scored.kind}/{scored.name}": scored.report for scored in sets},
        "protocol": described,
        "probes": cast(Probes, results),
        "plots": [],
        "plots_by_probe": {},
    }
    if alike:
        report["equal_models"] = alike
    shown: Mapping[str, Any] = without_copies(report)
    plots = {name: probe.plot(shown[name], draft.folder) for name, probe in probes.items()}
    report["plots"], report["plots_by_probe"] = [plot for names in plots.values() for plot in names], plots
    _write(draft, report)
    write_results(draft.folder, report, inputs["rewardbench"], TEMPLATES[options.rewardbench_template])
    save_file(score_tensors(sets, scores), draft.folder / "scores.safetensors")
    draft.results |= {"models": models, "rows": report["rows"], "main": main_numbers(report)}


def _score_models(
    options: Evaluate,
    scorers: Mapping[str, Scorer],
    sets: Sequence[EvaluationSet],
    scales: Mapping[str, float],
    device: torch.device,
    alike: Sequence[Sequence[str]],
) -> tuple[dict[str, list[Tensor]], dict[str, TimedFacts]]:
    """Scores of every model and ensemble on every set, and what each costs; one is in memory at a time.

    alike: groups of models with the same weights; those that read the same tokens are scored once.
    """
    scores: dict[str, list[Tensor]] = {}
    models: dict[str, TimedFacts] = {}
    for name, scorer in scorers.items():
        if twin := _scored_before(name, alike, scores, sets):
            scores[name] = [of_set.clone() for of_set in scores[twin]]  # no file holds a tensor twice
            models[name] = cast(TimedFacts, {**models[twin], "source": scorer.source})
            continue
        loaded = scorer.load(device, options)
        started = time.perf_counter()
        scores[name] = _score_sets(name, loaded, sets, options.batch_tokens)
        seconds = time.perf_counter() - started
        tokens = sum(len(text.ids) for scored in sets for text in scored.texts[name])
        facts = {"source": scorer.source, **loaded.facts}
        models[name] = cast(TimedFacts, {**facts, "seconds": seconds, "tokens": tokens})
        del loaded
        free_memory()
    return scores | ensemble_scores(options, scores, scales), models | ensemble_facts(options, models)


def _scored_before(
    name: str,
    alike: Sequence[Sequence[str]],
    scores: Mapping[str, Sequence[Tensor]],
    sets: Sequence[EvaluationSet],
) -> str | None:
    """The first model that is the same, was scored, and reads the same tokens."""
    twins = [twin for names in alike if name in names for twin in names if twin in scores]
    return next((twin for twin in twins if all(s.texts[twin] == s.texts[name] for s in sets)), None)


def _scales(options: Evaluate) -> dict[str, float]:
    """What ensembles divide each member's scores by; nothing without a calibration.

    Raises CheckpointError if a member was not calibrated.
    """
    if options.calibration is None:
        return {}
    members = list(dict.fromkeys(name for names in options.ensembles.values() for name in names))
    scales = Calibration.load(options.calibration).scales_of([options.models[name] for name in members])
    return dict(zip(members, scales, strict=True))


def _without_times(facts: TimedFacts) -> ModelFacts:
    """Evaluated again, the same models shall give the same report."""
    return cast(ModelFacts, {key: value for key, value in facts.items() if key != "seconds"})


def _probes(options: Evaluate) -> dict[str, Probe]:
    """The probes asked for that have data; faults in the options are found here, before any work."""
    known = [*options.models, *options.combinations()]
    if options.baseline is not None and options.baseline not in known:
        raise unknown("baseline", options.baseline, known)
    asked = {name: PROBES.get(name) for name in expand(options.probes)}
    probes = {name: probe for name, probe in asked.items() if getattr(options, probe.needs)}
    chosen = options.probes != EvaluateSettings().probes
    for name in asked.keys() - probes.keys() if chosen else ():
        log.warning("%s is left out: no %s are given", name, asked[name].needs)
    if not probes or not options.models:
        raise OptionError(
            "nothing to evaluate",
            given=f"{len(options.models)} models; probes {', '.join(asked) or 'none'} without data",
            expected="models, and pairs, candidates, rewardbench or rmbench, whatever a probe needs",
            fix="give models as name=path, and data, which may be any of these: its columns decide",
        )
    return probes


def _regraded(sets: list[EvaluationSet], options: Evaluate, device: torch.device) -> list[EvaluationSet]:
    """The sets; if gold scores are not read but made, candidates have those."""
    if not options.candidates:
        return sets
    reward = gold.load_gold(options, device, options, options.trust_remote_code)
    if reward is None:
        return sets
    regraded = [
        replace(read, items=gold.regrade(read.items, reward)) if read.kind == "candidates" else read
        for read in sets
    ]
    del reward
    free_memory()
    return regraded


def _score_sets(
    name: str,
    loaded: Loaded,
    sets: Sequence[EvaluationSet],
    batch_tokens: int,
) -> list[Tensor]:
    """Scores of each set's texts, one after the other."""
    return [loaded.score(scored.texts[name], batch_tokens, f"{name} on {scored.name}") for scored in sets]


def _write(draft: Draft, report: Report) -> None:
    """report.json, and the same as a page and as markdown."""
    write_json(draft.folder / "report.json", report)
    made = {**draft.provenance, "versions": versions(), "hardware": hardware()}
    sections = [*evaluation_sections(report, draft.folder), provenance_section({"evaluate": made})]
    write_report(draft.folder, "Evaluation", sections)

"""Stage `optimise`: a small policy-gradient run against each reward model; gold and proxy over its steps.

Q prompts that are measured on, V measurements (at step 0 and then every so many steps), M models, R resamples
(the values themselves come first).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.artifacts.json_file import read_object, write_json
from moemerge.artifacts.stage import Draft, stage
from moemerge.artifacts.workspace import once, workspace
from moemerge.data.pairs import CandidateSet, as_answer
from moemerge.data.reading import distinct, read_prompts
from moemerge.data.rows import Row, RowSummary, Text, write_rows
from moemerge.errors import DataError, OptionError, together, unknown
from moemerge.evaluation import gold
from moemerge.evaluation.credit import token_credit
from moemerge.evaluation.gold import Reward
from moemerge.evaluation.policy_page import MEASURED, table
from moemerge.evaluation.probes import over_optimisation
from moemerge.models.device import free_memory, use_training_device
from moemerge.models.folder import ModelFolder
from moemerge.models.language_model import load_language_model
from moemerge.models.scorers import open_scorer
from moemerge.options.optimise import Optimise
from moemerge.reports import plotting
from moemerge.reports.figures import Line, Panel
from moemerge.reports.statistics import Floats, banded, resampled_curves
from moemerge.training.policy import Answers, batch_seed, kl_from, sample_answers, short_prompts

TITLES = {
    "gold": "gold score",
    "proxy": "model's own score (from step 0, standardised)",
    "kl": "KL from the first policy (nats)",
}
UNITS = {"gold": "gold score", "proxy": "own score", "kl": "KL"}


def _rows(folder: Path) -> Iterator[Row]:
    """Each model at each step that was measured: gold, proxy and KL with their intervals."""
    report = read_object(folder / "report.json")
    for model, curves in report["models"].items():
        for number, step in enumerate(report["steps"]):
            ends = [name + end for name in MEASURED for end in ("", "_low", "_high")]
            yield {"model": model, "step": step, **{name: curves[name][number] for name in ends}}


@stage("optimise", Optimise, rows=_rows)
def optimise(options: Optimise, draft: Draft) -> None:
    """Optimise the policy against each reward model; measure gold, proxy and KL on prompts set aside.

    Policy, its first state, reward model and gold model are in memory at once. All models meet the same
    prompts with the same seeds, so that differences are paired. A finished model's run is kept: a killed run,
    started again, goes on with the next. Writes report.json, report.md, optimise.png and samples.jsonl.gz,
    the measured answers with their scores. Raises OptionError, DataError or CheckpointError.
    """
    _check_baseline(options)
    _check_trackers(options)
    device = use_training_device(options)
    gold_reward = gold.load_gold(options, device, options, options.trust_remote_code)
    assert gold_reward is not None  # the options see to it
    with workspace(options) as folder:
        runs = {}
        for number, name in enumerate(options.models):
            run = partial(_run, options, name, gold_reward, device, folder)
            runs[name] = once(folder / f"{number}.json", run)
            free_memory()
    report = _report(options, runs)
    _write(draft, report, runs)


def _check_baseline(options: Optimise) -> None:
    if not options.models:
        raise OptionError("no models", given="none", expected="name=folder", fix="give models")
    if options.baseline is not None and options.baseline not in options.models:
        raise unknown("baseline", options.baseline, options.models)


def _check_trackers(options: Optimise) -> None:
    if options.report_to:
        from moemerge.training.arguments import tracker_faults

        if faults := [*tracker_faults(options.report_to, "report_to")]:
            raise together("options", faults)


@dataclass
class _Meter:
    """Measures a policy on the prompts set aside, always with the same seeds."""

    options: Optimise
    policy: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Text]
    proxy: Reward
    gold: Reward
    rows: list[Row]

    def measure(self, step: int) -> None:
        """Add the rows of this step: an answer with its proxy, gold and KL each."""
        asked = [prompt for prompt in self.prompts for _ in range(self.options.measure_answers)]
        size = self.options.batch_size
        for number, start in enumerate(range(0, len(asked), size)):
            self.rows += self._batch(step, number, start, asked[start : start + size])

    def _batch(self, step: int, number: int, start: int, prompts: list[Text]) -> Iterator[Row]:
        answers = self._answers(prompts, number)
        items = [(p, as_answer(p, text)) for p, text in zip(prompts, answers.texts, strict=True)]
        kl_B = kl_from(self.reference, self.policy, answers, self.options.temperature)
        columns = zip(items, self.gold(items), self.proxy(items), kl_B.tolist(), strict=True)
        for index, ((prompt, answer), worth, proxy, kl) in enumerate(columns, start):
            scores = {"gold": float(worth), "proxy": float(proxy), "kl": kl}
            of_prompt = index // self.options.measure_answers
            yield {"step": step, "number": of_prompt, "prompt": prompt, "answer": answer, **scores}

    def _answers(self, prompts: list[Text], number: int) -> Answers:
        seed, longest = batch_seed(self.options.seed, number), self.options.max_new_tokens
        return sample_answers(self.policy, self.tokenizer, prompts, seed, longest, self.options.temperature)


def _run(options: Optimise, name: str, gold_reward: Reward, device: torch.device, folder: Path) -> Row:
    """Optimise against one model: the rows of all its measurements, and what became of the prompts' rows."""
    from moemerge.training.policy_gradient import optimise_policy

    trust, start = options.trust_remote_code, ModelFolder(options.policy, options.trust_remote_code)
    policy, tokenizer = load_language_model(start, device, torch.float32)
    reference, _ = load_language_model(start, device, torch.float32)
    rewarding = open_scorer(options.models[name], trust)
    proxy = gold.model_reward(rewarding, device, options.max_length)
    credit = token_credit(rewarding, device, options.max_length) if options.credit == "token" else None
    prompts, rows = _prompts(options, tokenizer)
    held = min(options.measure_prompts, len(prompts) // 2)
    meter = _Meter(options, policy, reference, tokenizer, prompts[:held], proxy, gold_reward, [])
    meter.measure(0)
    optimise_policy(options, name, policy, tokenizer, prompts[held:], proxy, credit, meter.measure, folder)
    return {"rows": meter.rows, "prompts": {"trained": len(prompts) - held, "measured": held}, "source": rows}


def _prompts(options: Optimise, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Text], RowSummary]:
    """The different prompts in an order drawn from the seed."""
    read, report = read_prompts(options.prompts, options)
    sets: list[CandidateSet] = distinct(short_prompts(read, report, tokenizer, options))
    if len(sets) < 4:
        raise DataError(
            "too few prompts to optimise and to measure on",
            given=f"{len(sets)} different prompts",
            expected="4 at least",
            fix="give more prompts",
        )
    order = np.random.default_rng(options.seed).permutation(len(sets))
    return [sets[number].prompt for number in order], report.summary()


def _report(options: Optimise, runs: dict[str, Row]) -> dict[str, Any]:
    """Curves over steps per model, with intervals over prompts, and differences to the baseline."""
    models, first = list(runs), next(iter(runs.values()))
    steps = sorted({row["step"] for row in first["rows"]})
    values_3QMV = np.stack([_by_prompt(run["rows"], steps) for run in runs.values()], axis=2)
    means_3MRV = resampled_curves(values_3QMV, options.resamples, options.seed)
    baseline = models.index(options.baseline or models[0])
    return {
        "confidence": options.confidence,
        "prompts": first["prompts"],
        "rows": first["source"],
        "gold": gold.source_of_gold(options),
        "steps": steps,
        "baseline": models[baseline],
        "models": {
            name: _summary(means_3MRV[:, number], means_3MRV[:, baseline], steps, options.confidence)
            for number, name in enumerate(models)
        },
    }


def _by_prompt(rows: Sequence[Row], steps: Sequence[int]) -> Floats:
    """Gold, standardised proxy and KL, means over answers; [3, Q, V]."""
    start = np.array([row["proxy"] for row in rows if row["step"] == steps[0]])
    count = 1 + max(row["number"] for row in rows)
    sums_3QV, column = np.zeros((3, count, len(steps))), {step: v for v, step in enumerate(steps)}
    for row in rows:
        sums_3QV[:, row["number"], column[row["step"]]] += [row[name] for name in MEASURED]
    means_3QV = sums_3QV / (len(start) / count)
    means_3QV[1] = (means_3QV[1] - start.mean()) / (start.std() or 1.0)
    return means_3QV


def _summary(means_3RV: Floats, baseline_3RV: Floats, steps: Sequence[int], confidence: float) -> Row:
    curves = dict(zip(MEASURED, means_3RV, strict=True))
    numbers, theirs = (_numbers(values_3RV, steps) for values_3RV in (means_3RV, baseline_3RV))
    if means_3RV is not baseline_3RV and not np.array_equal(means_3RV, baseline_3RV):
        curves["minus_baseline"] = means_3RV[0] - baseline_3RV[0]
        numbers |= {f"{name}_minus_baseline": numbers[name] - theirs[name] for name in theirs}
    shown = {**curves, **numbers}
    return {key: v for name, values in shown.items() for key, v in banded(name, values, confidence).items()}


def _numbers(means_3RV: Floats, steps: Sequence[int]) -> dict[str, Floats]:
    """Peak and drop of gold, and Gao's fit of policy gradient, each [1 + R]."""
    gold_RV, _, kl_RV = means_3RV
    peak_R = over_optimisation.peak(gold_RV)
    terms_RV2 = over_optimisation.policy_gradient_terms(kl_RV)
    fit_R2, _ = over_optimisation.fit(terms_RV2, gold_RV - gold_RV[:, :1])
    return {
        "peak_step": np.asarray(steps)[peak_R],
        "peak_kl": kl_RV[np.arange(len(kl_RV)), peak_R],
        "drop": gold_RV[:, peak_R[0]] - gold_RV[:, -1],
        "alpha": fit_R2[:, 0],
        "beta": fit_R2[:, 1],
    }


def _write(draft: Draft, report: dict[str, Any], runs: dict[str, Row]) -> None:
    write_json(draft.folder / "report.json", report)
    samples = ({"model": name, **row} for name, run in runs.items() for row in run["rows"])
    write_rows(draft.folder / "samples.jsonl.gz", samples)
    _plot(report, draft.folder / "optimise.png")
    text = f"# Policy gradient\n\n{table(report).markdown()}\n![optimise.png](optimise.png)\n"
    (draft.folder / "report.md").write_text(text, encoding="utf-8")
    last = {
        model: {name: curves[name][-1] for name in MEASURED} | {"peak_step": curves["peak_step"]}
        for model, curves in report["models"].items()
    }
    draft.results |= {"prompts": report["prompts"], "rows": report["rows"], "models": last}


def _plot(report: dict[str, Any], path: Path) -> None:
    """Gold, proxy and KL over steps, and gold over KL."""
    over_steps = [_panel(report, name, None) for name in MEASURED]
    plotting.panels([*over_steps, _panel(report, "gold", "kl")], path, title="Policy gradient")


def _panel(report: dict[str, Any], name: str, over: str | None) -> Panel:
    lines = {}
    for model, curves in report["models"].items():
        x = curves[over] if over else report["steps"]
        ends = (curves[name + end] for end in ("", "_low", "_high"))
        lines[model] = Line(x, *ends)
    return Panel(TITLES[name], lines, TITLES[over] if over else "step", UNITS[name])

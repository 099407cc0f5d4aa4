"""Stage `optimise`: a small policy-gradient run against each reward model; gold and proxy over its steps."""

from __future__ import annotations

import shutil
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
from moemerge.data.pairs import CandidateSet, as_answer, numbered, prompt_key
from moemerge.data.reading import distinct, read_pairs, read_prompts
from moemerge.data.rows import Row, RowSummary, Text, write_rows
from moemerge.data.tokenise import EncodedPair, Item, encode_pairs, texts_of
from moemerge.errors import DataError, OptionError, UnsupportedError, together, unknown
from moemerge.evaluation import gold
from moemerge.evaluation.credit import token_credit
from moemerge.evaluation.gold import Reward
from moemerge.evaluation.policy_page import MEASURED, tables
from moemerge.evaluation.policy_report import policy_report
from moemerge.evaluation.refresh_report import HELD_OUT
from moemerge.evaluation.verifier import load_corrupt, load_rule
from moemerge.fitting.coefficient_learner import CoefficientLearner, equal_coefficients
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.sources.base import MergeSource
from moemerge.merging.sources.open import open_source
from moemerge.models.device import free_memory, use_training_device
from moemerge.models.folder import ModelFolder
from moemerge.models.language_model import load_language_model
from moemerge.models.loading import load_reward_model
from moemerge.models.scorers import Loaded, Scorer, open_scorer
from moemerge.models.scorers.classifier import LoadedClassifier, classifier_of
from moemerge.options.base import Members
from moemerge.options.optimise import Optimise
from moemerge.reports import plotting
from moemerge.reports.figures import Line, Panel
from moemerge.reports.statistics import Floats
from moemerge.training.policy import Answers, batch_seed, kl_from, sample_answers, short_prompts
from moemerge.training.refresh import Learner, Refresher, WeightLearner, learn_before, told
from moemerge.training.saving import save_model

TITLES = {
    "gold": "gold score",
    "proxy": "model's own score (from step 0, standardised)",
    "kl": "KL from the first policy (nats)",
    HELD_OUT: "accuracy on held-out pairs",
}
UNITS = {"gold": "gold score", "proxy": "own score", "kl": "KL", HELD_OUT: "accuracy"}


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
    the measured answers with their scores; of reward models that were refreshed (Cooper, arXiv 2508.05613)
    also refreshed/NAME, the model, and refresh.jsonl.gz, the verified pairs. Raises OptionError, DataError,
    CheckpointError, or UnsupportedError for a refresh of what has no weights here.
    """
    _check_names(options)
    _check_trackers(options)
    device = use_training_device(options)
    gold_reward = gold.load_gold(options, device, options, options.trust_remote_code)
    assert gold_reward is not None  # the options see to it
    # Each refreshed model is written twice, for a run that may be killed and as a result.
    draft.reserve(2 * sum(_bytes_refreshed(options, name) for name in options.refresh))
    with workspace(options) as folder:
        runs = {}
        for number, name in enumerate(options.models):
            kept, model = folder / f"{number}.json", folder / f"{number}-model"
            if name in options.refresh and not model.exists():
                kept.unlink(missing_ok=True)
            run = partial(_run, options, name, gold_reward, device, folder, model)
            runs[name] = once(kept, run)
            free_memory()
            if name in options.refresh:
                shutil.copytree(model, draft.folder / "refreshed" / name)
        report = policy_report(options, runs, gold_reward)
    _write(draft, report, runs)


def _check_names(options: Optimise) -> None:
    if not options.models:
        raise OptionError("no models", given="none", expected="name=folder", fix="give models")
    if options.baseline is not None and options.baseline not in options.models:
        raise unknown("baseline", options.baseline, options.models)
    for name in options.refresh:
        if name not in options.models:
            raise unknown("model to refresh", name, options.models)


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


def _run(
    options: Optimise, name: str, gold_reward: Reward, device: torch.device, folder: Path, model: Path
) -> Row:
    """Optimise against one model: the rows of all its measurements, and what became of the prompts' rows.

    A reward model that is refreshed is written to `model`.
    """
    from moemerge.training.policy_gradient import optimise_policy

    trust, start = options.trust_remote_code, ModelFolder(options.policy, options.trust_remote_code)
    policy, tokenizer = load_language_model(start, device, torch.float32)
    reference, _ = load_language_model(start, device, torch.float32)
    rewarding = open_scorer(options.models[name], trust)
    credit = token_credit(rewarding, device, options.max_length) if options.credit == "token" else None
    prompts, rows = _prompts(options, tokenizer)
    held = min(options.measure_prompts, len(prompts) // 2)
    refresh = _Refresh(options, name, rewarding, gold_reward, device)
    proxy = gold.loaded_reward(refresh.loaded, refresh.reader, rewarding.source, options.max_length)
    meter = _Meter(options, policy, reference, tokenizer, prompts[:held], proxy, gold_reward, [])
    if options.refresh.get(name) == "before" and refresh.refresher:
        learn_before(refresh.refresher, policy, tokenizer, prompts[held:])

    def measure(step: int) -> None:
        meter.measure(step)
        refresh.measure(step)

    measure(0)
    watched = refresh.watched(proxy)
    after = refresh.after_step if options.refresh.get(name) == "during" else None
    train = partial(optimise_policy, options, name, policy, tokenizer, prompts[held:], watched, credit)
    train(measure, folder, after)
    counts = {"trained": len(prompts) - held, "measured": held}
    return {"rows": meter.rows, "prompts": counts, "source": rows, **refresh.ended(model)}


class _Refresh:
    """What goes on beside a run: the reward model's own updates, if any, and its held-out accuracy."""

    def __init__(
        self, options: Optimise, name: str, rewarding: Scorer, gold_reward: Reward, device: torch.device
    ) -> None:
        self._options, self._name, self._last = options, name, list[Item]()
        self.refresher: Refresher | None = None
        self.loaded: Loaded
        if name in options.refresh:
            learner = _learner(options, rewarding, device)
            self.loaded, self.reader = LoadedClassifier(learner.model, learner.tokenizer), learner.tokenizer
            rule, corrupt = load_rule(options, gold_reward), load_corrupt(options)
            replay = self._read(options.replay_pairs)
            self.refresher = Refresher(options, learner, rule, corrupt, replay)
        else:
            self.loaded, self.reader = rewarding.load(device), rewarding.reader()
        self._held, self._right = self._read(options.held_out_pairs), dict[str, list[int]]()
        self._before = self._judged()

    def _read(self, source: str | None) -> list[EncodedPair]:
        if source is None:
            return []
        pairs, report = read_pairs(source, self._options)
        return encode_pairs(self.reader, pairs, self._options, report)

    def _judged(self) -> list[int]:
        """Whether each held-out pair is ranked correctly."""
        scores_H2 = self.loaded.score(texts_of(self._held), gold.BATCH_TOKENS).view(-1, 2)
        right: list[int] = (scores_H2[:, 0] > scores_H2[:, 1]).int().tolist()
        return right

    def measure(self, step: int) -> None:
        """Judge the held-out pairs, as the model is now."""
        self._right[str(step)] = self._judged() if self.refresher else self._before

    def watched(self, reward: Reward) -> Reward:
        """The reward, of which it is noted what it was asked last: the policy's answers in this step."""

        def rewards(items: Sequence[Item]) -> Floats:
            self._last = list(items)
            return reward(items)

        return rewards

    def after_step(self, step: int) -> None:
        """An update, if it is time for one: the rewards of this step were given before it."""
        if step % self._options.refresh_every == 0 and self.refresher:
            self.refresher.update(self._last)

    def ended(self, model: Path) -> Row:
        """What the run keeps of all this; the refreshed model is written to `model`."""
        found: Row = {}
        if self._held:
            prompts = numbered(prompt_key(pair.pair) for pair in self._held)
            found["held_out"] = {"prompts": prompts, "before": self._before, "right": self._right}
        if self.refresher is None:
            return found
        learner = self.refresher.learner
        if model.exists():  # of a run that was killed as it wrote
            shutil.rmtree(model)
        save_model(learner.model, learner.tokenizer, model, self._options.trust_remote_code)
        if isinstance(learner, CoefficientLearner):
            learner.coefficients().save(model)
        return found | {"refresh": told(self.refresher, self._name)}


def _learner(options: Optimise, rewarding: Scorer, device: torch.device) -> Learner:
    """The reward model, and what of it learns. Raises UnsupportedError for what has no weights here."""
    classifier = classifier_of(rewarding, "refresh")
    tokenizer, trains = classifier.reader(), options.refresh_trains
    if trains == "coefficients":
        source = open_source(Members(model=classifier.source))
        start = _start(options, source)
        return CoefficientLearner(source, tokenizer, start, options.rate, device)
    model = load_reward_model(classifier.folder, device, torch.float32)
    return WeightLearner(model, tokenizer, trains, options.rate, options.max_grad_norm)


def _bytes_refreshed(options: Optimise, name: str) -> int:
    """Bytes of the model's weights as they are written, in float32."""
    classifier = classifier_of(open_scorer(options.models[name], options.trust_remote_code), "refresh")
    if options.refresh_trains == "coefficients":
        return open_source(Members(model=classifier.source)).size(torch.float32)
    return classifier.folder.weights.num_elements * torch.float32.itemsize


def _start(options: Optimise, source: MergeSource) -> Coefficients:
    """The coefficients that a refresh starts from; without any, equal ones, half of it the shared expert."""
    if options.refresh_coefficients is None:
        return equal_coefficients(source)
    saved = Coefficients.load(options.refresh_coefficients)
    source.check_fit(saved)
    if saved.coordinates == "sum":
        raise UnsupportedError(
            "coefficients of a sum cannot be refreshed",
            given=str(options.refresh_coefficients),
            expected="those of an average",
            fix="fit them with coordinates average",
        )
    return saved


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


def _write(draft: Draft, report: dict[str, Any], runs: dict[str, Row]) -> None:
    write_json(draft.folder / "report.json", report)
    samples = ({"model": name, **row} for name, run in runs.items() for row in run["rows"])
    write_rows(draft.folder / "samples.jsonl.gz", samples)
    if any("refresh" in run for run in runs.values()):
        refreshes = {name: run["refresh"]["pairs"] for name, run in runs.items() if "refresh" in run}
        rows = ({"model": name, **row} for name, pairs in refreshes.items() for row in pairs)
        write_rows(draft.folder / "refresh.jsonl.gz", rows)
    _plot(report, draft.folder / "optimise.png")
    shown = "\n".join(one.markdown() for one in tables(report))
    text = f"# Policy gradient\n\n{shown}\n![optimise.png](optimise.png)\n"
    (draft.folder / "report.md").write_text(text, encoding="utf-8")
    last = {
        model: {name: curves[name][-1] for name in MEASURED} | {"peak_step": curves["peak_step"]}
        for model, curves in report["models"].items()
    }
    draft.results |= {"prompts": report["prompts"], "rows": report["rows"], "models": last}
    refreshed = {name: m["refresh"] for name, m in report["models"].items() if "refresh" in m}
    draft.results |= {"refresh": refreshed} if refreshed else {}


def _plot(report: dict[str, Any], path: Path) -> None:
    """Gold, proxy and KL over steps, and gold over KL."""
    over_steps = [_panel(report, name, None) for name in MEASURED]
    held = any(HELD_OUT in curves for curves in report["models"].values())
    last = [_panel(report, HELD_OUT, None)] if held else []
    plotting.panels([*over_steps, _panel(report, "gold", "kl"), *last], path, title="Policy gradient")


def _panel(report: dict[str, Any], name: str, over: str | None) -> Panel:
    lines = {}
    for model, curves in report["models"].items():
        x = curves[over] if over else report["steps"]
        ends = (curves[name + end] for end in ("", "_low", "_high"))
        lines[model] = Line(x, *ends)
    return Panel(TITLES[name], lines, TITLES[over] if over else "step", UNITS[name])

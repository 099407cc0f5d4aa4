"""What training reports: a trial's numbers, its curves, the results of a search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import read_list, write_json
from moemerge.options.train import Train
from moemerge.reports.figures import Line, Panel
from moemerge.reports.plotting import panels
from moemerge.training import losses
from moemerge.training.flops import FLOPS

RATIO = "_gradient_ratio"
TERMS = tuple(f"{name}_loss" for name in losses.TERMS)
RATIOS = tuple(f"{name}{RATIO}" for name in losses.TERMS)
LOGGED = (
    "loss",
    "accuracy",
    "balance_loss",
    "lookahead_difference",
    "learning_rate",
    "grad_norm",
    "eval_loss",
    "eval_accuracy",
)


def standing(loss: float, accuracy: float, choose_by: str) -> float:
    """How a step or trial stands by its validation numbers: the lower the better."""
    return loss if choose_by == "loss" else -accuracy


def standings(history: Sequence[dict[str, Any]], choose_by: str) -> list[float]:
    """Standings of a history's evaluations, in order."""
    return [_standing_of(choose_by, entry) for entry in history if "eval_loss" in entry]


def _standing_of(choose_by: str, entry: dict[str, Any]) -> float:
    return standing(entry["eval_loss"], entry["eval_accuracy"], choose_by)


def report(state: dict[str, Any], before: dict[str, float] | None, choose_by: str) -> dict[str, Any]:
    """What a trial came to: `state` is its trainer's last, `before` the validation numbers of the start.

    The best step is the one that stands best on validation pairs, the first of equal ones, the start (0)
    included; without validation the last.
    """
    history = [_entry(logged) for logged in state["log_history"]]
    step, after = state["global_step"], None
    if before:
        start = {f"eval_{name}": value for name, value in before.items()}
        history = [{"step": 0, "epoch": 0.0, **start}, *history]
        best = min((e for e in history if "eval_loss" in e), key=partial(_standing_of, choose_by))
        step, after = best["step"], {"loss": best["eval_loss"], "accuracy": best["eval_accuracy"]}
    losses, terms = [entry["loss"] for entry in history if "loss" in entry], _terms(history)
    return {
        "steps": state["global_step"],
        "best_step": step,
        "before": before,
        "after": after,
        "train_loss": losses[-1] if losses else None,
        **({"terms": terms} if terms else {}),
        "tokens": state["num_input_tokens_seen"],
        "history": history,
    }


def _entry(logged: dict[str, Any]) -> dict[str, Any]:
    return {name: logged[name] for name in ("step", "epoch", *LOGGED, *TERMS, *RATIOS) if name in logged}


def _terms(history: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Each logged term's first and last loss, and how its gradient compared with Bradley-Terry's at first."""
    terms = {}
    for name in losses.TERMS:
        logged = [entry[f"{name}_loss"] for entry in history if f"{name}_loss" in entry]
        ratios = [entry[f"{name}{RATIO}"] for entry in history if f"{name}{RATIO}" in entry]
        if logged:
            terms[name] = {"first": logged[0], "last": logged[-1], "gradient_ratio": (ratios or [None])[0]}
    return terms


def write_history(history: list[dict[str, Any]], folder: Path) -> None:
    """The log as history.json (not finite: null), and its curves as history.png."""
    write_json(folder / "history.json", [{k: _finite(v) for k, v in entry.items()} for entry in history])
    pairs = {"Loss (nats)": ("loss", "eval_loss"), "Accuracy": ("accuracy", "eval_accuracy")}
    plots = [
        Panel(title, curves, "step", title.lower())
        for title, names in pairs.items()
        if (curves := _curves(history, dict(zip(("training", "validation"), names, strict=True))))
    ]
    if terms := _curves(history, {name.removesuffix("_loss"): name for name in TERMS}):
        plots.append(Panel("Terms of the loss", terms, "step", "mean, without weight"))
    if plots:
        panels(plots, folder / "history.png", "Training")


def logged_rows(folder: Path) -> list[dict[str, Any]]:
    """The log that `write_history` wrote: a row per step at which anything was measured."""
    return read_list(folder / "history.json")


def _curves(history: Sequence[dict[str, Any]], names: dict[str, str]) -> dict[str, Line]:
    curves = {}
    for label, name in names.items():
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            curves[label] = Line([step for step, _ in points], [value for _, value in points])
    return curves


def _finite(value: Any) -> Any:
    """`value` with every number that JSON lacks turned into null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results(options: Train, reports: list[dict[str, Any]], best: int) -> dict[str, Any]:
    """The winner's report without its history, and a line on each trial of a search."""
    results = {name: _finite(value) for name, value in reports[best].items() if name != "history"}
    results["seconds"] = round(sum(report["seconds"] for report in reports), 3)
    results[FLOPS] = sum(report[FLOPS] for report in reports)
    if options.search:
        tried = itertools.product(*options.search.values())
        results["trials"] = [
            {"options": dict(zip(options.search, values, strict=True)), **_summary(report)}
            for values, report in zip(tried, reports, strict=True)
        ]
    return results


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    kept = {name: report[name] for name in ("best_step", "steps", "train_loss", "seconds", FLOPS)}
    return {name: _finite(value) for name, value in (kept | report["after"]).items()}

"""What came of a stage in a line, and of an evaluation in one table over all models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.evaluation.differences import differences
from moemerge.evaluation.report import Report, _rewardbench_title, _sets, rewardbench_parts
from moemerge.reports.table import Table


def table(report: Report) -> str:
    """One row per model: accuracy with interval on each test set, scores on RewardBench, gold score of the
    best of n on each candidate set, the bias probes' worst attack, parameters that one token uses. `report`
    is evaluate's report.json.
    """
    names = ("model", {name: name for name in report["models"]})
    columns = [names, *_accuracy(report), *_rewardbench(report), *_gold(report), *_worst_attack(report)]
    columns.append(
        ("parameters used", {m: f"{v['active_parameters']:,}" for m, v in report["models"].items()})
    )
    rows = [[cells.get(model, "") for _, cells in columns] for model in report["models"]]
    return Table("", [title for title, _ in columns], rows).aligned()


def _accuracy(report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    for name, measured in _sets(report, "accuracy").items():
        models = measured["all"]["models"]
        yield (
            f"accuracy {name}",
            {
                m: f"{v['accuracy']:.3f} ({v['interval'][0]:.3f}-{v['interval'][1]:.3f})"
                for m, v in models.items()
            },
        )


def _rewardbench(report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    for name, measured in _sets(report, "rewardbench").items():
        for part, numbers in rewardbench_parts(measured).items():
            cells = {
                m: f"{v['score']:.3f} ({v['interval'][0]:.3f}-{v['interval'][1]:.3f})"
                for m, v in numbers["models"].items()
            }
            yield _rewardbench_title(name, measured, part), cells


def _gold(report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    for name, measured in _sets(report, "best_of_n").items():
        for place, n in enumerate(measured["n"]):
            cells = {model: f"{curve['gold'][place]:.2f}" for model, curve in measured["models"].items()}
            yield (f"gold {name} n={n}" if place == 0 else f"n={n}"), cells


def _worst_attack(report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    """Per set the edit of rejected answers that turns the largest share of a model's right verdicts."""
    found: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for name, edit, models in _attacks(report):
        for model, numbers in models.items():
            if numbers["flipped"] is not None:
                found.setdefault(name, {}).setdefault(model, []).append((numbers["flipped"], edit))
    for name, by_model in found.items():
        worst = {model: max(flips, key=lambda one: one[0]) for model, flips in by_model.items()}
        yield f"worst edit on {name}", {m: f"{edit}: {share:.0%} flip" for m, (share, edit) in worst.items()}


def _attacks(report: Report) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Set, edit, and what it does to every model, of all probes that edit rejected answers."""
    for result in report["probes"].values():
        if result.get("side") == "rejected":
            for name, measured in result["sets"].items():
                for edit, numbers in measured["edits"].items():
                    yield name, edit, numbers["models"]


def main_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table to see first: one row per model, every measure beside its difference to
    the baseline; of best-of-n the largest n.
    """
    known = {model: {one.what: str(one) for one in differences(report, model)} for model in report["models"]}
    columns = [("model", {name: name for name in report["models"]})]
    for title, cells in [*_accuracy(report), *_rewardbench(report), *_last_gold(report)]:
        columns.append((title, cells))
        if len(known) > 1:
            versus = {model: found.get(title, "baseline") for model, found in known.items()}
            columns.append((f"minus {report['baseline']}", versus))
    used = {m: f"{v['active_parameters']:,}" for m, v in report["models"].items()}
    columns += [*_worst_attack(report), ("parameters used", used)]
    rows = [[cells.get(model, "") for _, cells in columns] for model in report["models"]]
    return [title for title, _ in columns], rows


def _last_gold(report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    for name, measured in _sets(report, "best_of_n").items():
        cells = {model: f"{curve['gold'][-1]:.2f}" for model, curve in measured["models"].items()}
        yield f"gold {name} at n={measured['n'][-1]}", cells

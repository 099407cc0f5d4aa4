"""What came of an evaluation in one table over all models."""

from __future__ import annotations

from collections.abc import Iterator

from moemerge.evaluation.cautions import first_of_equals
from moemerge.evaluation.measures import (
    accuracy_measures,
    main_measures,
    rewardbench_measures,
    rmbench_measures,
)
from moemerge.evaluation.report import Report, best_of_n_sets, edited
from moemerge.reports.table import Table

Column = tuple[str, dict[str, str]]  # a title, and a cell per model


def table(report: Report) -> str:
    """One row per model: accuracy with interval on each test set, scores on RewardBench and RM-Bench, gold
    score of the best of n on each candidate set, the bias probes' worst attack, parameters that one token
    uses. `report` is evaluate's report.json.
    """
    measures = [*accuracy_measures(report), *rewardbench_measures(report), *rmbench_measures(report)]
    columns = [(measure.title, measure.cells) for measure in measures]
    header, rows = _rows(report, [*columns, *_gold_by_n(report), *_worst_attack(report)])
    return Table("", header, rows).aligned()


def main_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table to see first: one row per model, every measure beside its difference to
    the baseline; of best-of-n the largest n.
    """
    columns: list[Column] = []
    for measure in main_measures(report):
        columns.append((measure.title, measure.cells))
        if len(report["models"]) > 1:
            versus = {model: str(difference) for model, difference in measure.differences.items()}
            columns.append((f"minus {report['baseline']}", {report["baseline"]: "baseline", **versus}))
    return _rows(report, [*columns, *_worst_attack(report)])


def _rows(report: Report, columns: list[Column]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of `columns` between the models' names and the parameters that each uses.

    Models that are the same share a row.
    """
    models, groups = report["models"], first_of_equals(report)
    names = ("model", {model: " = ".join(equals) for model, equals in groups.items()})
    used = (
        "active parameters",
        {model: f"{facts['active_parameters']:,}" for model, facts in models.items()},
    )
    whole = [names, *columns, used]
    rows = [[cells.get(model, "") for _, cells in whole] for model in groups]
    return [title for title, _ in whole], rows


def _gold_by_n(report: Report) -> Iterator[Column]:
    for name, measured in best_of_n_sets(report).items():
        for number, n in enumerate(measured["n"]):
            cells = {model: f"{curves['gold'][number]:.2f}" for model, curves in measured["models"].items()}
            yield (f"gold {name} n={n}" if number == 0 else f"n={n}"), cells


def _worst_attack(report: Report) -> Iterator[Column]:
    """Per set the edit of rejected answers that turns the largest share of a model's right verdicts."""
    flips: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for name, model, edit, share in _flips(report):
        flips.setdefault(name, {}).setdefault(model, []).append((share, edit))
    for name, by_model in flips.items():
        worst = {model: max(shares, key=lambda flip: flip[0]) for model, shares in by_model.items()}
        yield f"worst edit on {name}", {m: f"{edit}: {share:.0%} flip" for m, (share, edit) in worst.items()}


def _flips(report: Report) -> Iterator[tuple[str, str, str, float]]:
    """Set, model, edit and share flipped, of all edits of rejected answers."""
    for result in edited(report):
        for name, measured in result["sets"].items() if result["side"] == "rejected" else ():
            for edit, effect in measured["edits"].items():
                for model, numbers in effect["models"].items():
                    if numbers["flipped"] is not None:
                        yield name, model, edit, numbers["flipped"]

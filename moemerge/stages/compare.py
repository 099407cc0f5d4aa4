"""Stage compare: runs over seeds in one table, each measure paired by seed with a baseline.

A run is an evaluation; a group is the runs of one recipe, which differ in their seeds only. S seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moemerge.artifacts.json_file import read_object, write_json
from moemerge.artifacts.manifest import expect_stage, written_by_stages
from moemerge.artifacts.stage import RECIPE_COPY, Draft, stage
from moemerge.errors import ArtifactError, unknown
from moemerge.evaluation import verdict
from moemerge.evaluation.report import (
    COSTS,
    FORMAT,
    SeedComparison,
    SeedGroup,
    SeedNumbers,
    read_comparison,
    read_report,
)
from moemerge.options.compare import Compare
from moemerge.reports import plotting
from moemerge.reports.figures import Figure, Line, Panel
from moemerge.reports.html import Section, write_report
from moemerge.reports.provenance import dotted
from moemerge.reports.statistics import t_test
from moemerge.reports.table import Table, percent

# What runs of one recipe may differ in.
FREE = {"seed", "seeds", "output", "threads", "device"}
FEW_SEEDS, SHOWN = 3, 4
Values = dict[str, float]


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Each measure of each model in each group of runs."""
    for group in read_comparison(folder)["groups"]:
        for measure, models in group["measures"].items():
            for model, numbers in models.items():
                low, high = numbers.get("interval") or (None, None)
                yield {
                    "group": group["title"],
                    "measure": measure,
                    "model": model,
                    **{name: numbers.get(name) for name in ("mean", "sd", "difference")},
                    **{"low": low, "high": high, "p": numbers.get("p")},
                }


@stage("compare", Compare, rows=_rows)
def compare(options: Compare, draft: Draft) -> None:
    """Compare models over runs with different seeds; writes compare.json, compare.md, report.html and plots.

    Per model and measure (what evaluate calls main numbers): mean and standard deviation over seeds, and the
    difference to the baseline, paired by seed, with a t-interval over seeds. Per model its cost at inference:
    parameters, FLOPs and measured tokens per second. Runs of different recipes make groups, each compared in
    itself. Raises ArtifactError if a folder is no evaluation, a seed occurs twice in a group, or a model or
    measure lacks a seed; OptionError if the baseline is no model.
    """
    groups = compared(options)
    plots = [
        [name for plot in (_plot_differences, _plot_costs) for name in plot(group, number, draft.folder)]
        for number, group in enumerate(groups, 1)
    ]
    comparison: SeedComparison = {
        "format": FORMAT,
        "confidence": options.confidence,
        "groups": groups,
        "plots": [n for names in plots for n in names],
    }
    write_json(draft.folder / "compare.json", comparison)
    tables = [_table(group, options.confidence) for group in groups]
    words = [verdict.standing_over_seeds(group, options.confidence) for group in groups]
    text = "\n".join(
        table.markdown() + f"\n{word}\n" * bool(word) for table, word in zip(tables, words, strict=True)
    )
    (draft.folder / "compare.md").write_text(text, encoding="utf-8")
    figures = [[Figure.load(draft.folder / name) for name in names] for names in plots]
    sections = [
        Section(group["title"], tables=[table], figures=shown, lead=word)
        for group, table, shown, word in zip(groups, tables, figures, words, strict=True)
    ]
    write_report(draft.folder, "Comparison over seeds", sections)
    seeds = sorted({seed for group in groups for seed in group["seeds"]})
    models = {model for group in groups for model in group["costs"]}
    draft.results |= {"models": len(models), "seeds": len(seeds), "groups": groups}


def compared(options: Compare) -> list[SeedGroup]:
    """The groups of runs of one recipe each, and what came of them. Raises as `compare`."""
    with written_by_stages("the evaluations cannot be compared", "evaluate again, or leave one out of runs"):
        return [_compare_group(title, runs, options) for title, runs in _groups(map(_read, options.runs))]


@dataclass(frozen=True)
class _Run:
    """One evaluation: measures hold a value per model, costs what evaluate reported of each model.

    last_n: where a measure is of a curve's end, the n there.
    """

    folder: str
    seed: int
    baseline: str
    recipe: Mapping[str, Any]
    measures: dict[str, Values]
    last_n: dict[str, int]
    costs: dict[str, Values]


def _read(folder: str) -> _Run:
    path = Path(folder)
    if not (path / "report.json").exists():
        raise ArtifactError(
            f"no evaluation in {folder}",
            given=folder,
            expected="a folder that evaluate wrote, a run with one, or a folder of such",
            fix="evaluate first, or correct runs",
        )
    manifest = expect_stage(folder, "evaluate")
    with written_by_stages(f"the evaluation {folder} cannot be read", "evaluate again"):
        return _run(folder, manifest)


def _run(folder: str, manifest: Mapping[str, Any]) -> _Run:
    path = Path(folder)
    models, main = manifest["results"]["models"], manifest["results"]["main"]
    measures = list(_measures(main, set(models)))
    return _Run(
        folder,
        manifest["options"]["seed"],
        str(read_report(folder)["baseline"]),
        _recipe(path.resolve().parent / RECIPE_COPY),
        {what: values for what, values, _ in measures},
        {what: n for what, _, n in measures if n},
        {model: _cost(facts) for model, facts in models.items()},
    )


def _recipe(path: Path) -> dict[str, Any]:
    """What the run's recipe sets, by dotted names; nothing for an evaluation outside a run."""
    recipe = read_object(path) if path.exists() else {}
    return {name: value for name, value in dotted(recipe) if name not in FREE}


def _measures(
    main: Mapping[str, Any], models: set[str], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, Values, int]]:
    """Measures: names, value per model (where `main` maps models to numbers), and the n there, or 0."""
    values = {model: float(value) for model, value in main.items() if model in models and _is_number(value)}
    if values:
        yield " ".join(path).replace("_", " ", path[0].count("_")), values, int(main.get("n", 0))
        return
    for name, part in main.items():
        if isinstance(part, dict):
            yield from _measures(part, models, (*path, name))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _cost(facts: Mapping[str, Any]) -> Values:
    costs: Values = {key: float(facts[key]) for key in COSTS if key in facts}
    if facts.get("seconds"):
        costs["tokens_per_second"] = facts["tokens"] / facts["seconds"]
    return costs


def _groups(runs: Iterator[_Run]) -> list[tuple[str, list[_Run]]]:
    """Runs of equal recipes, by seed, each group under a title that says what is this recipe's own."""
    by_recipe: dict[str, list[_Run]] = {}
    for run in runs:
        by_recipe.setdefault(json.dumps(run.recipe, sort_keys=True), []).append(run)
    groups = [sorted(group, key=lambda run: run.seed) for group in by_recipe.values()]
    for group in groups:
        _check_group(group)
    return list(zip(_titles([group[0].recipe for group in groups]), groups, strict=True))


def _titles(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each of several recipes what not all have in common, in words; no title for a single one."""
    if len(recipes) < 2:
        return [""] * len(recipes)
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    differ = [name for name in names if len({json.dumps(recipe.get(name)) for recipe in recipes}) > 1]
    shown, more = differ[:SHOWN], f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
    texts = [", ".join(f"{name} {recipe.get(name, 'unknown')}" for name in shown) for recipe in recipes]
    return [f"Recipe {number}: {text}{more}" for number, text in enumerate(texts, 1)]


def _check_group(group: Sequence[_Run]) -> None:
    """Refuse a seed that occurs twice, and a model or measure that not every seed has."""
    for first, second in zip(group, group[1:], strict=False):
        if first.seed == second.seed:
            raise ArtifactError(
                f"seed {first.seed} occurs twice",
                given=f"{first.folder} and {second.folder}",
                expected="one evaluation per seed and recipe",
                fix="leave one out, or evaluate each with its own seed",
            )
    for name in sorted({name for run in group for name in _contents(run)}):
        lacking = [run for run in group if name not in _contents(run)]
        if lacking:
            raise ArtifactError(
                f"{name} is not there for every seed",
                given="; ".join(f"missing for seed {run.seed} in {run.folder}" for run in lacking),
                expected="the same models and measures for every seed, so that differences are paired",
                fix="evaluate that run again with it, or leave the run out",
            )


def _contents(run: _Run) -> set[str]:
    cells = {f"{what} of {model}" for what, values in run.measures.items() for model in values}
    return cells | {f"model {model}" for model in run.costs}


def _compare_group(title: str, runs: Sequence[_Run], options: Compare) -> SeedGroup:
    baseline = _baseline(runs, options.baseline)
    return {
        "title": title,
        "seeds": [run.seed for run in runs],
        "runs": [run.folder for run in runs],
        "baseline": baseline,
        "measures": {
            what + _last_n(what, runs): _compare_measure(what, runs, baseline, options)
            for what in runs[0].measures
        },
        "costs": {model: _mean_cost([run.costs[model] for run in runs]) for model in runs[0].costs},
    }


def _last_n(what: str, runs: Sequence[_Run]) -> str:
    """Where curves end; seeds may have candidates of their own, and more or fewer of them."""
    last = sorted({run.last_n[what] for run in runs if what in run.last_n})
    return (f" at n={last[0]}" + f" to {last[-1]}" * (len(last) > 1)) if last else ""


def _baseline(runs: Sequence[_Run], wanted: str | None) -> str:
    models = runs[0].costs
    baseline = wanted or ("control" if "control" in models else runs[0].baseline)
    if baseline not in models:
        raise unknown("baseline", baseline, models)
    return baseline


def _mean_cost(costs: Sequence[Values]) -> Values:
    common = [key for key in costs[0] if all(key in of_run for of_run in costs)]
    return {key: float(np.mean([of_run[key] for of_run in costs])) for key in common}


def _compare_measure(
    what: str, runs: Sequence[_Run], baseline: str, options: Compare
) -> dict[str, SeedNumbers]:
    compared: dict[str, SeedNumbers] = {}
    for model in runs[0].measures[what]:
        values_S = np.array([run.measures[what][model] for run in runs])
        compared[model] = {
            "mean": float(values_S.mean()),
            "sd": float(values_S.std(ddof=1)) if len(runs) > 1 else None,
            "by_seed": {str(run.seed): value for run, value in zip(runs, values_S.tolist(), strict=True)},
        }
        if model != baseline and baseline in runs[0].measures[what]:
            paired_S = values_S - np.array([run.measures[what][baseline] for run in runs])
            tested = t_test(paired_S.tolist(), options.confidence)
            compared[model]["difference"] = float(paired_S.mean())
            compared[model]["interval"], compared[model]["p"] = tested or (None, None)
    return compared


def _table(group: SeedGroup, confidence: float) -> Table:
    measures = group["measures"]
    header = ["model", *(title for what in measures for title in (what, f"minus {group['baseline']}"))]
    rows = []
    for model, costs in group["costs"].items():
        cells = [
            cell for measured in measures.values() for cell in _cells(measured, model, group["baseline"])
        ]
        speed = f"{costs['tokens_per_second']:,.0f}" if "tokens_per_second" in costs else ""
        rows.append([model, *cells, *(f"{costs[key]:,.0f}" if key in costs else "" for key in COSTS), speed])
    note = f"Means over {len(group['seeds'])} seeds ({', '.join(map(str, group['seeds']))}). Differences are "
    note += (
        f"paired by seed, with {percent(confidence)} t-intervals over seeds. Tokens per second as measured."
    )
    if len(group["seeds"]) < FEW_SEEDS:
        note += f" Fewer than {FEW_SEEDS} seeds: they say little about other seeds."
    if len(group["seeds"]) > 1 and _lacks_interval(group):
        note += " A difference that is the same at every seed has no interval: its spread is not known."
    title = group["title"] or f"{len(group['costs'])} models over {len(group['seeds'])} seeds"
    return Table(title, [*header, *COSTS.values(), "tokens per second"], rows, note)


def _with_difference(measured: Mapping[str, SeedNumbers], baseline: str) -> dict[str, SeedNumbers]:
    """The models that have a difference: all but the baseline, or none where that was not measured."""
    return {m: numbers for m, numbers in measured.items() if m != baseline} if baseline in measured else {}


def _lacks_interval(group: SeedGroup) -> bool:
    compared = [_with_difference(measured, group["baseline"]) for measured in group["measures"].values()]
    return any(numbers["interval"] is None for models in compared for numbers in models.values())


def _cells(measured: Mapping[str, SeedNumbers], model: str, baseline: str) -> list[str]:
    """Mean, and difference to the baseline."""
    if model not in measured:
        return ["", ""]
    numbers = measured[model]
    if model not in _with_difference(measured, baseline):
        return [f"{numbers['mean']:.4f}", "baseline"]
    ends = numbers["interval"]
    interval = f" ({ends[0]:+.4f} to {ends[1]:+.4f})" if ends else ""
    return [f"{numbers['mean']:.4f}", f"{numbers['difference']:+.4f}{interval}"]


def _plot_differences(group: SeedGroup, number: int, folder: Path) -> list[str]:
    """compare.png (compare-2.png, ...): difference to the baseline and its interval, a panel per measure."""
    baseline, name = group["baseline"], "compare.png" if number == 1 else f"compare-{number}.png"
    panels = {
        what: {m: (0.0, 0.0, 0.0) if m == baseline else _ends(numbers) for m, numbers in measured.items()}
        for what, measured in group["measures"].items()
        if baseline in measured
    }
    if not panels:
        return []
    plotting.dots(panels, folder / name, f"difference to {baseline}", baseline)
    return [name]


def _plot_costs(group: SeedGroup, number: int, folder: Path) -> list[str]:
    """cost.png (cost-2.png, ...): a measure's mean against FLOPs per token, a panel per measure."""
    flops = {
        model: costs["flops_per_token"]
        for model, costs in group["costs"].items()
        if "flops_per_token" in costs
    }
    panels = [
        Panel(
            what,
            {m: Line([flops[m]], [numbers["mean"]]) for m, numbers in measured.items() if m in flops},
            "FLOPs per token",
            what,
        )
        for what, measured in group["measures"].items()
    ]
    if not flops or not panels:
        return []
    name = "cost.png" if number == 1 else f"cost-{number}.png"
    plotting.panels(panels, folder / name, group["title"])
    return [name]


def _ends(numbers: SeedNumbers) -> tuple[float, float, float]:
    difference = numbers["difference"]
    return difference, *(numbers["interval"] or (difference, difference))

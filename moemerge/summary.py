"""What came of a stage in a line, and of an evaluation in one table over all models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moemerge.weight_files import Fault

Report = dict[str, Any]
LONGEST_RESULT, MOST_RESULTS = 40, 6


def headline(stage: str, results: Report) -> str:
    """What a stage's results come to, in a line; single values as they stand for a stage unknown here."""
    try:
        return HEADLINES[stage](results)
    except KeyError:
        nested = {
            f"{k}.{n}": v for k, one in results.items() if isinstance(one, dict) for n, v in one.items()
        }
        shown = {k: v for k, v in {**results, **nested}.items() if isinstance(v, (bool, int, float, str))}
        texts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()]
        return "  ".join([text for text in texts if len(text) <= LONGEST_RESULT][:MOST_RESULTS])


def _sizes(results: Report) -> str:
    bad = sum(len(report["bad"]) > 0 for report in results.get("rows", {}).values())
    sizes = ", ".join(f"{name} {size}" for name, size in results["sizes"].items())
    return sizes + (f"; bad rows in {bad} file(s), see report.json" if bad else "")


def _upcycle(results: Report) -> str:
    experts = f"{results['num_routed_experts']} routed experts, {results['num_experts_per_tok']} per token"
    return f"{experts}; largest difference to the dense model {results['largest_difference']:.1e}"


def _train(results: Report) -> str:
    before, after = results["before"], results.get("after")
    if before is None or after is None:
        return f"{results['steps']} steps, training loss {results['train_loss']:.4f}"
    loss, accuracy = (f"{before[k]:.4f} -> {after[k]:.4f}" for k in ("loss", "accuracy"))
    steps = f"best at step {results['best_step']} of {results['steps']}"
    trials = f", best of {len(results['trials'])} trials" if "trials" in results else ""
    return f"validation loss {loss}, accuracy {accuracy}, {steps}{trials}"


def _route(results: Report) -> str:
    shared = sum(results["shared_mass"]) / len(results["shared_mass"])
    dead = sum(map(len, results["dead_experts"].values()))
    largest = max(results["max_share"])
    used = f"shared weight {shared:.3f}, largest share {largest:.3f}, {dead} unused experts"
    return f"{results['tokens']} tokens; {used}"


def _optimise(results: Report) -> str:
    return "; ".join(
        f"{name}: gold {last['gold']:.3f} at the end, highest at step {last['peak_step']:.0f}"
        for name, last in results["models"].items()
    )


def _merge(results: Report) -> str:
    return f"largest difference to what was meant {results['largest_difference']:.1e}"


def _attack(results: Report) -> str:
    low, high = results["interval"]
    share = f"{results['success_rate']:.1%} ({low:.1%} to {high:.1%})"
    return f"{results['succeeded']} of {results['attacked']} pairs fell: {share}"


def _publish(results: Report) -> str:
    state = "pushed" if results["pushed"] else "staged, not pushed"
    return f"{len(results['files'])} files, {results['bytes'] / 1e6:.1f} MB, {state}"


HEADLINES: dict[str, Callable[[Report], str]] = {
    "synthetic": _sizes,
    "data": _sizes,
    "upcycle": _upcycle,
    "train": _train,
    "route": _route,
    "fit": lambda results: str(results["verdict"]),
    "merge": _merge,
    "evaluate": lambda results: f"{len(results['models'])} model{'s' * (len(results['models']) != 1)}",
    "sample": lambda results: f"{results['answers']} answers to {results['prompts']} prompts",
    "optimise": _optimise,
    "attack": _attack,
    "publish": _publish,
    "compare": lambda results: f"{results['models']} models, {results['seeds']} seeds",
}


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
    return _markdown([title for title, _ in columns], rows)


def fault_table(faults: Sequence[Fault]) -> str:
    """One row per thing that is wrong with a folder."""
    rows = [[fault.file, fault.what, fault.recorded, fault.found] for fault in faults]
    return _markdown(["file", "what", "in the manifest", "found"], rows)


def _sets(report: Report, probe: str) -> dict[str, Any]:
    return dict(report["probes"].get(probe, {}).get("sets", {}))


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


def rewardbench_parts(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The scores to show first: overall ones; of a part of a benchmark its sections, else its subsets."""
    return dict(measured["overall"] or measured["sections"] or measured["subsets"])


def _rewardbench(report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    for name, measured in _sets(report, "rewardbench").items():
        for part, numbers in rewardbench_parts(measured).items():
            cells = {
                m: f"{v['score']:.3f} ({v['interval'][0]:.3f}-{v['interval'][1]:.3f})"
                for m, v in numbers["models"].items()
            }
            yield _rewardbench_title(name, measured, part), cells


def _rewardbench_title(name: str, measured: Mapping[str, Any], part: str) -> str:
    return f"RewardBench {measured['version']} {name}, {part}"


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


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table with aligned columns, as readable in a terminal as on a page."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [
            cell.ljust(w) if place == 0 else cell.rjust(w)
            for place, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [header, rule, *rows]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Difference:
    """A model's difference to the baseline in one measure, its paired interval, and its two-sided p."""

    what: str
    value: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def differences(report: Report, model: str) -> Iterator[Difference]:
    """All that `model` is compared in with the report's baseline; nothing for the baseline itself."""
    if model == report["baseline"]:
        return
    for name, measured in _sets(report, "accuracy").items():
        versus = measured["all"]["models"][model]["vs_baseline"]
        low, high = versus["interval"]
        yield Difference(f"accuracy {name}", versus["difference"], low, high, versus["p"])
    for name, measured in _sets(report, "rewardbench").items():
        for part, numbers in rewardbench_parts(measured).items():
            yield _in_comparisons(
                _rewardbench_title(name, measured, part), numbers, model, report["baseline"]
            )
    for name, measured in _sets(report, "best_of_n").items():
        curve = measured["models"][model]
        value, low, high = (curve[f"minus_baseline{end}"][-1] for end in ("", "_low", "_high"))
        yield Difference(f"gold {name} at n={measured['n'][-1]}", value, low, high, curve["minus_baseline_p"])


def _in_comparisons(what: str, numbers: Mapping[str, Any], model: str, baseline: str) -> Difference:
    """`model` minus `baseline` among the differences of every two models."""
    (one,) = [c for c in numbers["comparisons"] if {c["first"], c["second"]} == {model, baseline}]
    sign = 1 if one["first"] == model else -1
    low, high = sorted(sign * end for end in one["interval"])
    return Difference(what, sign * one["difference"], low, high, one["p"])


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

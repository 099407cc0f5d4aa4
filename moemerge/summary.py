"""The last word of a run: one table over all models, and whether merging helped here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    "evaluate": lambda results: f"{len(results['models'])} models",
    "attack": _attack,
    "publish": _publish,
    "compare": lambda results: f"{results['models']} models, {results['seeds']} seeds",
}


def table(report: Report) -> str:
    """One row per model: accuracy with interval on each test set, gold score of the best of n on each
    candidate set, parameters that one token uses. `report` is what evaluate wrote as report.json.
    """
    columns = [("model", {name: name for name in report["models"]}), *_accuracy(report), *_gold(report)]
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


def _gold(report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    for name, measured in _sets(report, "best_of_n").items():
        for place, n in enumerate(measured["n"]):
            cells = {model: f"{curve['gold'][place]:.2f}" for model, curve in measured["models"].items()}
            yield (f"gold {name} n={n}" if place == 0 else f"n={n}"), cells


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


def main_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table to see first: one row per model, every measure beside its difference to
    the baseline; of best-of-n the largest n.
    """
    columns = [("model", {name: name for name in report["models"]})]
    for title, cells in [*_accuracy(report), *_last_gold(report)]:
        versus = {m: dict(_verdicts(report, m)).get(title, "") for m in report["models"]}
        columns += [(title, cells), (f"minus {report['baseline']}", versus)]
    used = {m: f"{v['active_parameters']:,}" for m, v in report["models"].items()}
    columns.append(("parameters used", used))
    rows = [[cells.get(model, "") for _, cells in columns] for model in report["models"]]
    return [title for title, _ in columns], rows


def _last_gold(report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    for name, measured in _sets(report, "best_of_n").items():
        cells = {model: f"{curve['gold'][-1]:.2f}" for model, curve in measured["models"].items()}
        yield f"gold {name} at n={measured['n'][-1]}", cells


def _verdicts(report: Report, model: str) -> Iterator[tuple[str, str]]:
    """What is compared, and difference and interval to the baseline."""
    if model != report["baseline"]:
        for what, difference, low, high in _differences(report, model):
            yield what, f"{difference:+.3f} ({low:+.3f} to {high:+.3f})"


def standing(report: Report) -> str:
    """How the models stand against the baseline, in words; models about which the same is true share a
    sentence.
    """
    groups: dict[str, list[str]] = {}
    for model in report["models"]:
        if model != report["baseline"]:
            groups.setdefault(_in_words(_differences(report, model)), []).append(model)
    told = " ".join(f"{', '.join(models)}: {words}." for words, models in groups.items())
    return f"Against {report['baseline']}: {told}" if told else ""


def _in_words(differences: Iterator[tuple[str, float, float, float]]) -> str:
    found: dict[str, list[str]] = {BETTER: [], BELOW: []}
    for what, _, low, high in differences:
        if low > 0 or high < 0:
            found[BETTER if low > 0 else BELOW].append(what)
    clear = [f"{word} in {', '.join(where)}" for word, where in found.items() if where]
    return "; ".join(clear) or SAME


def verdict(report: Report, model: str) -> str:
    """Whether `model` is better than the report's baseline, in words, set by set, by the paired intervals."""
    return " ".join(verdict_sentences(report, model)).strip()


def verdict_sentences(report: Report, model: str) -> tuple[str, str]:
    """The verdict in a sentence, and what it stands on; "" if there is nothing to compare."""
    baseline = report["baseline"]
    if model == baseline:
        return f"Did merging help here? {model} is the baseline itself; nothing to compare.", ""
    found = [(what, *_judge(*numbers)) for what, *numbers in _differences(report, model)]
    words = {word for _, word, _ in found}
    clear = sorted(words - {SAME})
    head = {0: SAME, 1: clear[0] if clear else ""}.get(
        len(clear), "helped in one place, made it worse in another"
    )
    parts = "; ".join(f"{what}: {word} ({numbers})" for what, word, numbers in found)
    return f"Did merging help here? {model} against {baseline}: {head}.", f"{parts}."


def verdict_over_seeds(group: Report, model: str) -> str:
    """Whether `model` is better than the baseline over seeds; `group` is one of compare.json."""
    count = len(group["seeds"])
    head = f"Did merging help here? {model} against {group['baseline']}, {count} seed{'s' * (count > 1)}"
    parts = []
    for what, measured in group["measures"].items():
        numbers = measured.get(model, {})
        if numbers.get("interval"):
            word, text = _judge(numbers["difference"], *numbers["interval"])
            parts.append(f"{what}: {word} ({text})")
    return f"{head}. {'; '.join(parts) or 'Nothing to compare: it takes two seeds and another model'}."


HELPED, WORSE, SAME = "helped", "made it worse", "no difference beyond the interval"
EQUAL = "no difference at all"
BETTER, BELOW = "better", "worse"


def _differences(report: Report, model: str) -> Iterator[tuple[str, float, float, float]]:
    """What is compared, the difference to the baseline, and its paired interval."""
    for name, measured in _sets(report, "accuracy").items():
        versus = measured["all"]["models"][model]["vs_baseline"]
        yield f"accuracy {name}", versus["difference"], *versus["interval"]
    for name, measured in _sets(report, "best_of_n").items():
        curve = measured["models"][model]
        ends = (curve[f"minus_baseline{end}"][-1] for end in ("", "_low", "_high"))
        yield f"gold {name} at n={measured['n'][-1]}", *ends


def _judge(difference: float, low: float, high: float) -> tuple[str, str]:
    word = HELPED if low > 0 else WORSE if high < 0 else EQUAL if low == high else SAME
    return word, f"{difference:+.3f}, {low:+.3f} to {high:+.3f}"

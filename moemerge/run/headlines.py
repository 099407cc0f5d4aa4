"""What each stage did, in one line."""

from __future__ import annotations

from collections.abc import Callable

from moemerge.evaluation.report import Report

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

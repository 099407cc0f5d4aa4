"""What a stage came to, in one line: functions of the results in its manifest, for the table of stages.

A result that is not there is a KeyError: writer and reader have come apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Results = Mapping[str, Any]

LONGEST_VALUE, MOST_VALUES = 40, 6


def plain(results: Results) -> str:
    """The first few single values under their own names, whatever the stage; those in a mapping too."""
    nested = {
        f"{name}.{key}": value
        for name, group in results.items()
        if isinstance(group, dict)
        for key, value in group.items()
    }
    single = {k: v for k, v in {**results, **nested}.items() if isinstance(v, (bool, int, float, str))}
    texts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in single.items()]
    return "  ".join([text for text in texts if len(text) <= LONGEST_VALUE][:MOST_VALUES])


def sizes(results: Results) -> str:
    """Rows per file, and what share of the rows looked at was left out."""
    bad = {
        name: sum(reason["count"] for reason in rows["bad"].values())
        for name, rows in results.get("rows", {}).items()
    }
    shares = [f"{name} {n / (n + results['rows'][name]['kept']):.1%}" for name, n in bad.items() if n]
    written = ", ".join(f"{name} {size}" for name, size in results["sizes"].items())
    return written + (f"; left out: {', '.join(shares)}, see report.json" if shares else "")


def calibrate(results: Results) -> str:
    """Each model's scale."""
    return "scales: " + ", ".join(f"{name} {scale:.3g}" for name, scale in results["scales"].items())


def changes(results: Results) -> str:
    """Cosine of each pair of models' changes."""
    values = {pair: value for pair, value in results["cosine"].items() if value is not None}
    return "cosines: " + ", ".join(f"{pair} {value:.2f}" for pair, value in values.items())


def upcycle(results: Results) -> str:
    """Experts, and how exactly the MoE computes what the dense model does, if it is to."""
    experts = f"{results['num_routed_experts']} routed experts, {results['num_experts_per_tok']} per token"
    if "largest_difference" not in results:
        return f"{experts}; each is another model's MLP"
    return f"{experts}; largest difference to the dense model {results['largest_difference']:.1e}"


def train(results: Results) -> str:
    """Loss and accuracy on held-out pairs before and after; without such pairs the training loss."""
    before, after = results["before"], results["after"]
    pulls = [f"{name} {value:.2g}" for name, value in _ratios(results).items()]
    terms = f"; gradient against Bradley-Terry's: {', '.join(pulls)}" if pulls else ""
    if before is None or after is None:
        count = f"{results['steps']} step{'s' * (results['steps'] != 1)}"
        return f"{count}, training loss {results['train_loss']:.4f}{terms}"
    loss, accuracy = (f"{before[k]:.4f} -> {after[k]:.4f}" for k in ("loss", "accuracy"))
    steps = f"best at step {results['best_step']} of {results['steps']}"
    trials = f", best of {len(results['trials'])} trials" if "trials" in results else ""
    return f"validation loss {loss}, accuracy {accuracy}, {steps}{trials}{terms}"


def _ratios(results: Results) -> dict[str, float]:
    """How strongly each term of the training loss pulled at the start, where that is known."""
    terms = results.get("terms", {})
    return {n: t["gradient_ratio"] for n, t in terms.items() if t["gradient_ratio"] is not None}


def route(results: Results) -> str:
    """Tokens seen, mean weight of the shared expert, largest share of a routed one, experts never used."""
    shared = sum(results["shared_mass"]) / len(results["shared_mass"])
    unused = sum(map(len, results["dead_experts"].values()))
    largest = max(results["max_share"])
    used = f"shared weight {shared:.3f}, largest share {largest:.3f}, {unused} unused experts"
    return f"{results['tokens']} tokens; {used}"


def export(results: Results) -> str:
    """The models written, or how exactly the one for stock transformers computes what was exported."""
    if results.get("form") == "linear":
        agreement, pairs = results["agreement"], results["held_out_pairs"]
        accuracy = results["accuracy"]
        lost = f"accuracy {accuracy['before']:.3f} before, {accuracy['after']:.3f} after"
        return f"linear head: the same verdict on {agreement:.3f} of {pairs} held-out pairs; {lost}"
    if "form" in results:
        return f"{results['form']}; largest difference to the MoE {results['largest_difference']:.1e}"
    return f"{len(results['models'])} dense models: {', '.join(results['models'])}"


def optimise(results: Results) -> str:
    """Gold reward at the end, and the step where it was highest, per reward model."""
    return "; ".join(
        f"{name}: gold {last['gold']:.3f} at the end, highest at step {last['peak_step']:.0f}"
        for name, last in results["models"].items()
    )


def evaluate(results: Results) -> str:
    """The number of models."""
    count = len(results["models"])
    return f"{count} model{'s' * (count != 1)}"


def attack(results: Results) -> str:
    """How many of the attacked pairs the search turned around, as a share with its interval."""
    low, high = results["interval"]
    share = f"{results['success_rate']:.1%} ({low:.1%} to {high:.1%})"
    return f"{results['succeeded']} of {results['attacked']} pairs overturned by the attack: {share}"


def publish(results: Results) -> str:
    """Size of the repository, and whether it was pushed."""
    state = "pushed" if results["pushed"] else "staged, not pushed"
    return f"{len(results['files'])} files, {results['bytes'] / 1e6:.1f} MB, {state}"

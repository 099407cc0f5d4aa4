"""Best-of-n: the gold score of the answer that a model ranks first among n, against KL (arXiv 2210.10760).

The estimator is unbiased and uses all N candidates of a prompt (arXiv 2112.09332, appendix I): the one of
rank i, worst first, is the best of n drawn without replacement with probability C(i-1, n-1) / C(N, n).

Q prompts, N candidates of one prompt, C of all, S values of n, M models, R resamples, X measured values.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import rankdata

from moemerge import plotting
from moemerge.probes.base import CandidateScores, Floats, Probe, Table
from moemerge.probes.statistics import bootstrap_means, percentile_interval
from moemerge.recipe import EvaluateSettings

log = logging.getLogger(__name__)
REFERENCES = ("random", "longest", "best possible")


def kl(n: int) -> float:
    """KL of best-of-n from the policy it samples, in nats: log n - (n - 1) / n (arXiv 2210.10760)."""
    return math.log(n) - (n - 1) / n


def sample_sizes(candidates: int) -> list[int]:
    """1, 2, 4, ... up to and including `candidates`."""
    return sorted({2**power for power in range(candidates.bit_length())} | {candidates})


@cache
def rank_weights(candidates: int, sizes: tuple[int, ...]) -> Floats:
    """Probability that rank i of N = `candidates`, worst first, is the best of n; [len(sizes), N]."""
    rank_N, n_S1 = np.arange(1, candidates + 1), np.asarray(sizes)[:, None]
    with np.errstate(invalid="ignore"):
        logs = _log_choose(rank_N - 1, n_S1 - 1) - _log_choose(candidates, n_S1)
    return np.where(rank_N >= n_S1, np.exp(logs), 0.0)


def _log_choose(total: Any, chosen: Any) -> Any:
    chosen = np.minimum(chosen, total)
    return gammaln(total + 1) - gammaln(chosen + 1) - gammaln(total - chosen + 1)


def selection(proxy_N: NDArray[Any], sizes: Sequence[int]) -> Floats:
    """Probability that each candidate is the one with the highest `proxy_N` of n; [len(sizes), N].

    Candidates with equal scores share their chance evenly. Each row sums to one.
    """
    weights_SN = rank_weights(len(proxy_N), tuple(sizes))
    below_SN = np.concatenate([np.zeros((len(sizes), 1)), np.cumsum(weights_SN, axis=1)], axis=1)
    low_N = rankdata(proxy_N, method="min").astype(np.int64) - 1
    high_N = rankdata(proxy_N, method="max").astype(np.int64)
    return (below_SN[:, high_N] - below_SN[:, low_N]) / (high_N - low_N)


def measure(sets: Mapping[str, CandidateScores], settings: EvaluateSettings, seed: int) -> dict[str, Any]:
    """Curves of gold and proxy score over n for every model and candidate set, with bootstrap intervals.

    n goes up to the smallest number of candidates that a prompt has; every prompt is estimated from all of
    its own. Proxy scores are standardised per model over all candidates. The bootstrap resamples prompts,
    and is paired in differences to the baseline. `drop` is gold at its peak minus gold at the last n; its
    interval takes the peak's n as given.
    """
    found = {name: _measure_set(name, scores, settings, seed) for name, scores in sets.items()}
    return {"confidence": settings.confidence, "sets": found}


def _measure_set(name: str, scores: CandidateScores, settings: EvaluateSettings, seed: int) -> dict[str, Any]:
    fewest, most = int(scores.sizes.min()), int(scores.sizes.max())
    if fewest < most:
        log.warning("%s: prompts have %d to %d candidates; curves end at n = %d", name, fewest, most, fewest)
    sizes = sample_sizes(fewest)
    curves = {model: _curves(scores, values, sizes) for model, values in scores.scores.items()}
    gold_QMS = np.stack([gold for gold, _ in curves.values()], axis=1)
    proxy_QMS = np.stack([proxy for _, proxy in curves.values()], axis=1)
    draws = _resample(np.stack([gold_QMS, proxy_QMS]), settings.resamples, seed)
    models = list(curves)
    baseline = models.index(settings.baseline or models[0])
    return {
        "prompts": len(scores.sizes),
        "candidates": [fewest, most],
        "n": sizes,
        "kl": [kl(n) for n in sizes],
        "baseline": models[baseline],
        "references": _references(scores, sizes),
        "models": {
            model: _summary(gold_QMS, proxy_QMS, draws, number, baseline, sizes, settings.confidence)
            for number, model in enumerate(models)
        },
    }


def _curves(scores: CandidateScores, proxy_C: NDArray[Any], sizes: Sequence[int]) -> tuple[Floats, Floats]:
    """Expected gold and standardised proxy of the chosen answer, per prompt and n; [Q, S] each."""
    proxy_C = np.asarray(proxy_C, dtype=np.float64)
    standard_C = (proxy_C - proxy_C.mean()) / (proxy_C.std() or 1.0)
    gold, proxy = [], []
    both = zip(scores.by_prompt(standard_C), scores.by_prompt(scores.gold), strict=True)
    for proxy_N, gold_N in both:
        chosen_SN = selection(proxy_N, sizes)
        gold.append(chosen_SN @ gold_N)
        proxy.append(chosen_SN @ proxy_N)
    return np.stack(gold), np.stack(proxy)


def _references(scores: CandidateScores, sizes: Sequence[int]) -> dict[str, list[float]]:
    random = float(np.mean([gold_N.mean() for gold_N in scores.by_prompt(scores.gold)]))
    longest, _ = _curves(scores, scores.lengths, sizes)
    best, _ = _curves(scores, scores.gold, sizes)
    means = ([random] * len(sizes), longest.mean(axis=0).tolist(), best.mean(axis=0).tolist())
    return dict(zip(REFERENCES, means, strict=True))


def _resample(curves_2QMS: Floats, resamples: int, seed: int) -> Floats:
    """Means of gold and proxy curves over resampled prompts; [R, 2, M, S]."""
    kinds, prompts, models, sizes = curves_2QMS.shape
    values_QX = curves_2QMS.transpose(1, 0, 2, 3).reshape(prompts, -1)
    draws_RX = bootstrap_means(np.column_stack([values_QX, np.ones(prompts)]), resamples, seed)
    return draws_RX.reshape(-1, kinds, models, sizes)


def _summary(
    gold_QMS: Floats,
    proxy_QMS: Floats,
    draws_R2MS: Floats,
    model: int,
    baseline: int,
    sizes: list[int],
    confidence: float,
) -> dict[str, Any]:
    gold_S = gold_QMS[:, model].mean(axis=0)
    draws_RS = draws_R2MS[:, 0, model]
    peak = int(gold_S.argmax())
    summary = {
        **_banded("gold", gold_S, draws_RS, confidence),
        **_banded("proxy", proxy_QMS[:, model].mean(axis=0), draws_R2MS[:, 1, model], confidence),
        "peak_n": sizes[peak],
        **_banded("drop", gold_S[[peak]] - gold_S[[-1]], draws_RS[:, [peak]] - draws_RS[:, [-1]], confidence),
    }
    if model != baseline:
        difference_S = gold_S - gold_QMS[:, baseline].mean(axis=0)
        summary |= _banded("minus_baseline", difference_S, draws_RS - draws_R2MS[:, 0, baseline], confidence)
    return summary


def _banded(name: str, values_X: Floats, draws_RX: Floats, confidence: float) -> dict[str, Any]:
    low, high = percentile_interval(draws_RX, confidence)
    return {name: values_X.tolist(), f"{name}_low": low.tolist(), f"{name}_high": high.tolist()}


def tables(result: dict[str, Any]) -> list[Table]:
    """One table of gold scores by n per candidate set."""
    return [_table(name, measured, result["confidence"]) for name, measured in result["sets"].items()]


def _table(name: str, measured: dict[str, Any], confidence: float) -> Table:
    shown = [place for place, _ in enumerate(measured["n"])]
    header = [
        "model",
        *(f"n={measured['n'][s]}" for s in shown),
        "minus baseline at the last n",
        "peak n",
        "drop",
    ]
    rows = []
    for model, curve in measured["models"].items():
        row = [model, *(f"{gold:.3f}" for gold in curve["gold"]), _last_difference(curve)]
        drop, low, high = curve["drop"][0], curve["drop_low"][0], curve["drop_high"][0]
        rows.append([*row, str(curve["peak_n"]), f"{drop:.3f} ({low:.3f} to {high:.3f})"])
    for reference, values in measured["references"].items():
        rows.append([reference, *(f"{value:.3f}" for value in values), "", "", ""])
    candidates = " to ".join(str(count) for count in sorted(set(measured["candidates"])))
    note = f"{measured['prompts']} prompts with {candidates} candidates; "
    note += f"{confidence:.0%} intervals over prompts. Baseline: {measured['baseline']}. "
    note += "Drop: gold score at its peak minus that at the last n."
    return Table(f"Gold score of the best of n on {name}", header, rows, note)


def _last_difference(curve: dict[str, Any]) -> str:
    if "minus_baseline" not in curve:
        return "baseline"
    value, low, high = (curve[f"minus_baseline{end}"][-1] for end in ("", "_low", "_high"))
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def plot(result: dict[str, Any], folder: Path) -> list[str]:
    """best_of_n_SET.png per candidate set: gold and proxy score against KL, every model in both."""
    names = []
    for name, measured in result["sets"].items():
        names.append(f"best_of_n_{_file_name(name)}.png")
        both = [
            _panel(measured, "gold", "gold score"),
            _panel(measured, "proxy", "model's own score (standardised)"),
        ]
        plotting.panels(both, folder / names[-1], title=f"Best of n on {name}")
    return names


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _panel(measured: dict[str, Any], kind: str, label: str) -> plotting.Panel:
    x = measured["kl"]
    curves = {
        model: plotting.Line(x, curve[kind], curve[f"{kind}_low"], curve[f"{kind}_high"])
        for model, curve in measured["models"].items()
    }
    if kind == "gold":
        lines = measured["references"].items()
        curves |= {reference: plotting.Line(x, values, reference=True) for reference, values in lines}
    return plotting.Panel(label, curves, "KL from the sampling policy (nats)", label)


PROBE = Probe("candidates", measure, tables, plot)

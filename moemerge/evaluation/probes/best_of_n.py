"""Best-of-n: the gold score of the answer that a model ranks first among n, against KL (arXiv 2210.10760).

The estimator is unbiased and uses all N candidates of a prompt (arXiv 2112.09332, appendix I): the one of
rank i, worst first, is the best of n drawn without replacement with probability C(i-1, n-1) / C(N, n).

Q prompts, N candidates of one prompt, G groups of equal scores, C candidates of all prompts, S values of n,
M models and lines to compare with, R resamples (in a result the values themselves come first), X values.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from moemerge.evaluation.probes import over_optimisation
from moemerge.evaluation.probes.base import CandidateScores, Probe
from moemerge.evaluation.results import BestOfN, CandidateCurves, ModelCurves
from moemerge.options.evaluate import EvaluateSettings
from moemerge.reports import plotting
from moemerge.reports.figures import Line, Panel
from moemerge.reports.statistics import Floats, Integers, banded, no_difference, resampled_curves, resampled_p
from moemerge.reports.table import Table, ends, percent, with_interval

log = logging.getLogger(__name__)
REFERENCES = ("random", "longest", "best possible")
COSTS = ("drop", "gap_area", "regret_area")
FITTED = ("alpha", "beta")  # from 3 candidates on: two points do not tell two coefficients
STEPS_PER_DOUBLING = 4


def kl(n: int) -> float:
    """KL of best-of-n from the policy it samples, in nats: log n - (n - 1) / n (arXiv 2210.10760)."""
    return math.log(n) - (n - 1) / n


def sample_sizes(candidates: int) -> list[int]:
    """1, 2, 4, ... up to and including `candidates`."""
    return sorted({2**power for power in range(candidates.bit_length())} | {candidates})


def grid_sizes(candidates: int) -> list[int]:
    """Four sizes per doubling, `sample_sizes` among them: areas, peaks and fits are taken over these."""
    doublings = np.arange(0, math.log2(candidates) + 1e-9, 1 / STEPS_PER_DOUBLING)
    between = {round(2**power) for power in doublings}
    return sorted({*sample_sizes(candidates), *between})


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


def best_of(proxy_N: NDArray[Any], values_NX: NDArray[Any], sizes: Sequence[int]) -> Floats:
    """Expected values of the candidate with the highest `proxy_N` of n, for every n in `sizes`; [S, X].

    Candidates with equal scores share their chance evenly.
    """
    _, group_N, sizes_G = np.unique(proxy_N, return_inverse=True, return_counts=True)
    sums_GX = np.zeros((len(sizes_G), values_NX.shape[1]))
    np.add.at(sums_GX, group_N, values_NX)
    shared_NX = np.repeat(sums_GX / sizes_G[:, None], sizes_G, axis=0)
    return rank_weights(len(proxy_N), tuple(sizes)) @ shared_NX


def measure(sets: Mapping[str, CandidateScores], settings: EvaluateSettings, seed: int) -> BestOfN:
    """Curves of gold and proxy score over n for every model and candidate set, with bootstrap intervals.

    n goes up to the smallest number of candidates that a prompt has; every prompt is estimated from all of
    its own. Proxy scores are standardised per model over all candidates. The bootstrap resamples prompts,
    and is paired in differences to the baseline. Per model, each with `_low`, `_high`, and `_minus_baseline`:

    * `drop`: gold at its peak minus gold at the last n; its interval takes the peak's n as given.
    * `gap_area`: over-optimisation, between what the proxy promises and gold (over_optimisation.gap_area).
    * `regret_area`: between the best possible line and gold. Both areas are over KL, gold's unit times nats.
    * `minus_baseline_p`: of the gold score's difference at the last n, by Student's t over prompts.
    * `alpha`, `beta`: gold gain = d (alpha - beta d), d = sqrt(KL), and `fit_error`; from 3 candidates on.

    `peak_n` has the interval of the peak's n over resamples, and `peak_n_over_baseline` its ratio to that of
    the baseline.
    """
    measured = {name: _measure_set(name, scores, settings, seed) for name, scores in sets.items()}
    return {"confidence": settings.confidence, "sets": measured}


def _measure_set(
    name: str, scores: CandidateScores, settings: EvaluateSettings, seed: int
) -> CandidateCurves:
    fewest, most = int(scores.sizes.min()), int(scores.sizes.max())
    if fewest < most:
        log.warning("%s: prompts have %d to %d candidates; curves end at n = %d", name, fewest, most, fewest)
    grid, sizes = grid_sizes(fewest), sample_sizes(fewest)
    lines = {**scores.scores, **_references(scores)}
    curves_2QMS = np.stack([_curves(scores, values, grid) for values in lines.values()], axis=2)
    means_2MRS = resampled_curves(curves_2QMS, settings.resamples, seed)
    gold, proxy = (dict(zip(lines, means_MRS, strict=True)) for means_MRS in means_2MRS)
    best_RS = gold[REFERENCES[-1]]
    apart = _unseen_difference(scores, settings.confidence)
    values = {model: _values(grid, gold[model], proxy[model], best_RS) for model in scores.scores}
    shown = np.searchsorted(grid, sizes)
    baseline = settings.baseline or next(iter(scores.scores))
    return {
        "prompts": len(scores.sizes),
        "candidates": [fewest, most],
        "n": sizes,
        "kl": [kl(n) for n in sizes],
        "baseline": baseline,
        "references": {reference: gold[reference][0, shown].tolist() for reference in REFERENCES},
        "models": {
            model: cast(
                ModelCurves,
                _curve(gold[model][:, shown], proxy[model][:, shown], settings.confidence)
                | _numbers(values[model], settings.confidence)
                | _versus(gold, values, model, baseline, shown, settings.confidence, apart)
                | _p_at_last_n(gold, model, baseline, len(scores.sizes)),
            )
            for model in scores.scores
        },
    }


def _references(scores: CandidateScores) -> dict[str, NDArray[Any]]:
    """What ranks the candidates of each line to compare with: nothing, their length, their gold score."""
    ranks = (np.zeros(len(scores.gold)), scores.lengths, scores.gold)
    return dict(zip(REFERENCES, ranks, strict=True))


def _curves(scores: CandidateScores, proxy_C: NDArray[Any], grid: Sequence[int]) -> Floats:
    """Expected gold and standardised proxy of the chosen answer, per prompt and n; [2, Q, S]."""
    proxy_C = np.asarray(proxy_C, dtype=np.float64)
    standard_C = (proxy_C - proxy_C.mean()) / (proxy_C.std() or 1.0)
    both_C2 = np.stack([scores.gold, standard_C], axis=1)
    parts = zip(scores.by_prompt(standard_C), scores.by_prompt(both_C2), strict=True)
    curves_QS2 = np.stack([best_of(proxy_N, both_N2, grid) for proxy_N, both_N2 in parts])
    return np.moveaxis(curves_QS2, -1, 0)


def _values(grid: Sequence[int], gold_RS: Floats, proxy_RS: Floats, best_RS: Floats) -> dict[str, Floats]:
    """The numbers of one model, each as its value and those of the resamples, [1 + R]."""
    kl_S, gain_RS = np.array([kl(n) for n in grid]), gold_RS - gold_RS[:, :1]
    peak_R, terms_S2 = over_optimisation.peak(gold_RS), over_optimisation.best_of_n_terms(kl_S)
    values = {
        "peak_n": np.asarray(grid)[peak_R],
        "drop": gold_RS[:, peak_R[0]] - gold_RS[:, -1],
        "gap_area": over_optimisation.gap_area(kl_S, gold_RS, proxy_RS),
        "regret_area": over_optimisation.area(kl_S, best_RS - gold_RS),
    }
    if over_optimisation.can_fit(terms_S2):
        fit_R2, error_R = over_optimisation.fit(terms_S2, gain_RS)
        values |= {"alpha": fit_R2[:, 0], "beta": fit_R2[:, 1], "fit_error": error_R}
    return values


def _curve(gold_RS: Floats, proxy_RS: Floats, confidence: float) -> dict[str, Any]:
    gap_RS = over_optimisation.implied(gold_RS, proxy_RS) - gold_RS
    curves = {"gold": gold_RS, "proxy": proxy_RS, "gap": gap_RS}
    return {k: v for name, values in curves.items() for k, v in banded(name, values, confidence).items()}


def _numbers(values: Mapping[str, Floats], confidence: float) -> dict[str, Any]:
    return {k: v for name, values_R in values.items() for k, v in banded(name, values_R, confidence).items()}


def _versus(
    gold: Mapping[str, Floats],
    values: Mapping[str, Mapping[str, Floats]],
    model: str,
    baseline: str,
    shown: Integers,
    confidence: float,
    apart: float,
) -> dict[str, Any]:
    """Paired differences to the baseline; of the peak's n, the ratio.

    Where no prompt's curve differs resamples cannot: `apart` then bounds the difference, but at n = 1, where
    all models pick at random.
    """
    if model == baseline:
        return {}
    mine, theirs = values[model], values[baseline]
    versus = {"minus_baseline": (gold[model] - gold[baseline])[:, shown]}
    versus["peak_n_over_baseline"] = mine["peak_n"] / theirs["peak_n"]
    others = mine.keys() - {"peak_n", "fit_error"}
    versus |= {f"{name}_minus_baseline": mine[name] - theirs[name] for name in mine if name in others}
    numbers = _numbers(versus, confidence)
    if not versus["minus_baseline"].any():
        ends = [0.0, *[apart] * (len(shown) - 1)]
        numbers |= {"minus_baseline_low": [-end for end in ends], "minus_baseline_high": ends}
    return numbers


def _unseen_difference(scores: CandidateScores, confidence: float) -> float:
    """How far two models' gold scores may be apart of which no prompt shows any difference.

    As many prompts as might differ unseen, times the mean distance from the worst answer to the best.
    """
    parts = scores.by_prompt(scores.gold)
    spread = float(np.mean([gold_N.max() - gold_N.min() for gold_N in parts]))
    return no_difference(len(scores.sizes), confidence)[1] * spread


def _p_at_last_n(gold: Mapping[str, Floats], model: str, baseline: str, prompts: int) -> dict[str, float]:
    if model == baseline:
        return {}
    gain_R = (gold[model] - gold[baseline])[:, -1]
    return {"minus_baseline_p": resampled_p(float(gain_R[0]), gain_R[1:], prompts)}


def tables(result: BestOfN) -> list[Table]:
    """Per candidate set a table of gold scores by n, and one of what over-optimisation costs."""
    sets = result["sets"].items()
    kinds = (_gold_table, _cost_table)
    return [table(name, measured, result["confidence"]) for name, measured in sets for table in kinds]


def _gold_table(name: str, measured: CandidateCurves, confidence: float) -> Table:
    header = ["model", *(f"n={n}" for n in measured["n"]), "minus baseline at the last n"]
    rows, baseline = [], measured["baseline"]
    for model, curve in measured["models"].items():
        versus = "baseline" if model == baseline else _last_difference(curve)
        rows.append([model, *(f"{gold:.3f}" for gold in curve["gold"]), versus])
    for reference, values in measured["references"].items():
        rows.append([reference, *(f"{value:.3f}" for value in values), ""])
    candidates = " to ".join(str(count) for count in sorted(set(measured["candidates"])))
    note = f"{measured['prompts']} prompts with {candidates} candidates; "
    note += f"{percent(confidence)} intervals over prompts. Baseline: {baseline}."
    return Table(f"Gold score of the best of n on {name}", header, rows, note)


def _cost_table(name: str, measured: CandidateCurves, confidence: float) -> Table:
    """One row per model, and one of paired differences under each but the baseline."""
    rows, baseline = [], measured["baseline"]
    fitted, unknown = (FITTED, []) if measured["n"][-1] > 2 else ((), [""] * len(FITTED))
    for model, curve in measured["models"].items():
        costs = [_cell(curve, cost, ".3f") for cost in (*COSTS, *fitted)]
        rows.append([model, _cell(curve, "peak_n", ".0f"), *costs, *unknown])
        if model != baseline:
            ratio = "x" + _cell(curve, "peak_n_over_baseline", ".2g")
            versus = [_cell(curve, f"{cost}_minus_baseline", "+.3f") for cost in (*COSTS, *fitted)]
            rows.append([f"{model} against {baseline}", ratio, *versus, *unknown])
    note = (
        f"{percent(confidence)} intervals over prompts. Drop: gold at its peak minus that at the last n. "
        "Gap: area over KL between the gold score that the model's own score promises, if it went on as from "
        "n=1 to n=2, and the real one. Regret: area between the best possible line and the real one. alpha, "
        "beta: gold gain = d (alpha - beta d), d = sqrt(KL). Against the baseline: the ratio of peak n, else "
        "differences."
    )
    header = ["model", "peak n", "drop", "gap", "regret", "alpha", "beta"]
    return Table(f"Over-optimisation on {name}", header, rows, note)


def _cell(curve: ModelCurves, name: str, form: str) -> str:
    value, low, high = ends(curve, name)
    return with_interval(value, (low, high), form)


def _last_difference(curve: ModelCurves) -> str:
    value, low, high = (values[-1] for values in ends(curve, "minus_baseline"))
    return with_interval(value, (low, high), "+.3f")


def plot(result: BestOfN, folder: Path) -> list[str]:
    """best_of_n_SET.png per candidate set: gold, proxy and their gap against KL, every model in each."""
    names = []
    for name, measured in result["sets"].items():
        names.append(f"best_of_n_{_file_name(name)}.png")
        three = [
            _panel(measured, "gold", "gold score"),
            _panel(measured, "proxy", "model's own score (standardised)"),
            _panel(measured, "gap", "gold score promised minus real"),
        ]
        plotting.panels(three, folder / names[-1], title=f"Best of n on {name}")
    return names


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _panel(measured: CandidateCurves, kind: Literal["gold", "proxy", "gap"], label: str) -> Panel:
    x = measured["kl"]
    curves = {model: Line(x, *ends(curve, kind)) for model, curve in measured["models"].items()}
    if kind == "gold":
        lines = measured["references"].items()
        curves |= {reference: Line(x, values, reference=True) for reference, values in lines}
    return Panel(label, curves, "KL from the sampling policy (nats)", label)


PROBE = Probe("candidates", measure, tables, plot)

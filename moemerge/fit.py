"""Stage fit: merge coefficients for a MoE or a list of models, by one of the ways in moemerge.coefficients.

Shapes: L blocks, N weighted members (routed experts, or models besides the base).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moemerge import plotting, runtime
from moemerge.artifacts import Draft, stage, write_json
from moemerge.coefficients import METHODS
from moemerge.coefficients.base import Coefficients, FitOutcome, FitProblem, Objective
from moemerge.data import EncodedPair, encode_pairs, read_pairs
from moemerge.errors import CheckpointError, DataError
from moemerge.members import open_members
from moemerge.merged_model import MergedModel, PairObjective
from moemerge.probes.base import Table
from moemerge.recipe import Fit
from moemerge.routing import RoutingStatistics
from moemerge.sources import MergeSource, layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@stage("fit", Fit)
def fit(options: Fit, draft: Draft) -> None:
    """Write merge coefficients: coefficients.safetensors and .json, report.json, fit.md, alpha.png.

    uniform needs nothing but the members, usage routing statistics of the MoE, learned and grid preference
    pairs. Nothing but coefficients is fitted; models on disk are only read. Raises OptionError when the
    method lacks an input, CheckpointError for a foreign or damaged one, UnsupportedError for models that do
    not go together, DataError for unusable pairs.
    """
    device = runtime.use(options)
    method = METHODS.get(options.method)
    source = open_members(options)
    outcome = method(_problem(options, source, _objective(options, source, device, draft)))
    meta = {"method": options.method, "shared_weight": str(options.shared_weight), **source.identity()}
    coefficients = Coefficients(source.blocks(), outcome.alpha_LN, outcome.shared_L, meta)
    coefficients.save(draft.folder)
    log.info("fit: %s", outcome.report["verdict"])
    _tell(draft, coefficients, outcome, source.member_names[source.has_shared :])


def fit_models(
    models: Sequence[str | Path],
    pairs: str | Path | None,
    output: str | Path,
    base: str | Path | None = None,
    **options: Any,
) -> Path:
    """Merge coefficients for whole models of one architecture: `fit(models=..., pairs=..., output=..., ...)`.

    `options` are those of `moemerge fit`: scope, method, shared_weight, ... Returns `output`, which
    `merge_models` takes as coefficients; raises as fit does.
    """
    given = {"models": [str(model) for model in models], "base": base and str(base)}
    return fit(output=output, pairs=pairs and str(pairs), **given, **options)


def _problem(options: Fit, source: MergeSource, objective: Callable[[], Objective] | None) -> FitProblem:
    if not source.has_shared and isinstance(options.shared_weight, str):
        log.warning("shared_weight %s is ignored: no member is shared", options.shared_weight)
    return FitProblem(
        blocks=source.blocks(),
        num_experts=source.num_members,
        has_shared=source.has_shared,
        settings=options,
        seed=options.seed,
        statistics=_statistics(options.routing, source),
        objective=objective,
    )


def _statistics(routing: str | None, source: MergeSource) -> RoutingStatistics | None:
    """The routing statistics, which must be of this very model."""
    if routing is None:
        return None
    found = RoutingStatistics.load(routing)
    layers = sorted({layer for block in source.blocks() if (layer := layer_of(block)) is not None})
    theirs, mine = (found.layers, found.num_experts), (layers, source.num_members)
    if theirs == mine and found.meta.get("model") in (None, source.fingerprint):
        return found
    raise CheckpointError(
        "routing statistics are of another model",
        given=f"layers {theirs[0]}, {theirs[1]} experts, fingerprint {found.meta.get('model')}",
        expected=f"layers {mine[0]}, {mine[1]} experts, fingerprint {source.fingerprint}",
        fix="run route on this MoE; whole models have no routing",
    )


def _objective(
    options: Fit, source: MergeSource, device: torch.device, draft: Draft
) -> Callable[[], Objective] | None:
    """What builds the objective when a method asks for it; None without pairs."""
    if options.pairs is None:
        return None

    def build() -> Objective:
        tokenizer = source.tokenizer()
        train, held_out = _pairs(options, tokenizer, draft.results)
        shape = (len(source.blocks()), source.num_members)
        alpha_LN = torch.full(shape, 1 / shape[1], dtype=torch.float64)
        dtype = torch.promote_types(source.dtype, torch.float32)
        merged = MergedModel(source, alpha_LN, torch.zeros(shape[0], dtype=torch.float64), device, dtype)
        return PairObjective(merged, tokenizer, train, held_out, options.micro_batch_size)

    return build


def _pairs(
    options: Fit, tokenizer: PreTrainedTokenizerBase, results: dict[str, Any]
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Training and held-out pairs; what became of the rows goes into `results`."""
    rows = results.setdefault("rows", {})

    def read(name: str, source: str) -> list[EncodedPair]:
        pairs, report = read_pairs(source, options)
        encoded = encode_pairs(tokenizer, pairs, options, report)
        rows[name] = report.summary()
        return encoded

    train = read("pairs", str(options.pairs))
    if options.validation is not None:
        return train, read("validation", options.validation)
    return hold_out(train, options.holdout, options.seed)


def hold_out(
    pairs: Sequence[EncodedPair], share: float, seed: int
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Split off about `share` of the pairs, at least one; pairs of one prompt stay together.

    Raises DataError if there is only one prompt.
    """
    keys = [json.dumps(p.pair.prompt or (p.pair.chosen, p.pair.rejected), sort_keys=True) for p in pairs]
    counts = Counter(keys)
    groups = list(counts)
    if len(groups) < 2:
        raise DataError(
            "no pairs can be held out",
            given=f"{len(pairs)} pairs of {len(groups)} prompt(s)",
            expected="pairs of two prompts at least, as no prompt is on both sides",
            fix="give validation pairs, or more pairs",
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = accumulate(counts[groups[number]] for number in order)
    enough = next(number for number, size in enumerate(sizes, start=1) if size >= share * len(pairs))
    held = {groups[number] for number in order[: min(enough, len(groups) - 1)]}
    rows = list(zip(pairs, keys, strict=True))
    return [pair for pair, key in rows if key not in held], [pair for pair, key in rows if key in held]


def _tell(draft: Draft, coefficients: Coefficients, outcome: FitOutcome, members: list[str]) -> None:
    write_json(draft.folder / "report.json", outcome.report)
    plotting.heat_map(
        coefficients.alpha_LN.numpy(),
        draft.folder / "alpha.png",
        "Merge coefficients",
        "member",
        "block",
        y_ticks=[block.removeprefix("layers.") for block in coefficients.blocks],
    )
    tables = [*_loss_tables(outcome.report), _coefficient_table(coefficients, outcome.report, members)]
    parts = ["# Merge coefficients\n", outcome.report["verdict"] + "\n", *(t.markdown() for t in tables)]
    (draft.folder / "fit.md").write_text("\n".join([*parts, "![alpha](alpha.png)\n"]), encoding="utf-8")
    draft.results |= {k: v for k, v in outcome.report.items() if k != "trajectory"}


def _loss_tables(report: dict[str, Any]) -> list[Table]:
    if "held_out" not in report:
        return []
    rows = []
    for split in ("train", "held_out"):
        for when in ("before", "after"):
            at, number = report[split][when], str(report["pairs"][split])
            rows.append([split, when, number, f"{at['loss']:.4f}", f"{at['accuracy']:.4f}"])
    return [Table("Bradley-Terry loss", ["pairs", "when", "number", "loss", "accuracy"], rows)]


def _coefficient_table(coefficients: Coefficients, report: dict[str, Any], members: list[str]) -> Table:
    moved = [f"{one['l1']:.4f}" for one in report.get("moved", [])] or [""] * len(coefficients.blocks)
    rows = [
        [block, l1, f"{shared:.4f}", *(f"{a:.4f}" for a in alpha_N)]
        for l1, (block, shared, alpha_N) in zip(moved, coefficients.table(), strict=True)
    ]
    header = ["block", "moved", "shared", *members]
    note = "moved: L1 distance of the members' coefficients from where they started."
    return Table("Coefficients", header, rows, note if report.get("moved") else "")

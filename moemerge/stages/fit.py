"""Stage fit: merge coefficients for a MoE or a list of models, by one of the methods in fitting/methods.

Shapes: L blocks, N weighted members (routed experts, or models besides the base).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from moemerge.artifacts.origin import with_base
from moemerge.artifacts.result import Result
from moemerge.artifacts.stage import Draft, stage
from moemerge.data.draw import draw
from moemerge.data.pairs import Pair
from moemerge.data.reading import read_candidates, read_pairs
from moemerge.data.tokenise import EncodedCandidates, EncodedPair, encode_candidates, encode_pairs, texts_of
from moemerge.errors import CheckpointError, OptionError
from moemerge.fitting.curve import Rows, curve
from moemerge.fitting.gram import output_grams
from moemerge.fitting.methods import METHODS
from moemerge.fitting.objectives.base import mixture
from moemerge.fitting.pair_objective import PairObjective
from moemerge.fitting.problem import FitOutcome, FitProblem
from moemerge.fitting.report import coefficient_rows, write_report
from moemerge.fitting.splits import hold_out
from moemerge.fitting.targets import Targets
from moemerge.merging.blocks import layer_of
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.parted_model import PartedModel
from moemerge.merging.sources.base import MergeSource
from moemerge.merging.sources.open import open_source
from moemerge.models.device import use_device
from moemerge.models.routing import RoutingStatistics
from moemerge.models.state_store import StateStore
from moemerge.models.token_limits import check_config
from moemerge.options.base import Coordinates
from moemerge.options.fit import Fit
from moemerge.options.signature import with_options_of

log = logging.getLogger(__name__)


@stage("fit", Fit, shares_work=True, complete=with_base, rows=coefficient_rows)
def fit(options: Fit, draft: Draft) -> None:
    """Write merge coefficients: coefficients.safetensors and .json, report.json, fit.md, alpha.png.

    uniform and one_hot need nothing but the members, usage routing statistics of the MoE, the others
    preference pairs. Nothing but coefficients is fitted; models on disk are only read. Started by torchrun,
    processes share the pairs and the first one writes. Raises OptionError when the method lacks an input,
    CheckpointError for a foreign or damaged one, UnsupportedError for models that do not go together,
    DataError for unusable pairs.
    """
    device = use_device(options)
    method = METHODS.get(options.method)
    source = _opened(options)
    blocks = source.blocks(per_matrix=options.granularity in ("matrix", "group"))
    with StateStore(draft.folder, options.cache_memory * 1e9) as store:
        data = _Data(options, source, blocks, device, draft, store)
        outcome = method(_problem(options, source, blocks, data))
        if options.curve:
            outcome = replace(outcome, report=outcome.report | {"curve": data.curve(outcome)})
    meta = {
        "method": options.method,
        "shared_weight": str(options.shared_weight),
        "granularity": options.granularity,
        **source.identity(),
    }
    coefficients = Coefficients(
        blocks, outcome.alpha_LN, outcome.shared_L, meta, options.coordinates, source.scales
    )
    coefficients.save(draft.folder)
    log.debug("fit: %s", outcome.report["verdict"])
    write_report(draft, coefficients, outcome, source.member_names[source.has_shared :])


@with_options_of(Fit, without=("model",))
def fit_models(
    models: Sequence[str | PathLike],
    pairs: str | PathLike | None,
    output: str | PathLike,
    base: str | PathLike | None = None,
    **options: Any,
) -> Result:
    """Merge coefficients for whole models of one architecture: `fit(models=..., pairs=..., output=..., ...)`.

    `options` are those of `moemerge fit`: scope, method, shared_weight, ... Returns `output`, which
    `merge_models` takes as coefficients; raises as fit does.
    """
    return fit(output=output, pairs=pairs, models=list(models), base=base, **options)


def _opened(options: Fit) -> MergeSource:
    source = open_source(options)
    if options.coordinates == "sum" and not source.has_shared:
        raise OptionError(
            "a sum of changes needs a member to change from",
            given=f"{options.model}: no shared expert",
            expected="a MoE with a shared expert, or models with a base",
            fix="upcycle with shared_expert true, or set coordinates to average",
        )
    return source


def _problem(options: Fit, source: MergeSource, blocks: list[str], data: _Data) -> FitProblem:
    if not source.has_shared and isinstance(options.shared_weight, str):
        log.warning("shared_weight %s is ignored: no member is shared", options.shared_weight)
    if options.method == "least_squares" and options.coordinates == "sum" and _all_own_all(options):
        log.warning(
            "every model is imitated on all pairs alike, so their sum comes out near their average (each c "
            "near 1/%d): say by owners whose the pairs of a subset are",
            len(options.models),
        )
    return FitProblem(
        blocks=blocks,
        num_experts=source.num_members,
        has_shared=source.has_shared,
        kinds=source.kinds(blocks) if options.granularity == "group" else (),
        settings=options,
        seed=options.seed,
        statistics=_statistics(options.routing, source),
        objective=data.objective if options.pairs else None,
        start=_start(options.start, source, blocks, options.coordinates),
        output_grams=data.output_grams if options.pairs else None,
    )


def _all_own_all(options: Fit) -> bool:
    """Whether all pairs belong to several models alike."""
    return len(options.models) > 1 and not options.owners


def _start(
    folder: str | None, source: MergeSource, blocks: list[str], coordinates: Coordinates
) -> FitOutcome | None:
    """Coefficients to start from, a row for each of `blocks`; rows of layers serve all their matrices."""
    if folder is None:
        return None
    saved = Coefficients.load(folder)
    source.check_fit(saved)
    if saved.coordinates != coordinates and coordinates == "average":
        raise OptionError(
            "coefficients to start from are a sum",
            given=f"{folder}, coordinates {saved.coordinates}",
            expected="an average",
            fix="set coordinates to sum",
        )
    theirs, mine = source.rows(saved.blocks), source.rows(blocks)
    # Through the tensors: the saved row of each of our rows. If tensors of one row of ours have different
    # saved ones, the last of them stands here, and the others disagree with it.
    row_of = {mine[name]: row for name, row in theirs.items()}
    if any(row_of[mine[name]] != row for name, row in theirs.items()):
        raise CheckpointError(
            "coefficients to start from are finer than those to fit",
            given=f"{len(saved.blocks)} blocks in {folder}",
            expected=f"{len(blocks)} blocks, or rows of whole layers",
            fix="set granularity to what they were fitted with",
        )
    rows = [row_of[row] for row in range(len(blocks))]
    return FitOutcome(saved.alpha_LN[rows], saved.shared_L[rows])


def _statistics(routing: str | None, source: MergeSource) -> RoutingStatistics | None:
    """The routing statistics, which must be of this very model."""
    if routing is None:
        return None
    statistics = RoutingStatistics.load(routing)
    layers = sorted({layer for block in source.blocks() if (layer := layer_of(block)) is not None})
    theirs, mine = (statistics.layers, statistics.num_experts), (layers, source.num_members)
    if theirs == mine and statistics.meta.get("model") in (None, source.fingerprint):
        return statistics
    raise CheckpointError(
        "routing statistics are of another model",
        given=f"layers {theirs[0]}, {theirs[1]} experts, fingerprint {statistics.meta.get('model')}",
        expected=f"layers {mine[0]}, {mine[1]} experts, fingerprint {source.fingerprint}",
        fix="run route on this MoE; whole models have no routing",
    )


class _Data:
    """Merged model and pairs, made when a method asks for them; a summary of rows goes into the draft."""

    def __init__(
        self,
        options: Fit,
        source: MergeSource,
        blocks: list[str],
        device: torch.device,
        draft: Draft,
        store: StateStore,
    ) -> None:
        self.options, self.source, self.blocks, self.device = options, source, blocks, device
        self.store = store
        self.rows: dict[str, Any] = draft.results.setdefault("rows", {}) if options.pairs else {}

    @cached_property
    def merged(self) -> MergedModel:
        kind = PartedModel if self.options.sharded else MergedModel
        merged = kind.at_average(self.source, self.device, self.blocks)
        if self.options.cache_memory and not merged.in_parts:
            shortest = min(self.split[0], key=lambda pair: len(pair.chosen.ids) + len(pair.rejected.ids))
            merged.run_lower_layers_once(shortest, self.store)
        return merged

    @cached_property
    def split(self) -> tuple[list[EncodedPair], list[int], list[int]]:
        """All pairs; the numbers of those to fit, and of those held out."""
        pairs = self._read("pairs", str(self.options.pairs))
        if self.options.validation is None:
            return (pairs, *hold_out(pairs, self.options.holdout, self.options.seed))
        held_out = self._read("validation", self.options.validation)
        count = len(pairs)
        return pairs + held_out, list(range(count)), list(range(count, count + len(held_out)))

    @cached_property
    def tokenizer(self) -> Any:
        return self.source.tokenizer()

    def objective(self) -> PairObjective:
        pairs, train, held_out = self.split
        targets = Targets(self.merged, self.tokenizer, pairs, self.options)
        term = mixture(self.options.objectives, targets)
        size, candidates = self.options.micro_batch_size, self._candidates()
        return PairObjective(self.merged, self.tokenizer, pairs, train, held_out, term, size, candidates)

    def output_grams(self, start: FitOutcome) -> Tensor:
        """Over the pairs that are not held out."""
        pairs, train, _ = self.split
        targets = Targets(self.merged, self.tokenizer, [pairs[number] for number in train], self.options)
        return output_grams(targets, len(self.blocks))

    def curve(self, outcome: FitOutcome) -> Rows:
        """Every weight of the grid on the test pairs."""
        sets = {name: self._read(f"curve/{name}", source) for name, source in self.options.curve.items()}
        size = self.options.micro_batch_size
        return curve(self.merged, self.tokenizer, sets, outcome, self.options.grid, size)

    def _read(self, name: str, source: str) -> list[EncodedPair]:
        pairs, report = read_pairs(source, self.options)

        def usable(some: Sequence[Pair]) -> list[EncodedPair]:
            return encode_pairs(self.tokenizer, some, self.options, report)

        encoded = draw(pairs, self.options.max_pairs, self.options.seed, usable, report)
        check_config(self.source.dense_config(), texts_of(encoded))
        self.rows[name] = report.told()
        return encoded

    def _candidates(self) -> list[EncodedCandidates]:
        if self.options.candidates is None:
            return []
        sets, report = read_candidates(self.options.candidates, self.options)
        encoded = encode_candidates(self.tokenizer, sets, self.options, report)
        self.rows["candidates"] = report.told()
        return encoded

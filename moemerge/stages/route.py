"""Stage route: one pass of preference pairs through a MoE, counting what its gates do.

Shapes: L layers with experts, N routed experts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.artifacts.manifest import model_fingerprint
from moemerge.artifacts.ranks import led
from moemerge.artifacts.stage import Draft, stage
from moemerge.data.draw import first
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import EncodedPair, encode_pairs, texts_of
from moemerge.merging.experts.diversity import barriers, disagreement, measure_updates, score_pairs_at
from moemerge.merging.experts.report import Diversity, ScoreDiversity
from moemerge.merging.experts.speculation import Speculation, measure_speculation
from moemerge.merging.experts.uncertainty import member_points
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.device import use_device
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.moe import moe_layers
from moemerge.models.moe_settings import MoeSettings
from moemerge.models.routing import SIDES, RoutingStatistics
from moemerge.models.scoring import score
from moemerge.options.route import Route
from moemerge.reports import plotting
from moemerge.reports.table import Table

PROBE_SHARED_WEIGHT = 0.5

log = logging.getLogger(__name__)


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Each layer's gates: mean weight of the shared expert, entropy in nats, the other experts' shares."""
    return _layer_rows(RoutingStatistics.load(folder))


@stage("route", Route, shares_work=True, rows=_rows)
def route(options: Route, draft: Draft) -> None:
    """Write routing statistics by subset and side: statistics.safetensors, routing.md, gate_mass.png.

    Padding is never counted; batches change nothing beyond rounding. With `diversity`, also how the experts
    differ: diversity.json, heat maps, more tables. Raises CheckpointError if the model is no MoE, DataError
    for unusable pairs.
    """
    device = use_device(options)
    folder = ModelFolder(options.model)
    folder.require_moe()
    tokenizer = load_tokenizer(folder)
    pairs, report = read_pairs(options.pairs, options)
    encoded = encode_pairs(tokenizer, first(pairs, options.max_pairs, report), options, report)
    statistics, speculation = _observe(options, folder, tokenizer, encoded, device)
    statistics.meta["model"] = led(lambda: model_fingerprint(folder.folder))
    statistics.save(draft.folder)
    _draw(statistics, draft)
    draft.results |= {"pairs": len(encoded), "rows": report.told(), **_summary(statistics)}
    tables, pictures = [_layer_table(statistics), _group_table(statistics)], ["gate_mass.png"]
    if options.diversity != "none":
        diversity = _diversity(
            options, folder, tokenizer, encoded[: options.probe_pairs], speculation, device
        )
        pictures += diversity.write(draft.folder)
        draft.results["diversity"] = diversity.results()
        tables += diversity.tables()
    (draft.folder / "routing.md").write_text(_report(tables, pictures), encoding="utf-8")


def _observe(
    options: Route,
    folder: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    device: torch.device,
) -> tuple[RoutingStatistics, Speculation | None]:
    """Everything that needs the MoE itself, which leaves memory before anything is merged."""
    model = load_reward_model(folder, device, placement=options)
    tokens, speculation = options.batch_tokens, None
    if options.diversity == "all":
        probes = pairs[: options.probe_pairs]
        speculation = measure_speculation(model, tokenizer, probes, tokens, options.seed)
    return collect(model, tokenizer, pairs, tokens), speculation


def _diversity(
    options: Route,
    folder: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    speculation: Speculation | None,
    device: torch.device,
) -> Diversity:
    """How the experts differ in weights, and in scores too if speculation was measured."""
    source = MoeCheckpoint(folder)
    updates = measure_updates(source)
    if speculation is None:
        return Diversity(updates)
    tokens, shared = options.batch_tokens, PROBE_SHARED_WEIGHT * source.settings.shared_expert
    merged = MergedModel.at_average(source, device, shared=shared)
    points = member_points(merged.alpha_LN, merged.shared_L)
    scores_NP2 = score_pairs_at(merged, tokenizer, pairs, points, tokens)
    barriers_MM = barriers(merged, tokenizer, pairs, tokens)
    return Diversity(updates, ScoreDiversity(disagreement(scores_NP2), barriers_MM, speculation))


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    batch_tokens: int,
) -> RoutingStatistics:
    """Routing statistics of a MoE over `pairs`, both sides of each; meta is left empty."""
    layers = moe_layers(model)
    settings = MoeSettings.read(model.config.moemerge)
    statistics = RoutingStatistics(settings.layers, settings.num_routed_experts, settings.num_experts_per_tok)
    groups = [(pair.pair.subset, side) for pair in pairs for side in SIDES]
    with statistics.observe(layers, groups) as on_batch:
        score(model, tokenizer, texts_of(pairs), batch_tokens, "route", on_batch)
    return statistics


def _summary(statistics: RoutingStatistics) -> dict[str, Any]:
    """For the manifest, per layer: entropy in nats, the largest share, experts that no token selected."""
    mass_LN, selections_LN = statistics.gate_mass_LN(), statistics.total().selections_LN
    return {
        "tokens": int(statistics.total().tokens_L[0]),
        "layers": statistics.layers,
        "entropy": statistics.entropy_L().tolist(),
        "shared_mass": statistics.shared_mass_L().tolist(),
        "max_share": mass_LN.max(1).values.tolist(),
        "dead_experts": {
            str(number): dead
            for number, row in zip(statistics.layers, selections_LN, strict=True)
            if (dead := (row == 0).nonzero()[:, 0].tolist())
        },
    }


def _draw(statistics: RoutingStatistics, draft: Draft) -> None:
    plotting.heat_map(
        statistics.gate_mass_LN().numpy(),
        draft.folder / "gate_mass.png",
        "Share of the routed gate mass",
        "expert",
        "layer",
        y_ticks=statistics.layers,
    )


def _report(tables: Sequence[Table], pictures: Sequence[str]) -> str:
    shown = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})\n" for name in pictures]
    return "\n".join(["# Routing\n", *(table.markdown() for table in tables), *shown])


def _layer_table(statistics: RoutingStatistics) -> Table:
    rows = [*_layer_rows(statistics)]
    return Table(
        "Gate mass per layer",
        [*rows[0]],
        [[str(number), *(f"{value:.4f}" for value in values)] for number, *values in map(dict.values, rows)],
        "shared: mean gate weight of the shared expert. entropy: of the routing probabilities, in nats. "
        "experts: shares of the routed gate mass.",
    )


def _layer_rows(statistics: RoutingStatistics) -> Iterator[dict[str, Any]]:
    names = ["layer", "shared", "entropy", *(f"expert {i}" for i in range(statistics.num_experts))]
    columns = [statistics.shared_mass_L(), statistics.entropy_L(), *statistics.gate_mass_LN().T]
    for values in zip(statistics.layers, *(column.tolist() for column in columns), strict=True):
        yield dict(zip(names, values, strict=True))


def _group_table(statistics: RoutingStatistics) -> Table:
    """How far each subset and side departs from the whole: half the L1 distance, mean over layers."""
    whole_LN, rows = statistics.gate_mass_LN(), []
    for subset, side in sorted(statistics.groups):
        mine_LN = statistics.gate_mass_LN(subset, side)
        tokens = int(statistics.total(subset, side).tokens_L[0])
        away = _total_variation(mine_LN, whole_LN)
        rows.append([subset or "(all)", side, str(tokens), f"{away:.4f}"])
    note = "distance: half the L1 distance of this group's shares from those of all pairs, mean over layers."
    return Table("Subsets and sides", ["subset", "side", "tokens", "distance"], rows, note)


def _total_variation(first_LN: Tensor, second_LN: Tensor) -> float:
    return float((first_LN - second_LN).abs().sum(1).mean() / 2)

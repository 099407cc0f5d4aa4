"""Stage route: one pass of preference pairs through a MoE, counting what its gates do.

Shapes: L layers with experts, N routed experts.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge import plotting, runtime
from moemerge.artifacts import Draft, stage
from moemerge.checkpoint import local_folder
from moemerge.data import Encoded, EncodedPair, encode_pairs, read_pairs
from moemerge.families.dense import require_moe
from moemerge.moe import MoeSettings, moe_layers
from moemerge.probes.base import Table
from moemerge.provenance import model_fingerprint
from moemerge.recipe import Route
from moemerge.routing import Group, RoutingStatistics
from moemerge.scoring import load_reward_model, load_tokenizer, score

log = logging.getLogger(__name__)


@stage("route", Route)
def route(options: Route, draft: Draft) -> None:
    """Write routing statistics by subset and side: statistics.safetensors, routing.md, gate_mass.png.

    Padding is never counted; batches change nothing beyond rounding. Raises CheckpointError if the model is
    no MoE, DataError for unusable pairs.
    """
    device = runtime.use(options)
    model = load_reward_model(str(local_folder(options.model)), device)
    require_moe(model.config.model_type, options.model)
    tokenizer = load_tokenizer(options.model)
    pairs, report = read_pairs(options.pairs, options)
    encoded = encode_pairs(tokenizer, pairs[: options.max_pairs], options, report)
    statistics = collect(model, tokenizer, encoded, options.batch_tokens)
    statistics.meta["model"] = model_fingerprint(local_folder(options.model))
    statistics.save(draft.folder)
    _draw(statistics, draft)
    (draft.folder / "routing.md").write_text(_report(statistics), encoding="utf-8")
    draft.results |= {"pairs": len(encoded), "rows": report.summary(), **_summary(statistics)}


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
    for (subset, side), texts in _by_group(pairs).items():
        with statistics.observe(layers, subset, side):
            score(model, tokenizer, texts, batch_tokens, progress=f"route {subset} {side}".replace("  ", " "))
    return statistics


def _by_group(pairs: Sequence[EncodedPair]) -> dict[Group, list[Encoded]]:
    groups: dict[Group, list[Encoded]] = defaultdict(list)
    for pair in pairs:
        groups[pair.pair.subset, "chosen"].append(pair.chosen)
        groups[pair.pair.subset, "rejected"].append(pair.rejected)
    return groups


def _summary(statistics: RoutingStatistics) -> dict[str, Any]:
    """What is worth telling per layer: entropy in nats, the largest share, experts that nobody selected."""
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


def _report(statistics: RoutingStatistics) -> str:
    tables = [_layer_table(statistics), _group_table(statistics)]
    parts = ["# Routing\n", *(table.markdown() for table in tables), "![gate mass](gate_mass.png)\n"]
    return "\n".join(parts)


def _layer_table(statistics: RoutingStatistics) -> Table:
    experts = [f"expert {i}" for i in range(statistics.num_experts)]
    columns = [statistics.shared_mass_L(), statistics.entropy_L(), *statistics.gate_mass_LN().T]
    rows = zip(statistics.layers, *(column.tolist() for column in columns), strict=True)
    return Table(
        "Gate mass per layer",
        ["layer", "shared", "entropy", *experts],
        [[str(number), *(f"{value:.4f}" for value in values)] for number, *values in rows],
        "shared: mean gate weight of the shared expert. entropy: of the routing probabilities, in nats. "
        "experts: shares of the routed gate mass.",
    )


def _group_table(statistics: RoutingStatistics) -> Table:
    """How far each subset and side departs from the whole: half the L1 distance, mean over layers."""
    whole_LN, rows = statistics.gate_mass_LN(), []
    for subset, side in sorted(statistics.groups):
        mine_LN = statistics.gate_mass_LN(subset, side)
        tokens = int(statistics.total(subset, side).tokens_L[0])
        away = _total_variation(mine_LN, whole_LN)
        rows.append([subset.replace("|", "\\|") or "(all)", side, str(tokens), f"{away:.4f}"])
    note = "distance: half the L1 distance of this group's shares from those of all pairs, mean over layers."
    return Table("Subsets and sides", ["subset", "side", "tokens", "distance"], rows, note)


def _total_variation(one_LN: Tensor, other_LN: Tensor) -> float:
    return float((one_LN - other_LN).abs().sum(1).mean() / 2)

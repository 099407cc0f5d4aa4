"""Routing statistics of a MoE: sums over tokens, per layer and expert, by subset and side of the pair.

Shapes: G groups (subset, side), L layers with experts, N routed experts, K of them per token, T tokens (in
gate_mass: texts).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.errors import CheckpointError, DataError
from moemerge.moe import Gating, MoELayer, MoeSettings, moe_layers
from moemerge.provenance import package_version
from moemerge.scoring import batches, score
from moemerge.tokenise import Encoded
from moemerge.weight_files import order_metadata

FORMAT = "moemerge routing statistics 1"
FILE = "statistics.safetensors"
SIDES = ("chosen", "rejected")
MAX_SUMS = 100_000_000  # numbers per group
RESERVED = ("format", "layers", "groups", "num_experts", "num_experts_per_tok")
Group = tuple[str, str]


@dataclass
class Sums:
    """Sums over the real tokens of one group, float64.

    selections_LN: how often an expert was selected. gate_LN: its gate weights g. probability_LN: its
    probabilities s, selected or not. shared_L: the shared expert's gate weights. entropy_L: entropy of s in
    nats. tokens_L: tokens. together_LNN: tokens for which both experts were selected.
    """

    selections_LN: Tensor
    gate_LN: Tensor
    probability_LN: Tensor
    shared_L: Tensor
    entropy_L: Tensor
    tokens_L: Tensor
    together_LNN: Tensor

    @classmethod
    def zeros(cls, layers: int, experts: int) -> Sums:
        """Sums over no tokens."""
        L, N = layers, experts
        shapes = ((L, N), (L, N), (L, N), (L,), (L,), (L,), (L, N, N))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def __add__(self, other: Sums) -> Sums:
        return Sums(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass
class RoutingStatistics:
    """Sums by (subset, side), side being chosen or rejected; statistics of two passes add up by `merge`.

    `layers` are transformer layer numbers, rising. `meta` holds texts such as model (its fingerprint).
    """

    layers: list[int]
    num_experts: int
    num_experts_per_tok: int
    groups: dict[Group, Sums] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def observe(self, moe_layers: dict[int, MoELayer], subset: str, side: str) -> Iterator[None]:
        """While open, every forward pass through `moe_layers` is added to the group (subset, side)."""
        sums = self.groups.setdefault((subset, side), Sums.zeros(len(self.layers), self.num_experts))
        try:
            for row, number in enumerate(self.layers):
                moe_layers[number].observer = _observer(sums, row)
            yield
        finally:
            for number in self.layers:
                moe_layers[number].observer = None

    def merge(self, other: RoutingStatistics) -> RoutingStatistics:
        """Statistics over the tokens of both. Raises CheckpointError if they are of different models."""
        mine, theirs = _shape(self), _shape(other)
        if mine != theirs or self.meta.get("model") != other.meta.get("model"):
            raise CheckpointError(
                "routing statistics of different models cannot be added",
                given=f"{mine} {self.meta.get('model')} and {theirs} {other.meta.get('model')}",
                expected="statistics of one model",
                fix="route the same MoE in every process",
            )
        groups = dict(self.groups)
        for group, sums in other.groups.items():
            groups[group] = groups[group] + sums if group in groups else sums
        return RoutingStatistics(*mine, groups, {**other.meta, **self.meta})

    def total(self, subset: str | None = None, side: str | None = None) -> Sums:
        """Sums over all groups of this subset and side (None: any). Raises DataError without tokens."""
        total = Sums.zeros(len(self.layers), self.num_experts)
        for (group_subset, group_side), sums in self.groups.items():
            if subset in (None, group_subset) and side in (None, group_side):
                total = total + sums
        if bool((total.tokens_L > 0).all()):
            return total
        raise DataError(
            "no routed tokens to count",
            given=f"subset {subset!r}, side {side!r}",
            expected=f"one of: {', '.join(map(str, self.groups)) or 'nothing was routed'}",
            fix="choose a group that was routed, or route more pairs",
        )

    def gate_mass_LN(self, subset: str | None = None, side: str | None = None) -> Tensor:
        """Share of each expert in the layer's routed gate mass; rows sum to one, float64."""
        gate_LN = self.total(subset, side).gate_LN
        return gate_LN / gate_LN.sum(1, keepdim=True)

    def selection_share_LN(self, subset: str | None = None, side: str | None = None) -> Tensor:
        """Share of the tokens that selected each expert; rows sum to K."""
        total = self.total(subset, side)
        return total.selections_LN / total.tokens_L[:, None]

    def shared_mass_L(self, subset: str | None = None, side: str | None = None) -> Tensor:
        """Mean gate weight of the shared expert per layer, in [0, 1], float64."""
        total = self.total(subset, side)
        return (total.shared_L / total.tokens_L).clamp(0, 1)

    def entropy_L(self, subset: str | None = None, side: str | None = None) -> Tensor:
        """Mean entropy of routing per layer in nats; ln N if the router has no preference."""
        total = self.total(subset, side)
        return total.entropy_L / total.tokens_L

    def save(self, folder: str | Path) -> Path:
        """Write statistics.safetensors: all sums, exact, with a header a person can read."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": FORMAT,
            "layers": json.dumps(self.layers),
            "num_experts": str(self.num_experts),
            "num_experts_per_tok": str(self.num_experts_per_tok),
            "groups": json.dumps(list(self.groups), ensure_ascii=False),
            "version": package_version(),
        }
        names = vars(Sums.zeros(1, 1))
        tensors = {n: torch.stack([vars(s)[n] for s in self.groups.values()]) for n in names if self.groups}
        save_file(tensors, path, metadata={**self.meta, **header})
        order_metadata(path)
        return path

    @classmethod
    def load(cls, source: str | Path) -> RoutingStatistics:
        """Read what `save` wrote, from its folder or file. Raises CheckpointError."""
        path = Path(source) / FILE if Path(source).is_dir() else Path(source)
        try:
            with safe_open(path, "pt") as handle:
                header = dict(handle.metadata() or {})
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}
            if header.get("format") == FORMAT:
                return _unpack(header, tensors)
            given = f"format {header.get('format')!r}"
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
            given = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"routing statistics cannot be read: {path}",
            given=given,
            expected=f"a file or folder with {FILE}, {FORMAT}",
            fix="give the folder that route wrote",
        )


def _shape(statistics: RoutingStatistics) -> tuple[list[int], int, int]:
    return statistics.layers, statistics.num_experts, statistics.num_experts_per_tok


def _observer(sums: Sums, row: int) -> Callable[[Gating], None]:
    """A callback that adds one layer's gating to row number `row` of `sums`; padding is left out."""

    def add(gating: Gating) -> None:
        real_T = gating.mask_T
        s_TN = gating.probabilities_TN[real_T].double()
        index_TK, weights_TK = gating.index_TK[real_T], gating.weights_TK[real_T].double()
        selected_TN = torch.zeros_like(s_TN).scatter_(1, index_TK, 1.0)
        sums.selections_LN[row] += selected_TN.sum(0).cpu()
        sums.gate_LN[row] += torch.zeros_like(s_TN).scatter_(1, index_TK, weights_TK).sum(0).cpu()
        sums.probability_LN[row] += s_TN.sum(0).cpu()
        sums.shared_L[row] += gating.shared_T[real_T].double().sum().cpu()
        sums.entropy_L[row] += torch.special.entr(s_TN).sum().cpu()
        sums.tokens_L[row] += len(s_TN)
        sums.together_LNN[row] += (selected_TN.T @ selected_TN).cpu()

    return add


def _unpack(header: dict[str, str], tensors: dict[str, Tensor]) -> RoutingStatistics:
    groups = [(str(subset), str(side)) for subset, side in json.loads(header["groups"])]
    layers, experts = json.loads(header["layers"]), int(header["num_experts"])
    size = len(layers) * experts * experts
    if experts < 1 or not 0 < size <= MAX_SUMS or sorted({*map(int, layers)}) != layers:
        raise ValueError(f"layers {layers} of {experts} experts"[:200])
    shapes = {name: value.shape for name, value in vars(Sums.zeros(len(layers), experts)).items()}
    for name, shape in shapes.items() if groups else ():
        found = tensors[name]
        sound = found.shape == (len(groups), *shape) and found.dtype == torch.float64
        least = -math.inf if name == "entropy_L" else 0.0  # rounding may bring an entropy below 0
        if not sound or not bool(((found >= least) & found.isfinite()).all()):
            raise ValueError(f"tensor {name}: {found.dtype} {list(found.shape)}, below 0 or not finite")
    sums = {group: Sums(**{n: tensors[n][g].clone() for n in shapes}) for g, group in enumerate(groups)}
    meta = {key: text for key, text in header.items() if key not in RESERVED}
    return RoutingStatistics(layers, experts, int(header["num_experts_per_tok"]), sums, meta)


def gate_mass(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Encoded], batch_tokens: int
) -> tuple[Tensor, Tensor]:
    """Scores of a MoE, [T] float32, and its routed gate weights summed over each text's tokens, [T, L, N]."""
    layers = moe_layers(model)
    scores_T = torch.empty(len(texts))
    experts = MoeSettings.read(model.config.moemerge).num_routed_experts
    mass_TLN = torch.zeros(len(texts), len(layers), experts, dtype=torch.float64)
    try:
        for rows in batches([len(text.ids) for text in texts], batch_tokens):
            for place, layer in enumerate(layers.values()):
                layer.observer = _summing(mass_TLN, rows, place)
            # These rows are one batch, longest first: score takes them as they are.
            scores_T[rows] = score(model, tokenizer, [texts[row] for row in rows], batch_tokens)
    finally:
        for layer in layers.values():
            layer.observer = None
    return scores_T, mass_TLN


def _summing(mass_TLN: Tensor, rows: list[int], place: int) -> Callable[[Gating], None]:
    """An observer that writes each sequence's gate weights of one layer, padding left out, to its row."""

    def add(gating: Gating) -> None:
        weights_TK = gating.weights_TK.double() * gating.mask_T[:, None]
        gate_TN = torch.zeros_like(gating.probabilities_TN, dtype=torch.float64)
        gate_TN.scatter_(1, gating.index_TK, weights_TK)
        mass_TLN[rows, place] = gate_TN.unflatten(0, (len(rows), -1)).sum(1).cpu()

    return add

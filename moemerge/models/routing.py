"""Routing statistics of a MoE: sums over tokens, per layer and expert, by subset and side of the pair.

Shapes: G groups (subset, side), L layers with experts, N routed experts, K of them per token, B texts of a
batch, T tokens (in gate_mass: texts).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.artifacts.environment import package_version
from moemerge.artifacts.weight_files import order_metadata
from moemerge.data.tokenise import Encoded
from moemerge.errors import CheckpointError, DataError
from moemerge.models import processes
from moemerge.models.moe import Gating, MoELayer, moe_layers
from moemerge.models.moe_settings import MoeSettings
from moemerge.models.scoring import OnBatch, score

FORMAT = "moemerge routing statistics 1"
FILE = "statistics.safetensors"
SIDES = ("chosen", "rejected")
MAX_SUMS = 100_000_000  # numbers per group
RESERVED = ("format", "layers", "groups", "num_experts", "num_experts_per_tok")
Group: TypeAlias = tuple[str, str]
ObserverOf: TypeAlias = Callable[[int, list[int]], Callable[[Gating], None]]


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
    def zeros(cls, layers: int, experts: int, *groups: int) -> Sums:
        """Sums over no tokens; with `groups`, that many of each along a first dimension."""
        L, N = layers, experts
        shapes = ((L, N), (L, N), (L, N), (L,), (L,), (L,), (L, N, N))
        return cls(*(torch.zeros((*groups, *shape), dtype=torch.float64) for shape in shapes))

    def __getitem__(self, group: int) -> Sums:
        return Sums(**{name: value[group] for name, value in vars(self).items()})

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
    def observe(self, layers_by_number: dict[int, MoELayer], groups: Sequence[Group]) -> Iterator[OnBatch]:
        """While open, forward passes through these MoE layers are counted; added to `self.groups` at the end.

        `groups` has the (subset, side) of every text. What it gives must be called with the rows of each
        batch, indices into `groups`, before that batch runs: `score` does so with its `on_batch`. Several
        processes add up what each has seen.
        """
        names = list(dict.fromkeys(groups))
        group_of_text = torch.tensor([names.index(group) for group in groups])
        sums = Sums.zeros(len(self.layers), self.num_experts, len(names))
        layers = [layers_by_number[number] for number in self.layers]
        with _observing(
            layers, lambda layer, rows: partial(_add, sums, layer, group_of_text[rows])
        ) as on_batch:
            yield on_batch
        sums = Sums(**{name: processes.summed(value) for name, value in vars(sums).items()})
        for number, group in enumerate(names):
            before = self.groups.get(group, Sums.zeros(len(self.layers), self.num_experts))
            self.groups[group] = before + sums[number]

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

    def shared_mass_L(self, subset: str | None = None, side: str | None = None) -> Tensor:
        """Mean gate weight of the shared expert per layer, in [0, 1], float64."""
        total = self.total(subset, side)
        return (total.shared_L / total.tokens_L).clamp(0, 1)

    def entropy_L(self, subset: str | None = None, side: str | None = None) -> Tensor:
        """Mean entropy of routing per layer in nats; ln N if the router has no preference."""
        total = self.total(subset, side)
        return total.entropy_L / total.tokens_L

    def gate_mass(self, subset: str | None = None, side: str | None = None) -> Tensor:
        """gate_mass_LN: a row per layer, a column per routed expert."""
        return self.gate_mass_LN(subset, side)

    def shared_mass(self, subset: str | None = None, side: str | None = None) -> Tensor:
        """shared_mass_L: a number per layer."""
        return self.shared_mass_L(subset, side)

    def entropy(self, subset: str | None = None, side: str | None = None) -> Tensor:
        """entropy_L: a number per layer."""
        return self.entropy_L(subset, side)

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
            reason = f"format {header.get('format')!r}"
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"routing statistics cannot be read: {path}",
            given=reason,
            expected=f"a file or folder with {FILE}, {FORMAT}",
            fix="give the folder that route wrote",
        )


def _shape(statistics: RoutingStatistics) -> tuple[list[int], int, int]:
    return statistics.layers, statistics.num_experts, statistics.num_experts_per_tok


@contextmanager
def _observing(layers: Sequence[MoELayer], observer_of: ObserverOf) -> Iterator[OnBatch]:
    """While open, `observer_of(number of the layer in `layers`, rows)` sees each batch in every layer.

    What it gives must be called with the rows of a batch before that batch runs; with none, nothing sees it.
    """

    def on_batch(rows: list[int]) -> None:
        for number, layer in enumerate(layers):
            layer.observer = observer_of(number, rows) if rows else None

    try:
        yield on_batch
    finally:
        for layer in layers:
            layer.observer = None


def _add(sums: Sums, layer: int, group_B: Tensor, gating: Gating) -> None:
    """Add one layer's gating of a batch to the groups of its texts; `layer` is its place in `sums`."""
    by_text = partial(_by_text, mask_T=gating.mask_T, texts=len(group_B))
    s_BTN = by_text(gating.probabilities_TN)
    selected_BTN = by_text(_spread(gating, torch.ones_like(gating.weights_TK)))
    batch = Sums(  # of each text in this one layer: B stands where L does
        selections_LN=selected_BTN.sum(1),
        gate_LN=by_text(_spread(gating, gating.weights_TK)).sum(1),
        probability_LN=s_BTN.sum(1),
        shared_L=by_text(gating.shared_T).sum(1),
        entropy_L=torch.special.entr(s_BTN).sum((1, 2)),
        tokens_L=by_text(gating.mask_T).sum(1),
        together_LNN=selected_BTN.mT @ selected_BTN,
    )
    for name, value_B in vars(batch).items():
        vars(sums)[name][:, layer].index_add_(0, group_B, value_B.cpu())


def _spread(gating: Gating, values_TK: Tensor) -> Tensor:
    """Values of the selected experts among all, [T, N] float64; 0 for the others."""
    zeros_TN = torch.zeros_like(gating.probabilities_TN, dtype=torch.float64)
    return zeros_TN.scatter_(1, gating.index_TK, values_TK.double())


def _by_text(values_T: Tensor, mask_T: Tensor, texts: int) -> Tensor:
    """Values of flattened tokens by text, [T, ...] -> [B, T, ...] float64; 0 for padding."""
    padding_T = ~mask_T.view(-1, *[1] * (values_T.dim() - 1))
    return values_T.double().masked_fill(padding_T, 0).unflatten(0, (texts, -1))


def _unpack(header: dict[str, str], tensors: dict[str, Tensor]) -> RoutingStatistics:
    groups = [(str(subset), str(side)) for subset, side in json.loads(header["groups"])]
    layers, experts = json.loads(header["layers"]), int(header["num_experts"])
    size = len(layers) * experts * experts
    if experts < 1 or not 0 < size <= MAX_SUMS or sorted({*map(int, layers)}) != layers:
        raise ValueError(f"layers {layers} of {experts} experts"[:200])
    shapes = {name: value.shape for name, value in vars(Sums.zeros(len(layers), experts)).items()}
    for name, shape in shapes.items() if groups else ():
        value = tensors[name]
        sound = value.shape == (len(groups), *shape) and value.dtype == torch.float64
        least = -math.inf if name == "entropy_L" else 0.0  # rounding may bring an entropy below 0
        if not sound or not bool(((value >= least) & value.isfinite()).all()):
            raise ValueError(f"tensor {name}: {value.dtype} {list(value.shape)}, below 0 or not finite")
    sums = {group: Sums(**{n: tensors[n][g].clone() for n in shapes}) for g, group in enumerate(groups)}
    meta = {key: text for key, text in header.items() if key not in RESERVED}
    return RoutingStatistics(layers, experts, int(header["num_experts_per_tok"]), sums, meta)


def gate_mass(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Encoded], batch_tokens: int
) -> tuple[Tensor, Tensor]:
    """Scores of a MoE, [T] float32, and its routed gate weights summed over each text's tokens, [T, L, N]."""
    layers = list(moe_layers(model).values())
    experts = MoeSettings.read(model.config.moemerge).num_routed_experts
    mass_TLN = torch.zeros(len(texts), len(layers), experts, dtype=torch.float64)
    with _observing(layers, lambda layer, rows: partial(_write_mass, mass_TLN[:, layer], rows)) as on_batch:
        scores_T = score(model, tokenizer, texts, batch_tokens, on_batch=on_batch)
    return scores_T, processes.summed(mass_TLN)  # 0 where another process has run the text


def _write_mass(mass_TN: Tensor, rows: list[int], gating: Gating) -> None:
    """Write the gate weights of a batch's texts in one layer, summed over tokens, to their rows."""
    gate_BTN = _by_text(_spread(gating, gating.weights_TK), gating.mask_T, len(rows))
    mass_TN[rows] = gate_BTN.sum(1).cpu()

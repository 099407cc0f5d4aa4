"""Merge coefficients: what they are, how they are kept, and what a way to find them is given and gives.

Shapes: L blocks (of tensors that share a row of coefficients; by default a layer each), N routed experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moemerge.artifacts import write_json
from moemerge.blocks import BLOCK, layer_of
from moemerge.errors import CheckpointError, OptionError
from moemerge.fit_settings import FitSettings
from moemerge.provenance import package_version
from moemerge.weight_files import order_metadata

if TYPE_CHECKING:
    from moemerge.routing import RoutingStatistics

FORMAT = "moemerge coefficients 2"
FILE = "coefficients.safetensors"
TABLE = "coefficients.json"
TOLERANCE = 1e-9
RESERVED = ("format", "blocks")


@dataclass(frozen=True)
class Coefficients:
    """Weights of a routing-normalised average, one row per block.

    W_l = shared_L[l] * W_shared + (1 - shared_L[l]) * sum_i alpha_LN[l, i] W_i for the tensors of block
    blocks[l]: `layers.3` (a transformer layer), `layers.3.mlp.up_proj`, `outside` or `head` (moemerge.blocks
    says what these are). Both tensors are float64, rows of alpha_LN are >= 0 and sum to one, shared_L is in
    [0, 1] (0 where there is no shared expert). `meta` holds texts such as method and model (fingerprint of
    what they were made for). Raises CheckpointError when any of this does not hold.
    """

    blocks: list[str]
    alpha_LN: Tensor
    shared_L: Tensor
    meta: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise CheckpointError(
                "coefficients cannot be used",
                given=fault,
                expected="per block, named once, float64 alpha >= 0 with sum 1 and float64 shared in [0, 1]",
                fix="fit them again, or normalise each row if they were made by hand",
            )

    @classmethod
    def of_layers(
        cls, layers: Sequence[int], alpha_LN: Tensor, shared_L: Tensor, meta: dict[str, str] | None = None
    ) -> Coefficients:
        """Coefficients with a row per transformer layer, by number."""
        return cls([f"layers.{number}" for number in layers], alpha_LN, shared_L, meta or {})

    @property
    def num_experts(self) -> int:
        """Number of routed experts, or of models besides the base, N."""
        return self.alpha_LN.shape[1]

    def save(self, folder: str | Path) -> Path:
        """Write coefficients.safetensors (exact, with a readable header) and coefficients.json (to read)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "blocks": json.dumps(self.blocks), "version": package_version()}
        tensors = {"alpha_LN": self.alpha_LN.contiguous(), "shared_L": self.shared_L.contiguous()}
        save_file(tensors, folder / FILE, metadata={**header, **self.meta})
        order_metadata(folder / FILE)
        table = [{"block": name, "shared": shared, "alpha": alpha} for name, shared, alpha in self.table()]
        write_json(folder / TABLE, {**header, **self.meta, "blocks": table})
        return folder / FILE

    def table(self) -> Iterator[tuple[str, float, list[float]]]:
        """Block, shared weight and alpha of each row."""
        return zip(self.blocks, self.shared_L.tolist(), self.alpha_LN.tolist(), strict=True)

    def weights(self, row: int, has_shared: bool) -> list[float]:
        """The weight of each member in row number `row`, the shared one first if there is one; sum one."""
        shared = float(self.shared_L[row])
        routed: list[float] = ((1 - shared) * self.alpha_LN[row]).tolist()
        return [shared, *routed] if has_shared else routed

    @classmethod
    def load(cls, source: str | Path) -> Coefficients:
        """Read what `save` wrote, from its folder or file. Raises CheckpointError."""
        path = Path(source) / FILE if Path(source).is_dir() else Path(source)
        try:
            with safe_open(path, "pt") as handle:
                header = dict(handle.metadata() or {})
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}
            if header.get("format") == FORMAT and set(tensors) == {"alpha_LN", "shared_L"}:
                meta = {key: text for key, text in header.items() if key not in RESERVED}
                return cls(json.loads(header["blocks"]), meta=meta, **tensors)
            given = f"format {header.get('format')!r}, tensors {', '.join(sorted(tensors)) or 'none'}"
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
            given = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"coefficients cannot be read: {path}",
            given=given,
            expected=f"a file or folder with {FILE}, {FORMAT}",
            fix="give the folder that fit wrote",
        )


def _fault(c: Coefficients) -> str | None:
    alpha_LN, shared_L = c.alpha_LN, c.shared_L
    if len(set(c.blocks)) < len(c.blocks) or not all(BLOCK.fullmatch(block) for block in c.blocks):
        return f"blocks {list(c.blocks)}"
    if not c.blocks or alpha_LN.ndim != 2 or not alpha_LN.shape[1]:
        return f"{len(c.blocks)} blocks, alpha of shape {list(alpha_LN.shape)}"
    if len(alpha_LN) != len(c.blocks) or list(shared_L.shape) != [len(c.blocks)]:
        shapes = f"alpha {list(alpha_LN.shape)}, shared {list(shared_L.shape)}"
        return f"{len(c.blocks)} blocks, but {shapes}"
    if {alpha_LN.dtype, shared_L.dtype} != {torch.float64}:
        return f"dtypes {alpha_LN.dtype}, {shared_L.dtype}"
    if not bool(alpha_LN.isfinite().all() and shared_L.isfinite().all()):
        return "values that are not finite"
    if bool((alpha_LN < 0).any()) or float((alpha_LN.sum(1) - 1).abs().max()) > TOLERANCE:
        return f"smallest alpha {float(alpha_LN.min())}, sums {alpha_LN.sum(1).tolist()}"
    if bool((shared_L < 0).any() or (shared_L > 1).any()):
        return f"shared {shared_L.tolist()}"
    return None


@dataclass(frozen=True)
class MergeGradient:
    """Mean loss of some pairs and its derivatives.

    `alpha_LN` may be off by one constant per row, which a softmax over the row takes out again.
    """

    loss: float
    alpha_LN: Tensor
    shared_L: Tensor


@dataclass(frozen=True)
class Measured:
    """What the merged model makes of P pairs, float64 on CPU.

    margins_P: score(chosen) - score(rejected). losses_P: the loss that is fitted.
    """

    margins_P: Tensor
    losses_P: Tensor


Split = Literal["train", "held_out"]


class Objective(Protocol):
    """The merged model's loss on preference pairs, as a function of the coefficients."""

    @property
    def num_train(self) -> int:
        """Number of training pairs."""
        ...

    def prompts(self, split: Split) -> list[int]:
        """For each pair of the split a number that pairs of the same prompt share."""
        ...

    def gradient(
        self, alpha_LN: Tensor, shared_L: Tensor, rows: Sequence[int], weights: Tensor | None = None
    ) -> MergeGradient:
        """Loss and gradient over the training pairs number `rows`, each times its weight (default: 1)."""
        ...

    def measure(self, alpha_LN: Tensor, shared_L: Tensor, split: Split) -> Measured:
        """Margin and loss of every pair of the split."""
        ...

    def folds(self, number: int, seed: int) -> list[Objective]:
        """Objectives that hold out each of `number` parts of the training pairs in turn."""
        ...

    def hardened(self, alpha_LN: Tensor, shared_L: Tensor) -> Objective:
        """The objective with further training pairs: a candidate that the merged model overrates, each."""
        ...


@dataclass(frozen=True)
class FitProblem:
    """What a method may use. `statistics` are there only after routing, `objective` only if pairs were given.

    `objective` and `moments` are functions, so that only a method that needs the merged model pays for
    loading it. `start` are given coefficients to start from. `moments` gives the quadratic form of
    least_squares for each block, [L, N + 1, N + 1].
    """

    blocks: list[str]
    num_experts: int
    has_shared: bool
    settings: FitSettings
    seed: int = 0
    statistics: RoutingStatistics | None = None
    objective: Callable[[], Objective] | None = None
    start: FitOutcome | None = None
    moments: Callable[[FitOutcome], Tensor] | None = None

    def routing(self) -> RoutingStatistics:
        """The statistics; OptionError if there are none."""
        if self.statistics is not None:
            return self.statistics
        raise OptionError(
            "routing statistics are needed",
            given="routing: nothing",
            expected="the folder that route wrote for this MoE (for usage, and for shared_weight match)",
            fix="run route on the MoE and give its output as routing, or choose uniform and a number",
        )

    def layer_rows(self, layers: Sequence[int]) -> list[int]:
        """For each block the place of its transformer layer among `layers`."""
        return [layers.index(layer_of(block)) for block in self.blocks]

    def pooled(self, values: Tensor) -> Tensor:
        """`values`, a row per block; where the settings want one row for all blocks, their mean in each."""
        if self.settings.granularity != "global":
            return values
        return values.mean(0, keepdim=True).expand_as(values).clone()

    def data(self) -> Objective:
        """The objective; OptionError if there is none."""
        if self.objective is not None:
            return self.objective()
        raise no_pairs()

    def squares(self, start: FitOutcome) -> Tensor:
        """What `moments` gives at `start`; OptionError without pairs."""
        if self.moments is not None:
            return self.moments(start)
        raise no_pairs()


def no_pairs() -> OptionError:
    """The error of a method that has no data."""
    return OptionError(
        "this method needs preference pairs",
        given="pairs: nothing",
        expected="a file of preference pairs",
        fix="give pairs, or choose method uniform or usage",
    )


@dataclass(frozen=True)
class FitOutcome:
    """What a method found. `report` holds JSON values; its `verdict` says in words what came of it."""

    alpha_LN: Tensor
    shared_L: Tensor
    report: dict[str, Any] = field(default_factory=dict)


Method = Callable[[FitProblem], FitOutcome]

"""Merge coefficients: what they are, and their file.

Shapes: L blocks (of tensors that share a row of coefficients; by default a layer each), N routed experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moemerge.artifacts.environment import package_version
from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.weight_files import order_metadata
from moemerge.errors import CheckpointError
from moemerge.merging.average import changes, sums_to_one
from moemerge.merging.blocks import BLOCK_NAME
from moemerge.options.base import Coordinates

FORMAT = "moemerge coefficients 2"
FILE = "coefficients.safetensors"
TABLE = "coefficients.json"
TOLERANCE = 1e-9
RESERVED = ("format", "blocks", "coordinates", "scales")


@dataclass(frozen=True)
class Coefficients:
    """Weights of a routing-normalised average or of a sum of changes, one row per block.

    W_l = shared_L[l] * W_shared + (1 - shared_L[l]) * sum_i alpha_LN[l, i] W_i for the tensors of block
    blocks[l]: `layers.3` (a transformer layer), `layers.3.mlp.up_proj`, `outside` or `head` (see blocks.py).
    Both tensors are float64 and rows of alpha_LN sum to one. `coordinates` average: alpha_LN >= 0, shared_L
    in [0, 1] (0 where there is no shared expert). sum: any finite values; W_l is then W_shared +
    sum_i c_i (W_i - W_shared) with the c of `changes_LN`. `scales` are what members' reward heads are divided
    by before all that, if anything. `meta` holds texts such as method and model (fingerprint of what they
    were made for). Raises CheckpointError when any of this does not hold.
    """

    blocks: list[str]
    alpha_LN: Tensor
    shared_L: Tensor
    meta: dict[str, str] = field(default_factory=dict)
    coordinates: Coordinates = "average"
    scales: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise CheckpointError(
                "coefficients cannot be used",
                given=fault,
                expected="per block, named once, float64 alpha with sum 1 and float64 shared; in an average, "
                "alpha >= 0 and shared in [0, 1]; scales above 0, one per member, if there are any",
                fix="fit them again, or normalise each row if they were made by hand",
            )

    @classmethod
    def of_layers(
        cls, layers: Sequence[int], alpha: Tensor, shared: Tensor, meta: dict[str, str] | None = None
    ) -> Coefficients:
        """Coefficients with a row per transformer layer, by number: alpha [L, N], shared [L]."""
        return cls([f"layers.{number}" for number in layers], alpha, shared, meta or {})

    @property
    def num_experts(self) -> int:
        """Number of routed experts, or of models besides the base, N."""
        return self.alpha_LN.shape[1]

    @property
    def alpha(self) -> Tensor:
        """alpha_LN: a row per block, a column per routed expert, or per model besides the base."""
        return self.alpha_LN

    @property
    def shared(self) -> Tensor:
        """shared_L: the shared expert's or the base's weight in each block."""
        return self.shared_L

    @property
    def changes(self) -> Tensor:
        """changes_LN: the c of a sum, alike."""
        return self.changes_LN

    @property
    def changes_LN(self) -> Tensor:
        """c of W = W_shared + sum_i c_i (W_i - W_shared): (1 - shared) alpha."""
        return changes(self.alpha_LN, self.shared_L)

    @property
    def formula(self) -> dict[str, str]:
        """What a file says of how its numbers are meant."""
        scales = {} if self.scales is None else {"scales": json.dumps(self.scales)}
        return {"format": FORMAT, "coordinates": self.coordinates, **scales}

    def save(self, folder: str | Path) -> Path:
        """Write coefficients.safetensors (exact, with a readable header) and coefficients.json (to read)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = {**self.formula, "blocks": json.dumps(self.blocks), "version": package_version()}
        tensors = {"alpha_LN": self.alpha_LN.contiguous(), "shared_L": self.shared_L.contiguous()}
        save_file(tensors, folder / FILE, metadata={**header, **self.meta})
        # safetensors writes the header's texts in an order that changes from run to run.
        order_metadata(folder / FILE)
        table = [{"block": name, "shared": shared, "alpha": alpha} for name, shared, alpha in self.table()]
        write_json(folder / TABLE, {**header, **self.meta, "blocks": table})
        return folder / FILE

    def table(self) -> Iterator[tuple[str, float, list[float]]]:
        """Block, shared weight and members' weights of each row: alpha, or of a sum the c of changes_LN."""
        values_LN = self.alpha_LN if self.coordinates == "average" else self.changes_LN
        return zip(self.blocks, self.shared_L.tolist(), values_LN.tolist(), strict=True)

    def weights(self, row: int, has_shared: bool) -> list[float]:
        """The weight of each member in row number `row`, the shared one first if there is one; sum one."""
        shared = float(self.shared_L[row])
        # lambda and (1 - lambda) alpha: the average as one sum over all members.
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
                return cls(**_stated(header), **tensors)
            reason = f"format {header.get('format')!r}, tensors {', '.join(sorted(tensors)) or 'none'}"
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"coefficients cannot be read: {path}",
            given=reason,
            expected=f"a file or folder with {FILE}, {FORMAT}",
            fix="give the folder that fit wrote",
        )


def _stated(header: dict[str, str]) -> dict[str, Any]:
    """What a file's header says; older files have averages of unscaled members."""
    scales = header.get("scales")
    return {
        "blocks": json.loads(header["blocks"]),
        "coordinates": header.get("coordinates", "average"),
        "scales": None if scales is None else tuple(json.loads(scales)),
        "meta": {key: text for key, text in header.items() if key not in RESERVED},
    }


def _fault(c: Coefficients) -> str | None:
    alpha_LN, shared_L = c.alpha_LN, c.shared_L
    if len(set(c.blocks)) < len(c.blocks) or not all(BLOCK_NAME.fullmatch(block) for block in c.blocks):
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
    if c.coordinates not in get_args(Coordinates):
        return f"coordinates {c.coordinates!r}"
    bounded = c.coordinates == "average"
    if (bounded and bool((alpha_LN < 0).any())) or not sums_to_one(alpha_LN, TOLERANCE):
        return f"smallest alpha {float(alpha_LN.min())}, sums {alpha_LN.sum(1).tolist()}"
    if bounded and bool((shared_L < 0).any() or (shared_L > 1).any()):
        return f"shared {shared_L.tolist()}"
    return None if c.scales is None else _bad_scales(c.scales, c.num_experts)


def _bad_scales(scales: tuple[float, ...], count: int) -> str | None:
    numbers = len(scales) == count and all(type(scale) in (int, float) for scale in scales)
    sound = numbers and all(0 < scale < math.inf for scale in scales)
    return None if sound else f"scales {list(scales)}"

"""Merge coefficients: what they are, and their file.

Shapes: L blocks (of tensors that share a row of coefficients; by default a layer each), N routed experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moemerge.artifacts.environment import package_version
from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.weight_files import order_metadata
from moemerge.errors import CheckpointError
from moemerge.merging.blocks import BLOCK_NAME

FORMAT = "moemerge coefficients 2"
FILE = "coefficients.safetensors"
TABLE = "coefficients.json"
TOLERANCE = 1e-9
RESERVED = ("format", "blocks")


@dataclass(frozen=True)
class Coefficients:
    """Weights of a routing-normalised average, one row per block.

    W_l = shared_L[l] * W_shared + (1 - shared_L[l]) * sum_i alpha_LN[l, i] W_i for the tensors of block
    blocks[l]: `layers.3` (a transformer layer), `layers.3.mlp.up_proj`, `outside` or `head` (see blocks.py).
    Both tensors are float64, rows of alpha_LN are >= 0 and sum to one, shared_L is in [0, 1] (0 where there
    is no shared expert). `meta` holds texts such as method and model (fingerprint of what they were made
    for). Raises CheckpointError when any of this does not hold.
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
        # safetensors writes the header's texts in an order that changes from run to run.
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
                meta = {key: text for key, text in header.items() if key not in RESERVED}
                return cls(json.loads(header["blocks"]), meta=meta, **tensors)
            reason = f"format {header.get('format')!r}, tensors {', '.join(sorted(tensors)) or 'none'}"
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"coefficients cannot be read: {path}",
            given=reason,
            expected=f"a file or folder with {FILE}, {FORMAT}",
            fix="give the folder that fit wrote",
        )


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
    if bool((alpha_LN < 0).any()) or float((alpha_LN.sum(1) - 1).abs().max()) > TOLERANCE:
        return f"smallest alpha {float(alpha_LN.min())}, sums {alpha_LN.sum(1).tolist()}"
    if bool((shared_L < 0).any() or (shared_L > 1).any()):
        return f"shared {shared_L.tolist()}"
    return None

"""What can be merged: several copies of the same tensors, and everything that stands beside them.

A source is a MoE on disk (moe.py, native_moe.py) or a list of checkpoints (models.py). Fit, merge and export
know no more of it than this. Shapes: N weighted members (routed experts, or models), L blocks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from moemerge.artifacts.manifest import model_fingerprint
from moemerge.errors import CheckpointError
from moemerge.merging.average import routing_normalized_average
from moemerge.merging.blocks import ATTENTION, MLP, block_order, blocks_of, layer_of
from moemerge.merging.coefficients import Coefficients
from moemerge.models.checkpoint import Checkpoint, copy_side_files
from moemerge.models.folder import ModelFolder
from moemerge.models.shim import install_shim

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SHARED = "shared"


class MergedTensor(Protocol):
    """A tensor of the dense model that is merged from copies."""

    @property
    def dense(self) -> str:
        """Its name in the dense checkpoint."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape there."""
        ...


class MergeSource(ABC):
    """Members to merge tensor by tensor, read one at a time, and what the merged model keeps of one of them.

    `folder` gives config, tokenizer and all that is not merged; `config` is its config. `tensors` are merged,
    `backbone` are the names of the others. `num_members` counts the weighted members (N); `has_shared` says
    whether another stands before them, the shared expert or the base, with a weight of its own. `caveats` are
    what has to be known of the result, for its manifest and card. `scales`: what the weighted members' reward
    heads are divided by, if by anything.
    """

    folder: Path
    config: PreTrainedConfig
    tensors: Sequence[MergedTensor]
    backbone: list[str]
    num_members: int
    has_shared: bool
    caveats: Sequence[str] = ()
    scales: tuple[float, ...] | None = None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """dtype of the members' tensors."""

    @property
    @abstractmethod
    def dense_dtype(self) -> torch.dtype:
        """dtype that the merged model has unless another is asked for."""

    @property
    @abstractmethod
    def member_names(self) -> list[str]:
        """What members are called: the shared one first, if there is one, then the N others."""

    def found_in(self, member: int) -> str:
        """Where a user finds this member: for errors."""
        return f"{self.member_names[member]} of {self.folder}"

    @abstractmethod
    def matrix(self, tensor: MergedTensor, member: int) -> Tensor:
        """The copy of `tensor`, in the dense layout, that number `member` in `member_names` has."""

    def matrices(self, tensor: MergedTensor) -> Iterator[Tensor]:
        """All copies of `tensor`, in the order of `member_names`."""
        return (self.matrix(tensor, member) for member in range(len(self.member_names)))

    def stack(self, tensor: MergedTensor) -> tuple[Tensor | None, Tensor] | None:
        """The shared member's copy, if there is one, and the N others' in one [N, ...] tensor.

        Mapped and only to be read; None unless they lie so on disk in the dense layout.
        """
        return None

    @abstractmethod
    def kept(self, name: str) -> Tensor:
        """The tensor `name` of the backbone."""

    @abstractmethod
    def dense_config(self) -> PreTrainedConfig:
        """Config of the merged model, a new object."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The merged model's tokenizer, padding on the right."""

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 that changes with any weight or config of the members."""

    def identity(self) -> dict[str, str]:
        """What coefficients keep of the source they were made for: model, its fingerprint; scope; head."""
        return {"model": self.fingerprint, "scope": "mlp"}

    def references(self) -> list[Path | None]:
        """Where each of `member_names` is a reward model as it takes part; None where it is in no folder."""
        return [None] * len(self.member_names)

    def names(self) -> list[str]:
        """All tensors of the merged model, in the order of its class."""
        from moemerge.models.families.dense import skeleton

        own = {*self.backbone, *(tensor.dense for tensor in self.tensors)}
        return [name for name in skeleton(self.dense_config()).state_dict() if name in own]

    def size(self, dtype: torch.dtype, copies: int = 1) -> int:
        """Bytes of the merged model's tensors in `dtype`, with so many copies of those that are merged."""
        from moemerge.models.families.dense import skeleton

        shapes = skeleton(self.dense_config()).state_dict()
        merged = {tensor.dense for tensor in self.tensors}
        numbers = (shapes[name].numel() * (copies if name in merged else 1) for name in self.names())
        return sum(numbers) * dtype.itemsize

    def write_config(self, target: Path, dtype: torch.dtype) -> None:
        """Put the merged model's config, with `dtype`, into `target`."""
        config = self.dense_config()
        config.dtype = dtype
        config.save_pretrained(target)
        install_shim(target)

    def write_side_files(self, target: Path) -> None:
        """Put tokenizer, chat template, licence and the like into `target`."""
        copy_side_files(self.folder, target)

    def in_head(self, name: str) -> bool:
        """Whether the dense tensor `name` is the reward head's."""
        return False

    def blocks(self, per_matrix: bool = False) -> list[str]:
        """The blocks of all merged tensors, in order: a layer each, or a matrix with its bias each."""
        named = (blocks_of(tensor.dense, self.in_head(tensor.dense)) for tensor in self.tensors)
        blocks = dict.fromkeys(names[0] if per_matrix else names[-1] for names in named)
        return sorted(blocks, key=block_order)

    @cached_property
    def mlps(self) -> set[str]:
        """Dense names of the tensors of MLPs; of a MoE, all that are merged."""
        return {tensor.dense for tensor in self.tensors}

    def kind(self, name: str) -> str:
        """What kind of tensor the dense tensor `name` is: head, outside, mlp or attention."""
        block = blocks_of(name, self.in_head(name))[-1]
        if layer_of(block) is None:
            return block
        return MLP if name in self.mlps else ATTENTION

    def kinds(self, blocks: Sequence[str]) -> list[str]:
        """The kind of the tensors of each block; of a whole layer's block, that of one of them."""
        kind_of = {row: self.kind(name) for name, row in self.rows(blocks).items()}
        return [kind_of[row] for row in range(len(blocks))]

    def rows(self, blocks: Sequence[str]) -> dict[str, int]:
        """The row of each merged tensor, by its dense name, among coefficients of `blocks`.

        Raises CheckpointError if a tensor has none, or a block no tensor.
        """
        row_of = {block: row for row, block in enumerate(blocks)}
        # A tensor takes the finest of its blocks that there is: its module's row, else its layer's.
        named = {t.dense: blocks_of(t.dense, self.in_head(t.dense)) for t in self.tensors}
        rows = {name: next((row_of[b] for b in own if b in row_of), None) for name, own in named.items()}
        lost = [name for name, row in rows.items() if row is None]
        idle = [block for block, row in row_of.items() if row not in rows.values()]
        if lost or idle:
            lacking = f"no coefficients for {', '.join(lost[:3])}" if lost else ""
            reason = lacking or f"{', '.join(idle[:3])}: no tensor"
            raise foreign(reason, f"coefficients of the blocks {shortened(self.blocks())}")
        return {name: row for name, row in rows.items() if row is not None}

    def merged(self, matrices: Iterator[Tensor], coefficients: Coefficients, row: int) -> Tensor:
        """The merge of a tensor's copies, the shared member's first if there is one, by row number `row`."""
        c = coefficients
        first = next(matrices) if self.has_shared else None
        return routing_normalized_average(
            first, matrices, c.alpha_LN[row], float(c.shared_L[row]), c.coordinates
        )

    def check_fit(self, coefficients: Coefficients) -> None:
        """Raise CheckpointError unless `coefficients` belong to this very source."""
        c = coefficients
        if c.num_experts != self.num_members:
            raise foreign(f"weights for {c.num_experts} members", f"{self.num_members} members")
        self.rows(c.blocks)
        if c.coordinates == "sum" and not self.has_shared:
            raise foreign("a sum of changes", "an average: there is no shared member to change from")
        if not self.has_shared and bool(c.shared_L.any()):
            raise foreign(f"shared weights {c.shared_L.tolist()}", "zeros: there is no shared member")
        if c.scales != self.scales:
            raise foreign(f"heads divided by {c.scales}", f"heads divided by {self.scales}")
        if c.meta.get("model") not in (None, self.fingerprint):
            other = f"coefficients for a model with fingerprint {c.meta['model']}"
            raise foreign(other, f"{self.fingerprint} ({self.folder})")


class ExpertSource(MergeSource):
    """The experts of a MoE on disk, whose `weights` also hold all that is kept."""

    opened: ModelFolder
    weights: Checkpoint

    @property
    def member_names(self) -> list[str]:
        """shared, if a shared expert takes part, then expert-0 ... expert-{N-1}."""
        return [SHARED] * self.has_shared + [f"expert-{i}" for i in range(self.num_members)]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over weights and config."""
        return model_fingerprint(self.folder)

    def size(self, dtype: torch.dtype, copies: int = 1) -> int:
        """As of any source, without asking the model's class."""
        kept = sum(math.prod(self.weights.shape(name)) for name in self.backbone)
        merged = sum(math.prod(tensor.shape) for tensor in self.tensors)
        return (kept + copies * merged) * dtype.itemsize

    def kept(self, name: str) -> Tensor:
        """The tensor `name` of the backbone."""
        return self.weights.tensor(name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The MoE's own."""
        from moemerge.models.loading import load_tokenizer

        return load_tokenizer(self.opened)


def shortened(names: Sequence[str]) -> str:
    """`names` in a line, the middle left out if they are many."""
    few = names if len(names) <= 6 else [*names[:3], "...", *names[-2:]]
    return ", ".join(few)


def foreign(given: str, expected: str) -> CheckpointError:
    """The error for coefficients of something else."""
    return CheckpointError(
        "coefficients do not belong to this model",
        given=given,
        expected=expected,
        fix="fit coefficients for this model, or merge the model that they were fitted for",
    )

"""A MoE on disk as a source of merges: which tensors are experts, and which are not.

Shapes: N routed experts. Tensors are read one at a time.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from moemerge.checkpoint import Checkpoint
from moemerge.errors import CheckpointError
from moemerge.families import family_of
from moemerge.families.base import ExpertTensor
from moemerge.families.dense import dense_config, require_moe, skeleton
from moemerge.modelling import model_class, register
from moemerge.moe import MoeSettings
from moemerge.provenance import model_fingerprint
from moemerge.scoring import load_tokenizer
from moemerge.sources import MergedTensor, MergeSource

SHARED = "shared"


class MoeCheckpoint(MergeSource):
    """The folder of a MoE reward model, checked against its own config before anything is read.

    `tensors` are the dense MLP's tensors and where their copies stand; `backbone` the names of everything
    that the dense model shares with the MoE. Raises CheckpointError if the folder is not a MoE, or a tensor
    is missing, left over or of another shape.
    """

    def __init__(self, folder: str | Path) -> None:
        self.weights = Checkpoint(folder)
        self.folder = self.weights.folder
        self.config = _moe_config(self.weights)
        self.settings = MoeSettings.read(self.config.moemerge)
        self.num_members, self.has_shared = self.settings.num_routed_experts, self.settings.shared_expert
        self.tensors: list[ExpertTensor] = family_of(self.config).expert_tensors(self.config)
        self._check_tensors()
        experts = {tensor.dense for tensor in self.tensors}
        dense = skeleton(self.config).state_dict()
        self.backbone = [n for n in dense if n not in experts and n in self.weights.names]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the experts."""
        return self.weights.dtype(self.tensors[0].stacked)

    @property
    def dense_dtype(self) -> torch.dtype:
        """dtype of the dense model that the MoE was made from."""
        return cast(torch.dtype, getattr(torch, self.settings.dense_dtype))

    @property
    def member_names(self) -> list[str]:
        """shared, if there is a shared expert, then expert-0 ... expert-{N-1}."""
        return [SHARED] * self.has_shared + [f"expert-{i}" for i in range(self.num_members)]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over weights and config."""
        return model_fingerprint(self.folder)

    def dense_config(self) -> PreTrainedConfig:
        """Config of the dense model, a new object."""
        return dense_config(self.config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The MoE's own."""
        return load_tokenizer(str(self.folder))

    def kept(self, name: str) -> Tensor:
        """The tensor `name` of the backbone."""
        return self.weights.tensor(name)

    def matrix(self, tensor: MergedTensor, place: int) -> Tensor:
        """The copy that one expert has; the shared one, if there is one, is number 0."""
        assert isinstance(tensor, ExpertTensor)
        if self.has_shared and place == 0:
            return self.weights.tensor(tensor.shared)
        return self.weights.expert(tensor, place - self.has_shared)

    def _check_tensors(self) -> None:
        """The checkpoint holds exactly what the MoE class has; a tied copy may be left out."""
        with torch.device("meta"):
            model = model_class(family_of(self.config).model_type)(self.config)
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        held = set(self.weights.names)
        faults = {
            "missing": sorted(wanted.keys() - held - tied),
            "left over": sorted(held - wanted.keys()),
            "misshapen": sorted(n for n in held & wanted.keys() if self.weights.shape(n) != wanted[n]),
        }
        for kind, names in faults.items():
            if names:
                raise CheckpointError(
                    f"{self.folder} does not fit its own config",
                    given=f"{len(names)} tensor(s) {kind}: {', '.join(names[:5])}",
                    expected=f"exactly the tensors of {type(model).__name__}",
                    fix="make the folder again, or copy it again whole",
                )


def _moe_config(weights: Checkpoint) -> PreTrainedConfig:
    register()
    require_moe(str(weights.config.get("model_type")), weights.folder)
    return AutoConfig.from_pretrained(weights.folder)

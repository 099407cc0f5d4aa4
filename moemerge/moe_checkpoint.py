"""A MoE on disk as the merge sees it: which tensors are experts, which are not, and their average.

Shapes: N routed experts. Tensors are read one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from moemerge.averaging import routing_normalized_average
from moemerge.checkpoint import Checkpoint
from moemerge.coefficients.base import Coefficients
from moemerge.errors import CheckpointError
from moemerge.families import family_of
from moemerge.families.base import ExpertTensor
from moemerge.families.dense import require_moe, skeleton
from moemerge.modelling import model_class, register
from moemerge.moe import MoeSettings
from moemerge.provenance import model_fingerprint


class MoeCheckpoint:
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
        self.tensors: list[ExpertTensor] = family_of(self.config).expert_tensors(self.config)
        self._check_tensors()
        experts = {tensor.dense for tensor in self.tensors}
        dense = skeleton(self.config).state_dict()
        self.backbone = [n for n in dense if n not in experts and n in self.weights.names]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the experts."""
        return self.weights.dtype(self.tensors[0].stacked)

    def matrices(self, tensor: ExpertTensor) -> Iterator[Tensor]:
        """The experts' copies of a dense MLP tensor, in its layout: the shared one if any, then N routed."""
        if self.settings.shared_expert:
            yield self.weights.tensor(tensor.shared)
        for index in range(self.settings.num_routed_experts):
            yield self.weights.expert(tensor, index)

    def average(
        self, tensor: ExpertTensor, matrices: Iterator[Tensor], alpha_LN: Tensor, shared_L: Tensor
    ) -> Tensor:
        """Routing-normalised average of `matrices`, in the order of that method, by the layer's weights."""
        row = self.settings.layers.index(tensor.layer)
        shared = next(matrices) if self.settings.shared_expert else None
        return routing_normalized_average(shared, matrices, alpha_LN[row], float(shared_L[row]))

    def check_fit(self, coefficients: Coefficients) -> None:
        """Raise CheckpointError unless `coefficients` belong to this very model."""
        s, c = self.settings, coefficients
        if (c.layers, c.num_experts) != (s.layers, s.num_routed_experts):
            mine = f"layers {s.layers}, {s.num_routed_experts} routed experts"
            raise _foreign(f"layers {c.layers}, {c.num_experts} routed experts", mine)
        if not s.shared_expert and bool(c.shared_L.any()):
            raise _foreign(f"shared weights {c.shared_L.tolist()}", "zeros: there is no shared expert")
        model, mine = c.meta.get("model"), model_fingerprint(self.folder)
        if model not in (None, mine):
            raise _foreign(f"coefficients for a model with fingerprint {model}", f"{mine} ({self.folder})")

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


def _foreign(given: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "coefficients do not belong to this model",
        given=given,
        expected=expected,
        fix="fit coefficients for this model, or merge the model that they were fitted for",
    )

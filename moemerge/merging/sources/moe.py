"""A MoE on disk as a source of merges: which tensors are experts, and which are not.

Shapes: N routed experts. Tensors are read one at a time.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from moemerge.errors import CheckpointError, UnsupportedError
from moemerge.merging.sources.base import ExpertSource, MergedTensor
from moemerge.models.families.base import ExpertTensor
from moemerge.models.folder import ModelFolder, misfit, opened
from moemerge.models.layout import Layout, read_layout
from moemerge.models.moe_settings import SHARED
from moemerge.models.shim import install_shim

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from moemerge.models.moe_settings import MoeSettings


class MoeCheckpoint(ExpertSource):
    """The folder of a MoE reward model, checked against its own config before anything is read.

    `tensors` are the dense MLP's tensors and where their copies stand; `backbone` the names of everything
    that the dense model shares with the MoE. Raises CheckpointError if the folder is not a MoE, or a tensor
    is missing, left over or of another shape.
    """

    def __init__(self, source: ModelFolder | str | Path) -> None:
        self.opened = opened(source)
        self.opened.require_moe()
        self.weights, self.folder = self.opened.weights, self.opened.folder
        self.layout = read_layout(self.folder) or _layout_of(self.config)
        self.num_members, self.has_shared = self._members()
        self.tensors: list[ExpertTensor] = self.layout.experts
        self._check_tensors()
        experts, held = {tensor.dense for tensor in self.tensors}, set(self.weights.names)
        self.backbone = [name for name in self.layout.dense if name in held - experts]

    @cached_property
    def config(self) -> PreTrainedConfig:  # type: ignore[override]
        """The MoE's config."""
        return self.opened.config

    @cached_property
    def settings(self) -> MoeSettings:
        """The settings of its experts and gates."""
        from moemerge.models.moe_settings import MoeSettings

        return MoeSettings.read(self.config.moemerge)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the experts."""
        return self.weights.dtype(self.tensors[0].stacked)

    @property
    def dense_dtype(self) -> torch.dtype:
        """dtype of the dense model that the MoE was made from."""
        return cast(torch.dtype, getattr(torch, self.opened.config_json["moemerge"]["dense_dtype"]))

    def dense_config(self) -> PreTrainedConfig:
        """Config of the dense model, a new object."""
        from moemerge.models.families.dense import dense_config

        return dense_config(self.config)

    def names(self) -> list[str]:
        """All tensors of the merged model, in the order of its class."""
        own = {*self.backbone, *(tensor.dense for tensor in self.tensors)}
        return [name for name in self.layout.dense if name in own]

    def write_config(self, target: Path, dtype: torch.dtype) -> None:
        """Put the merged model's config, with `dtype`, into `target`, as transformers writes it."""
        values = {**self.layout.dense_config, "dtype": str(dtype).removeprefix("torch.")}
        text = json.dumps(values, indent=2, sort_keys=True)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")
        install_shim(target)

    def matrix(self, tensor: MergedTensor, member: int) -> Tensor:
        """The copy that one expert has; the shared one, if there is one, is number 0."""
        assert isinstance(tensor, ExpertTensor)
        if self.has_shared and member == 0:
            return self.weights.tensor(tensor.shared)
        return self.weights.expert(tensor, member - self.has_shared)

    def stack(self, tensor: MergedTensor) -> tuple[Tensor | None, Tensor] | None:
        """Views of the files; None where experts are stored transposed."""
        assert isinstance(tensor, ExpertTensor)
        if tensor.transposed:
            return None
        shared = self.weights.mapped(tensor.shared) if self.has_shared else None
        return shared, self.weights.mapped(tensor.stacked)[:, tensor.rows]

    def require_one_head(self) -> None:
        """Raise UnsupportedError if each expert has a head of its own: a dense model has no place for it."""
        heads = self.opened.config_json["moemerge"].get("heads", SHARED)
        if heads != SHARED:
            raise UnsupportedError(
                f"the experts of {self.folder} cannot be merged",
                given=f"heads {heads}: one for each expert",
                expected="a MoE with one head",
                fix="merge the models that its experts come from: moemerge merge --models A B C --base X "
                "--coordinates sum",
            )

    def _members(self) -> tuple[int, bool]:
        """Number of routed experts, and whether there is a shared one, as config and layout both say."""
        values: Any = self.opened.config_json.get("moemerge")
        values = values if isinstance(values, dict) else {}
        number, shared = values.get("num_routed_experts"), values.get("shared_expert")
        stacks = {self.layout.moe[tensor.stacked][0] for tensor in self.layout.experts}
        known = {tensor.shared in self.layout.moe for tensor in self.layout.experts}
        dtype = getattr(torch, str(values.get("dense_dtype")), None)
        if (
            type(number) is not int
            or stacks != {number}
            or known != {shared}
            or type(dtype) is not torch.dtype
        ):
            raise CheckpointError(
                f"{self.folder} does not fit its own config",
                given=f"{number} routed experts, shared_expert {shared}, dense_dtype {dtype}",
                expected="what its tensors say",
                fix="make the folder again, or copy it again whole",
            )
        return number, bool(shared)

    def _check_tensors(self) -> None:
        """The checkpoint holds exactly what the MoE class has; a tied copy may be left out."""
        self.weights.refuse_quantised(self.layout.moe.keys() & set(self.weights.names))
        faults = self.weights.differences(self.layout.moe, set(self.layout.tied))
        if faults:
            expected = f"exactly the tensors of {self.layout.class_name}"
            raise misfit(self.folder, faults, expected, "make the folder again, or copy it again whole")


def _layout_of(config: PreTrainedConfig) -> Layout:
    from moemerge.models.modelling import layout_of

    return layout_of(config)

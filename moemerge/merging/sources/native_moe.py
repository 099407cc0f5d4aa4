"""A native mixture of experts of transformers (Mixtral, Qwen3-MoE, ...) as a source of merges.

Its dense sibling has the same attention, norms and positions, so the average of the experts can stand where
they stood. Experts that were trained from scratch share no basin, though: nothing says that their average
computes anything of use, so the result has to be measured.

Letters: N routed experts, F an expert's hidden width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import ArtifactError, CheckpointError, UnsupportedError
from moemerge.merging.sources.base import ExpertSource, MergedTensor
from moemerge.models.families import family_called
from moemerge.models.families.base import ExpertTensor
from moemerge.models.families.dense import dense_class, describes_model, shared_values, skeleton
from moemerge.models.families.siblings import SIBLINGS, Sibling
from moemerge.models.folder import ModelFolder, misfit, opened
from moemerge.models.head_tensors import in_head, refuse_lost_head, spare_head

# Where checkpoints keep an expert's matrices, one tensor each: module of the experts, names of the matrices.
LAYOUTS = (
    ("mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    ("block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
    ("mlp.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
)
ROUTER = re.compile(r"\.(mlp|block_sparse_moe)\.(gate(\.wg)?|shared_expert_gate)\.weight$")
MOST_EXPERTS = 10_000  # of a layer; their names are listed
BASIN = (
    "experts that were trained from scratch share no basin, so their average may be no better than chance; "
    "measure the merged model before you use it"
)
NOT_NORMALISED = (
    "a token's routing weights sum to less than one (norm_topk_prob is false), those of the merge to one: "
    "merged MLPs say more than the MoE's"
)
GATED = (
    "the shared expert comes on top of routed weights that sum to one, in the merge all weights sum to one: "
    "merged MLPs say less than the MoE's"
)

log = logging.getLogger(__name__)


class NativeMoe(ExpertSource):
    """The folder of a native MoE reward model whose model_type has a dense sibling.

    Experts are read one matrix at a time, whether the checkpoint holds them one by one or stacked. A shared
    expert is the shared member if it is as wide as the routed ones, else it is left out with a warning. Where
    a token's weights sum to a constant other than one, each down_proj is multiplied by it. Warns that the
    result must be measured. Raises UnsupportedError for what the sibling cannot express, CheckpointError for
    a folder that is not whole or no reward model.
    """

    def __init__(self, source: ModelFolder | str | Path) -> None:
        self.opened = opened(source)
        self.weights, self.folder = self.opened.weights, self.opened.folder
        self.config = self.opened.config
        self.sibling: Sibling = SIBLINGS[self.config.model_type]
        with describes_model(self.config.model_type):
            self._refuse_inexpressible()
            self.num_members = int(getattr(self.config, self.sibling.experts))
            self.has_shared = bool(self.sibling.shared) and self._shared_width == self._width
            dense, with_experts = self.dense_config(), set(layers_with_experts(self.config))
            mlps = family_called(self.sibling.dense).expert_tensors(dense)
            self.tensors: list[ExpertTensor] = [t for t in mlps if t.layer in with_experts]
        merged = {tensor.dense for tensor in self.tensors}
        self._shapes = {name: tuple(value.shape) for name, value in skeleton(dense).state_dict().items()}
        self.backbone = [name for name in self._shapes if name not in merged]
        held = set(self.weights.names)
        self._copies = {tensor.dense: self._names(tensor, held) for tensor in self.tensors}
        self._check_tensors()
        self.caveats = list(self._caveats())
        for caveat in self.caveats:
            log.warning("%s: %s", self.folder, caveat)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the experts."""
        return self.weights.dtype(self._copies[self.tensors[0].dense][-1])

    @property
    def dense_dtype(self) -> torch.dtype:
        """dtype of the experts."""
        return self.dtype

    def matrix(self, tensor: MergedTensor, member: int) -> Tensor:
        """The copy that one expert has; the shared one, if it takes part, is number 0."""
        assert isinstance(tensor, ExpertTensor)
        name = self._copies[tensor.dense][member]
        if name == tensor.stacked:
            copy = self.weights.expert(tensor, member - self.has_shared)
        else:
            copy = self.weights.tensor(name)
        # Where a token's weights sum to `total`, the sum of experts is that many times their average. The
        # MLP's output is linear in down_proj, so it goes there.
        total = self.sibling.total or 1.0
        return copy * total if tensor.matrix == "down" and total != 1 else copy

    def dense_config(self) -> PreTrainedConfig:
        """Config of the dense sibling, a new object; every value of it is the MoE's, none a class default."""
        kind = CONFIG_MAPPING[self.sibling.dense]
        dense = kind(**{**shared_values(self.config, kind), **self._own_values(kind)})
        dense.architectures = [dense_class(dense).__name__]
        return dense

    @property
    def _width(self) -> int:
        return int(getattr(self.config, self.sibling.width))

    @property
    def _shared_width(self) -> int:
        return int(getattr(self.config, self.sibling.shared_width))

    def _own_values(self, kind: type[PreTrainedConfig]) -> dict[str, Any]:
        """Values that the sibling's config calls otherwise than the MoE's, or that the MoE implies."""
        c, declared = self.config, {field.name for field in fields(kind)}
        values: dict[str, Any] = {"intermediate_size": self._width}
        if "head_dim" in declared:
            values["head_dim"] = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        if "layer_types" in declared:
            alike = "full_attention" if c.sliding_window is None else "sliding_attention"
            types = getattr(c, "layer_types", None) or [alike] * c.num_hidden_layers
            sliding = "sliding_attention" in types
            values |= {"layer_types": types, "use_sliding_window": sliding}
            values |= {"sliding_window": c.sliding_window if sliding else None}
            values |= {"max_window_layers": c.num_hidden_layers}
        return values

    def _names(self, tensor: ExpertTensor, held: set[str]) -> list[str]:
        """What the checkpoint calls each member's copy of a dense tensor; stacked ones share a name."""
        prefix = tensor.dense.split(".mlp.")[0]
        shared = f"{prefix}.{self.sibling.shared}.{tensor.matrix}_proj.weight"
        own = [shared] if self.has_shared else []
        if tensor.stacked in held:
            return own + [tensor.stacked] * self.num_members
        for home, matrices in LAYOUTS:
            start, end = f"{prefix}.{home}", f"{matrices[tensor.matrix]}.weight"
            names = [f"{start}.{index}.{end}" for index in range(self.num_members)]
            if names[0] in held:
                return own + names
        raise self._fault(f"no experts for {tensor.dense}", "experts, one by one or stacked")

    def _wanted(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all that is read."""
        yield from ((name, self._shapes[name]) for name in self.backbone)
        for tensor in self.tensors:
            rows, columns = tensor.shape
            # gate and up stand one above the other in one stack, so it is twice as high.
            stack = (self.num_members, rows if tensor.matrix == "down" else 2 * rows, columns)
            for name in dict.fromkeys(self._copies[tensor.dense]):
                yield name, stack if name == tensor.stacked else tensor.shape

    def _check_tensors(self) -> None:
        """The checkpoint holds the backbone, every expert, routers and nothing else, in the right shapes."""
        faults = self.weights.differences(dict(self._wanted()), may_add=self._needless)
        held = set(self.weights.names)
        self.weights.refuse_quantised(name for name, _ in self._wanted() if name in held)
        model = skeleton(self.dense_config())
        lost = [name for name in faults.get("missing", []) if in_head(model, name)]
        refuse_lost_head(self.opened, lost, faults.get("left over", []), needed=True)
        if faults:
            expected = f"the tensors of a reward model of type {self.config.model_type}"
            raise misfit(self.folder, faults, expected, "give a whole reward model, as safetensors")
        self.opened.require_one_output()

    def _needless(self, name: str) -> bool:
        """Whether the tensor has no place in a dense reward model: a router, a spare head, an idle expert."""
        idle = bool(self.sibling.shared) and not self.has_shared and f".{self.sibling.shared}." in name
        return bool(ROUTER.search(name)) or spare_head(name) or idle

    def _fault(self, given: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} does not fit its own config",
            given=given,
            expected=expected,
            fix="give a whole reward model, as safetensors",
        )

    def _refuse_inexpressible(self) -> None:
        reason = self._reason()
        if reason is not None:
            raise UnsupportedError(
                f"this MoE has no dense form: {reason[0]}",
                given=f"{self.folder}, {reason[1]}",
                expected=f"a MoE that differs from {self.sibling.dense} in its MLPs only",
                fix=reason[2],
            )

    def _reason(self) -> tuple[str, str, str] | None:
        """Why the sibling cannot express the MoE, what is to blame, and what to do; None if it can."""
        c, other = self.config, "merge another model"
        number, layers = getattr(c, self.sibling.experts), layers_with_experts(c)
        if _is_export(self.folder):
            fix = "merge the MoE that it was exported from"
            return "its down_proj are scaled, as moemerge export does", "written by moemerge export", fix
        if not isinstance(number, int):
            return "its layers have unlike numbers of experts", f"{self.sibling.experts} {number}", other
        if not layers or not 0 < number <= MOST_EXPERTS:
            return "no layer has experts", f"{number} experts in {len(layers)} layers", "use it as it is"
        if len(layers) < c.num_hidden_layers and c.intermediate_size != self._width:
            widths = f"dense layers of width {c.intermediate_size}, experts of width {self._width}"
            return "all MLPs of a dense model have one width", widths, other
        if self.sibling.dense == "qwen2" and not c.qkv_bias:
            return "Qwen2 has biases at q, k and v", "qkv_bias false", other
        return None

    def _caveats(self) -> Iterator[str]:
        c, shared = self.config, self.sibling.shared
        yield BASIN
        if not getattr(c, "norm_topk_prob", True):
            yield NOT_NORMALISED
        if shared and not self.has_shared:
            widths = f"it is {self._shared_width} wide, the routed experts are {self._width}"
            yield f"the shared expert is left out, as {widths}"
        elif shared and self.sibling.total is None:
            yield GATED


def layers_with_experts(config: PreTrainedConfig) -> list[int]:
    """The numbers of the layers of a native MoE that have experts."""
    step = getattr(config, "decoder_sparse_step", 1)
    dense = getattr(config, "mlp_only_layers", None) or []
    return [n for n in range(config.num_hidden_layers) if n not in dense and (n + 1) % step == 0]


def _is_export(folder: Path) -> bool:
    with suppress(ArtifactError):
        return bool(read_manifest(folder)["stage"] == "export")
    return False

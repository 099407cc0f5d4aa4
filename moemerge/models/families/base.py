"""What moemerge must know of an architecture: where its MLP stands and what its tensors are called.

Letters: N routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from moemerge.models.moe import DenseExpert

PREFIX = "moemerge_"  # of the model_type of our MoEs: moemerge_llama is made from llama
STACKS = {"gate": "gate_up_proj", "up": "up_proj", "gate_up": "gate_up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of a dense MLP, and where its copies stand in the MoE checkpoint."""

    layer: int
    matrix: str
    dense: str
    shared: str
    stacked: str
    rows: slice
    transposed: bool
    shape: tuple[int, ...]

    @property
    def home(self) -> str:
        """Path of the MoE layer, whose experts, shared expert and router lie below it."""
        return self.stacked.rsplit(".experts.", 1)[0]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one expert's copy inside the stack."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class Family:
    """An architecture. Paths of `block`, `matrices` and `bypass` are relative to a transformer layer.

    model_type: of the dense config. layers: path of the layer list in the base model.
    block: the module that the MoE layer replaces. matrices: up and down, with gate or fused as gate_up
    (gate's rows first). bypass: modules that the MoE makes idle. activation: name of the config field;
    fixed_activation: the activation itself, where no field names it. dropout: config field of the dropout
    at the block's end, inside it. causal: a prompt's states never depend on the answer.
    transposed: weights are stored [in, out].
    """

    model_type: str
    layers: str = "layers"
    block: str = "mlp"
    matrices: tuple[tuple[str, str], ...] = (
        ("gate", "mlp.gate_proj"),
        ("up", "mlp.up_proj"),
        ("down", "mlp.down_proj"),
    )
    bypass: tuple[str, ...] = ()
    activation: str = "hidden_act"
    fixed_activation: str = ""
    dropout: str = ""
    causal: bool = True
    transposed: bool = False

    def dense_layers(self, model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
        """The transformer layers of a reward model, and their path in it."""
        base = model.base_model
        path = next(name for name, module in model.named_modules() if module is base)
        return f"{path}.{self.layers}", cast("nn.ModuleList", base.get_submodule(self.layers))

    def expert_tensors(self, config: PretrainedConfig) -> list[ExpertTensor]:
        """Every dense MLP tensor of the layers that have (or, for a dense config, can have) experts."""
        from moemerge.models.families.dense import skeleton

        path, layers = self.dense_layers(skeleton(config))
        moe = getattr(config, "moemerge", None)
        numbers = moe["layers"] if moe else range(len(layers))
        return [t for n in numbers for t in self.layer_tensors(layers[n], f"{path}.{n}", n)]

    def linears(self, layer: nn.Module) -> dict[str, nn.Module]:
        """The linear modules of a dense layer's MLP, by matrix."""
        return {matrix: layer.get_submodule(path) for matrix, path in self.matrices}

    def layer_tensors(self, layer: nn.Module, prefix: str, number: int) -> list[ExpertTensor]:
        """The MLP tensors of the dense `layer` that stands at `prefix` (weights before biases)."""
        tensors = []
        for kind in ("weight", "bias"):
            for matrix, path in self.matrices:
                tensor = getattr(layer.get_submodule(path), kind, None)
                if tensor is not None:
                    tensors.append(
                        self._expert_tensor(matrix, path, kind, tensor.shape, prefix, number, layer)
                    )
        return tensors

    def _expert_tensor(
        self,
        matrix: str,
        path: str,
        kind: str,
        shape: tuple[int, ...],
        prefix: str,
        number: int,
        layer: nn.Module,
    ) -> ExpertTensor:
        transposed = self.transposed and kind == "weight"
        gated = any(name == "gate" for name, _ in self.matrices)
        stack = "gate_up_proj" if gated and matrix == "up" else STACKS[matrix]
        count = shape[1] if transposed else shape[0]
        start = count if gated and matrix == "up" else 0  # up's rows stand below gate's in gate_up_proj
        home = f"{prefix}.{self.block}"
        return ExpertTensor(
            layer=number,
            matrix=matrix if kind == "weight" else f"{matrix}_bias",
            dense=f"{prefix}.{path}.{kind}",
            shared=f"{home}.shared_expert.{matrix}_proj.{kind}",
            stacked=f"{home}.experts.{stack}" + ("" if kind == "weight" else "_bias"),
            rows=slice(start, start + count),
            transposed=transposed,
            shape=tuple(shape),
        )

    def activation_of(self, config: PretrainedConfig) -> str:
        """Name of the MLP's activation."""
        return self.fixed_activation or str(getattr(config, self.activation))

    def dropout_of(self, config: PretrainedConfig) -> float:
        """Dropout of the block's output; zero where the layer itself drops, or nothing does."""
        return float(attrgetter(self.dropout)(config)) if self.dropout else 0.0

    def dense_expert(self, layer: nn.Module, config: PretrainedConfig) -> DenseExpert:
        """The layer's MLP as one module that owns the layer's own linear modules."""
        from moemerge.models.moe import DenseExpert

        return DenseExpert(self.linears(layer), self.activation_of(config))

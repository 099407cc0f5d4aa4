"""How large a model is, dense or as a MoE, by its config alone: what memory, disk and time follow from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moemerge.models.families import family_of
from moemerge.models.families.dense import skeleton
from moemerge.options.layers import parse_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from moemerge.options.train import TrainSettings
    from moemerge.options.upcycle import UpcycleSettings

WIDTH = {"float32": 4, "bfloat16": 2}
MOMENTS = 2 * WIDTH["float32"]  # AdamW's, of a weight that trains
CHECKPOINTS = 3  # that training keeps at most, each with weights and two moments


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a reward model of `layers` equal layers; of a MoE those of its dense model.

    layer: of one layer, mlp: of the MLP in it; rest: embeddings, last norm and head. experts: MLPs in each of
    the `moe_layers`, the shared one among them; active: those of them that one token uses.
    """

    layers: int
    layer: int
    mlp: int
    rest: int
    moe_layers: tuple[int, ...] = ()
    experts: int = 1
    active: int = 1

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelSize:
        """Of the dense reward model of `config`. Raises UnsupportedError for an architecture of no family."""
        family, model = family_of(config), skeleton(config)
        _, layers = family.dense_layers(model)
        first = sum(weight.numel() for weight in layers[0].parameters())
        mlp = sum(w.numel() for part in family.linears(layers[0]).values() for w in part.parameters())
        whole = sum(weight.numel() for weight in model.parameters())
        in_layers = sum(weight.numel() for weight in layers.parameters())
        return cls(len(layers), first, mlp, whole - in_layers)

    def upcycled(self, options: UpcycleSettings) -> ModelSize:
        """The MoE that upcycle makes of it; routers, which are small, are left out."""
        shared = int(options.shared_expert)
        return replace(
            self,
            moe_layers=tuple(parse_layers(options.layers, self.layers)),
            experts=options.num_routed_experts + shared,
            active=options.num_experts_per_tok + shared,
        )

    @property
    def dense(self) -> ModelSize:
        """The dense model that it was made from, and that it is merged into."""
        return replace(self, moe_layers=(), experts=1, active=1)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.rest + sum(map(self._of_layer, range(self.layers)))

    def _of_layer(self, number: int) -> int:
        return self.layer + (self.experts - 1) * self.mlp * (number in self.moe_layers)

    def trained(self, options: TrainSettings) -> int:
        """Those that training changes; LoRA's own, which are few, are left out."""
        chosen = parse_layers(options.train_layers, self.layers)
        if options.trainable == "full":
            rest = self.rest if options.train_layers == "all" else 0
            return rest + sum(map(self._of_layer, chosen))
        return sum(self._of_layer(number) - self.layer + self.mlp for number in chosen)

    def passes(self, chosen: str = "all") -> float:
        """Dense layers' worth of work that a token does in the layers that `chosen` names."""
        numbers = parse_layers(chosen, self.layers)
        more = (self.active - 1) * self.mlp / self.layer
        return sum(1 + more * (number in self.moe_layers) for number in numbers)

    def backward(self, options: TrainSettings) -> float:
        """As `passes`, of the layers that gradients go through: from the last to the lowest that trains."""
        lowest = min(parse_layers(options.train_layers, self.layers))
        all_of_them = options.train_layers == "all"
        return self.passes("all" if all_of_them else f"{lowest}-{self.layers - 1}")

    def training_memory(self, options: TrainSettings) -> int:
        """Bytes of weights, gradients and AdamW's moments."""
        width, trained = WIDTH[options.weights], self.trained(options)
        return width * self.parameters + (width + MOMENTS) * trained

    def training_space(self, options: TrainSettings) -> int:
        """Bytes on the disk that a training needs while it runs, at most: checkpoints, and what it writes."""
        return training_space(self.parameters, self.trained(options), options)


def training_space(parameters: int, trained: int, options: TrainSettings) -> int:
    """Bytes on the disk that a training of `trained` of a model's `parameters` needs at most."""
    width = WIDTH[options.weights]
    return width * parameters + CHECKPOINTS * (width + MOMENTS) * trained

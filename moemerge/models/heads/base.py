"""What a head is, and how one of ours takes the place of a model's own.

B texts, T tokens, D width of the last state, N texts' pooled states.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from moemerge.models.heads.saved import SavedHead


class Head(nn.Module, ABC):
    """A head of `settings` for states of width D: `score(states)`, in float32 or wider, also under autocast.

    stock: whether transformers has it itself. outputs: those of its own tensors in proportion to which scores
    grow. positions_B: where the running forward pass of a decoder reads scores; only there are they computed,
    and stand at every token. None: at each token, its own.
    """

    stock: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, in_features: int, settings: SavedHead) -> None:
        super().__init__()
        self.in_features, self.settings = in_features, settings
        self.positions_B: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        """[B, T, D] or [N, D] -> [B, T, 1] or [N, 1]."""
        # lgamma and powers lose too much in half precision, and a head is small.
        with torch.autocast(states.device.type, enabled=False):
            if states.ndim < 3 or self.positions_B is None:
                return self.score(wide(states))[..., None]
            rows_B = torch.arange(len(states), device=states.device)
            scores_B = self.score(wide(states[rows_B, self.positions_B.to(states.device)]))
            return scores_B[:, None, None].expand(-1, states.shape[1], 1)

    @abstractmethod
    def score(self, states: Tensor) -> Tensor:
        """[..., D] -> [...]; in eval mode always the same."""

    @abstractmethod
    def draw(self, generator: torch.Generator, start: str) -> None:
        """Draw every weight anew, on the CPU; `start`: options.head_start."""

    @property
    def has_prior(self) -> bool:
        """Whether `prior_loss` is anything."""
        return False

    def prior_loss(self, states_ND: Tensor, num_pairs: int) -> Tensor:
        """What training adds per pair, in nats, besides the loss on labels; `states_ND` hold whole pairs."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """Numbers worth a line in a report on training."""
        return {}


class WideLinear(nn.Linear):
    """A linear layer in the dtype of its input, whatever that of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)

    def draw(self, generator: torch.Generator) -> None:
        """As torch draws a fresh layer: all within 1 / sqrt(inputs)."""
        bound = self.in_features**-0.5
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound, generator=generator)


def wide(x: Tensor) -> Tensor:
    """`x` in float32, if it is not wider already."""
    return x if x.dtype == torch.float64 else x.float()


def head_of(model: nn.Module) -> Head | None:
    """The head of ours that a model has, if it has one."""
    return next((module for module in model.modules() if isinstance(module, Head)), None)


def origin_of(head: Head) -> str:
    """sha256 over the weights of a head."""
    digest = hashlib.sha256()
    for name, weight in head.named_parameters():
        digest.update(name.encode() + weight.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

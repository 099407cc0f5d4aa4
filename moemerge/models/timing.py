"""What one layer of an architecture costs on this machine: timed for a moment, on weights drawn at random.

Weights are not read: time and memory do not depend on what they hold.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCABULARY, TEXTS = 64, 4
PATIENCE, ROUNDS = 0.5, 3  # seconds for repetitions, and how many at most


@dataclass(frozen=True)
class LayerCost:
    """Of one dense layer and token: seconds forward, seconds forward and backward, bytes kept in between."""

    forward: float
    training: float
    kept: float


def time_layer(
    config: PretrainedConfig, device: torch.device, tokens: int, autocast: bool
) -> LayerCost | None:
    """The cost of one layer of the dense model of `config`, on texts of `tokens` tokens.

    None where this cannot be told: an architecture whose config takes no other number of layers.
    autocast: to bfloat16 in training.
    """
    try:
        model = AutoModel.from_config(_one_layer(config)).to(device)
    except Exception:  # a config's class may raise anything at values that it does not expect
        return None
    ids = torch.randint(1, VOCABULARY, (TEXTS, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    per_token = 1 / ids.numel()

    def forward() -> Tensor:
        return model(input_ids=ids).last_hidden_state.float().sum()

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = forward()
        loss.backward()

    with torch.inference_mode():
        seconds = _fastest(forward, device)
    with _counted_kept(model) as kept:
        train()
    return LayerCost(seconds * per_token, _fastest(train, device) * per_token, sum(kept.values()) * per_token)


def _one_layer(config: PretrainedConfig) -> PretrainedConfig:
    small = deepcopy(config.get_text_config())
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = 1, VOCABULARY, None
    for name, value in vars(small).items():  # a value per layer, such as the kinds of attention
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, value[:1])
    return small


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, after one that does not count."""
    begun, best = time.perf_counter(), float("inf")
    for round in range(ROUNDS + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - started) if round else best
        if round and now - begun > PATIENCE:
            break
    return best


@contextlib.contextmanager
def _counted_kept(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps for the backward pass, by storage; parameters do not count."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept

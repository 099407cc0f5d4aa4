"""The layers below the first that changes: run once for each batch, and passed over when it comes again.

Which layers these are is read off a forward pass: the states that a layer gives ask for no gradient if and
only if nothing that changes has gone into them. Nothing of a model's code is written anew: everything but
these layers runs as always (masks, positions, the layers above).

Shapes: B texts, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moemerge.models.state_store import StateStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class FrozenLayers:
    """Has the first layers of `model` run once per batch, while `store` keeps the states that the last gives.

    `layers` come first to last, and change nothing but the states they pass on, which depend on nothing that
    changes. A batch is known by all that the model is given, in its very composition: states of the same text
    differ in last bits from batch to batch, as products of matrices do with the number of their rows.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[_Layer], store: StateStore) -> None:
        self.layers, self._store = layers, store
        self._key: bytes | None = None
        self._states_BTD: Tensor | None = None
        self._owner: object = None
        self._again = True
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for layer in layers:
            layer.module.forward = wraps(layer.module.forward)(
                partial(self._run, layer, layer.module.forward)
            )

    def serve(self, owner: object, again: bool = True) -> None:
        """From now on batches are of `owner`; another one's states are forgotten.

        again: whether the next batches will come again in the same composition; others are not kept.
        """
        if owner is not self._owner:
            self._store.clear()
        self._owner, self._again = owner, again

    def remove(self) -> None:
        """Make the model what it was before."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            del layer.module.forward
        self._store.clear()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._again:
            self._key = _key(args, kwargs)
            self._states_BTD = self._store.get(self._key, next(model.parameters()).device)

    def _end(self, *_: Any) -> None:
        self._key = self._states_BTD = None

    def _run(self, layer: _Layer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What stands for the layer's forward pass."""
        is_last = layer is self.layers[-1]
        if self._states_BTD is not None:
            # The states pass through the layers before the last, whose own are the ones that are kept.
            return layer.output(self._states_BTD if is_last else _states_in(args, kwargs))
        output = forward(*args, **kwargs)
        if is_last and self._key is not None:
            self._store.put(self._key, _states_out(output))
        return output


@dataclass(frozen=True)
class _Layer:
    """A layer whose output is its states alone, or a tuple of `size` that begins with them."""

    module: nn.Module
    size: int | None

    def output(self, states_BTD: Tensor) -> Any:
        """As the layer gives it; nobody asks for attention weights, or whatever else may stand there."""
        return states_BTD if self.size is None else (states_BTD, *[None] * (self.size - 1))


def run_frozen_once(
    model: PreTrainedModel, run: Callable[[], Sequence[Tensor]], store: StateStore
) -> FrozenLayers | None:
    """The frozen layers of `model`, from now on run once per batch; None if there are none, or it cannot be.

    What changes in the model asks for gradients, nothing else does. `run` puts a batch of two texts or more
    through it. A model that gives anything but the same bits in this way is left as it was.
    """
    layers, expected = _look(model, run)
    if not layers:
        return None
    frozen = FrozenLayers(model, layers, store)
    same = all(
        torch.equal(mine, theirs)
        for found in (run(), run())  # the first run keeps states, the second one gets them
        for mine, theirs in zip(found, expected, strict=True)
    )
    if not (same and len(store) == 1):
        frozen.remove()
        log.info("the lower layers of this architecture are computed anew for each batch")
        return None
    store.clear()
    log.info("the lower %d layers, which do not change, are computed once for each batch", len(layers))
    return frozen


def layers_of(model: nn.Module) -> nn.ModuleList | None:
    """The stack of layers: of all lists of modules that are in no other, the one with most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [lists[name] for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return max(outer, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=None)


def _look(
    model: PreTrainedModel, run: Callable[[], Sequence[Tensor]]
) -> tuple[list[_Layer], Sequence[Tensor]]:
    """The frozen layers, first to last, and what `run` gives, in one pass with gradients on."""
    calls: list[tuple[nn.Module, Any, Any]] = []
    stack = layers_of(model)
    with _watched(stack or [], calls), torch.enable_grad():
        expected = run()
    frozen: list[_Layer] = []
    before: Any = None
    for layer, (module, states_in, output) in zip(stack or [], calls, strict=False):
        # A chain: each layer runs once and in turn, and nothing is done to the states in between.
        chained = module is layer and (before is None or states_in is before)
        once = sum(module is other for other, _, _ in calls) == 1
        before = _states_out(output)
        if not (chained and once and isinstance(before, Tensor) and before.is_contiguous()):
            break
        if before.requires_grad:
            break
        frozen.append(_Layer(module, len(output) if isinstance(output, tuple) else None))
    return frozen, [x.detach() for x in expected]


@contextmanager
def _watched(
    layers: Sequence[nn.Module] | nn.ModuleList, calls: list[tuple[nn.Module, Any, Any]]
) -> Iterator[None]:
    """While open, `calls` gets each layer that ran, the states that it was given, and its output."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((module, _states_in(args, kwargs), output))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _states_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _states_out(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """A digest of all that a model is given, and of whether gradients are on."""
    digest = hashlib.sha256(str(torch.is_grad_enabled()).encode())
    for name, value in [*enumerate(args), *sorted(kwargs.items())]:
        digest.update(f"{name}=".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.digest()

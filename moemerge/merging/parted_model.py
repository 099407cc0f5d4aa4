"""A merge in memory of which each of several processes holds a part: FSDP2, the coefficients in all of them.

A weight lies in parts along its first dimension; so do the members' copies of it, and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moemerge.artifacts.ranks import count, number, require_several
from moemerge.merging.merged_model import MergedModel, MergeGradient, fits
from moemerge.models import processes
from moemerge.models.families import family_of
from moemerge.models.families.dense import dense_class, skeleton
from moemerge.models.loading import quiet_loading


class PartedModel(MergedModel):
    """As MergedModel, for a dense model that no device holds whole; each process has its rows of the members.

    All processes make it, and run it as often. OptionError in one process alone.
    """

    in_parts = True
    _reducers: dict[str, Callable[[Tensor], None]]

    def gradient(
        self, parts: Iterable[Callable[[], Tensor]], idle: Callable[[], Tensor] | None = None
    ) -> MergeGradient:
        """As MergedModel's; a process with fewer parts than another one runs `idle`, a loss of 0, instead."""
        parts = list(parts)
        if behind := processes.steps_behind(len(parts)):
            assert idle is not None
            parts += [idle] * behind
        return super().gradient(parts)

    def _build(self, dtype: torch.dtype) -> PreTrainedModel:
        require_several()
        self._reducers = {}
        config = self.source.dense_config()
        # Any copy will do: it stays in its file, of which each process reads its part, till `_average` below.
        tensors = {name: self.source.kept(name) for name in self.source.backbone}
        tensors |= {tensor.dense: next(self.source.matrices(tensor)) for tensor in self.source.tensors}
        layers, _ = family_of(config).dense_layers(skeleton(config))
        spread = processes.sharding(layers)
        with quiet_loading():
            model = cast(Any, dense_class(config)).from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, distributed_config=spread
            )
        for tensor in self.source.tensors:
            self._average(tensor, processes.own_part(model.get_parameter(tensor.dense)), first=True)
        self._agree_on_equal()
        return cast(PreTrainedModel, model.requires_grad_(False).eval())

    def _agree_on_equal(self) -> None:
        """Leave in `equal` the tensors whose parts are equal in all processes."""
        names = [tensor.dense for tensor in self.source.tensors]
        found = processes.summed(torch.tensor([float(name in self.equal) for name in names]))
        self.equal = {name for name, many in zip(names, found.tolist(), strict=True) if many == count()}

    def _fits(self) -> bool:
        return fits(self.source, self.device, count())

    @torch.no_grad()
    def merge(self, alpha_LN: Tensor, shared_L: Tensor) -> None:
        """Set every merged tensor to the average with these weights."""
        processes.part_again(self.model)
        super().merge(alpha_LN, shared_L)

    def _own(self, matrix: Tensor) -> Tensor:
        rows = matrix.chunk(count())  # as FSDP2 cuts it
        return rows[number()] if number() < len(rows) else matrix[:0]

    def _watch(self, name: str, reduce: Callable[[Tensor], None]) -> None:
        self.model.get_parameter(name).requires_grad_(True)
        self._reducers[name] = reduce

    def _reduce_all(self) -> None:
        """Reduce what FSDP2 has added up: the mean over processes of the gradients, of this one's rows."""
        processes.part_again(self.model)
        for name, reduce in self._reducers.items():
            weight = self.model.get_parameter(name)
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                reduce(processes.own_part(gradient) * count())

"""A merge in memory, and its gradient with respect to the merge coefficients.

The dense model is merged once per point. While a loss runs backward, each MLP weight's gradient dW is reduced
to the scalars <dW, W_i> the moment it is there, and freed: no graph reaches through the merge.

Shapes: L blocks, N weighted members (routed experts, or models), P pairs, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moemerge import distributed
from moemerge.coefficients.base import MergeGradient
from moemerge.families.dense import dense_class
from moemerge.scoring import collate, in_head
from moemerge.sources import MergedTensor, MergeSource

if TYPE_CHECKING:
    from moemerge.tokenise import EncodedPair

KEPT_ON_CPU = 2**30
# Numbers handled at a time: what a core's cache holds of all that takes part.
CHUNK = 2**16


@dataclass(frozen=True)
class Answers:
    """What a model says of P pairs: score(chosen) - score(rejected), float64; if asked for, the last-token
    states of chosen and rejected."""

    margins_P: Tensor
    states_2PD: Tensor | None = None


class MergedModel:
    """The dense reward model whose merged tensors are the routing-normalised average of a source's members.

    `model` has the dense class, in eval mode; what is not merged (all but the MLPs, for a MoE) is the
    source's and frozen. Merged tensors change by `merge` only: they ask for gradients, but none outlives
    `gradient`. Averages have the members' dtype, as in the merged checkpoint. Members are read from disk
    whenever needed, unless they take less than a gibibyte, or on a GPU half of its free memory: then they are
    kept (`keep` decides if given), and results differ by rounding. Coefficients have a row per block;
    `blocks` are the layers unless given.
    """

    def __init__(
        self,
        source: MergeSource,
        alpha_LN: Tensor,
        shared_L: Tensor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        blocks: Sequence[str] | None = None,
        keep: bool | None = None,
    ) -> None:
        self.source, self.device = source, torch.device(device)
        keep = _fits(source, self.device) if keep is None else keep
        self._kept: dict[str, tuple[Tensor, Tensor]] | None = {} if keep else None
        self.alpha_LN, self.shared_L = alpha_LN.clone(), shared_L.clone()
        self._last = True
        self.rows = source.rows(source.blocks() if blocks is None else blocks)
        self.model = self._build(dtype)
        columns = source.num_members + 1
        self._dots = torch.zeros(len(shared_L), columns, dtype=torch.float64, device=self.device)
        for tensor in source.tensors:
            parameter = self.model.get_parameter(tensor.dense)
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(self._reducer(tensor))

    @torch.no_grad()
    def merge(self, alpha_LN: Tensor, shared_L: Tensor) -> None:
        """Set every merged tensor to the average with these weights."""
        if torch.equal(alpha_LN, self.alpha_LN) and torch.equal(shared_L, self.shared_L):
            return
        self.alpha_LN, self.shared_L = alpha_LN.clone(), shared_L.clone()
        for tensor in self.source.tensors:
            self.model.get_parameter(tensor.dense).copy_(self._average(tensor))

    def gradient(self, parts: Iterable[Callable[[], Tensor]]) -> MergeGradient:
        """Sum of the losses that `parts` compute with `model`, and its gradient at the present coefficients.

        Each part runs forward and backward before the next begins; the weights' gradients add up, and are
        reduced while the last part runs, so that members are read once. Summed over processes, float64 on
        CPU. alpha_LN lacks the same constant, (1 - lambda) <dW, W>, in all of a row: a softmax takes it out,
        and the rest rounds less.
        """
        self._dots.zero_()
        loss = torch.zeros(1, dtype=torch.float64)
        parts = list(parts)
        with torch.enable_grad():
            for number, part in enumerate(parts, start=1):
                self._last = number == len(parts)
                value = part()
                value.backward()
                loss += value.item()
        dots = distributed.summed(self._dots.cpu())
        shared_L, routed_LN = dots[:, 0], dots[:, 1:]
        shared_L = shared_L - (self.alpha_LN * routed_LN).sum(1)
        if not self.source.has_shared:
            shared_L = torch.zeros_like(shared_L)
        loss = distributed.summed(loss)
        return MergeGradient(loss.item(), (1 - self.shared_L)[:, None] * routed_LN, shared_L)

    def answers(self, pairs: Sequence[EncodedPair], states: bool = False) -> Answers:
        """What the model says of `pairs`, in one forward pass; gradients pass where they are on."""
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        pad = self.model.config.get_text_config().pad_token_id
        inputs = collate(texts, pad, False, self.device)
        with last_states(self.model, inputs["attention_mask"]) as found:
            scores_B = self.model(**inputs).logits[:, 0].double()
        half = len(pairs)
        states_2PD = found[0].unflatten(0, (2, half)) if states else None
        return Answers(scores_B[:half] - scores_B[half:], states_2PD)

    def _build(self, dtype: torch.dtype) -> PreTrainedModel:
        # Copies: a view would keep its whole file mapped.
        tensors = {name: self.source.kept(name).clone() for name in self.source.backbone}
        tensors |= {tensor.dense: self._average(tensor).cpu() for tensor in self.source.tensors}
        config = self.source.dense_config()
        model = dense_class(config).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        return cast(PreTrainedModel, torch.nn.Module.to(model.requires_grad_(False), self.device).eval())

    def matrices(self, tensor: MergedTensor) -> Iterator[Tensor]:
        """The members' copies on the device, read from disk: the shared one if any, then the N others."""
        return (matrix.to(self.device) for matrix in self.source.matrices(tensor))

    def _weights(self, row: int) -> Tensor:
        """Weight of each member, the shared one first if there is one."""
        shared = self.shared_L[row]
        routed = (1 - shared) * self.alpha_LN[row]
        return torch.cat([shared[None], routed]) if self.source.has_shared else routed

    def _average(self, tensor: MergedTensor) -> Tensor:
        row = self.rows[tensor.dense]
        if self._kept is not None:
            first_X, away_MX = self._held(tensor)
            weights_M = self._weights(row)[1:].to(away_MX)
            return torch.addmv(first_X, away_MX.T, weights_M).to(self.source.dtype).view(tensor.shape)
        alpha_N, shared = self.alpha_LN[row], float(self.shared_L[row])
        if self.device.type != "cpu":
            return self.source.average(self.matrices(tensor), alpha_N, shared)
        copies = [matrix.reshape(-1).split(CHUNK) for matrix in self.matrices(tensor)]
        chunks = zip(*copies, strict=True)
        whole = torch.cat([self.source.average(iter(chunk), alpha_N, shared) for chunk in chunks])
        return whole.view(tensor.shape)

    def _held(self, tensor: MergedTensor) -> tuple[Tensor, Tensor]:
        """The first member's copy and how far the others are from it: near ones differ exactly."""
        assert self._kept is not None
        if tensor.dense not in self._kept:
            wide = torch.promote_types(self.source.dtype, torch.float32)
            copies = self.matrices(tensor)
            first_X = next(copies).to(wide).flatten()
            away_MX = first_X.new_empty(len(self.source.member_names) - 1, len(first_X))
            for place, copy in enumerate(copies):
                torch.sub(copy.flatten(), first_X, out=away_MX[place])
            self._kept[tensor.dense] = first_X, away_MX
        return self._kept[tensor.dense]

    def _reducer(self, tensor: MergedTensor) -> Callable[[Tensor], None]:
        """A hook that adds <dW, W_i - W> to the block's row of sums, column 0 for the shared member."""
        row = self.rows[tensor.dense]
        columns = slice(0 if self.source.has_shared else 1, None)

        @torch.no_grad()
        def reduce(parameter: Tensor) -> None:
            if not self._last:
                return
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if self._kept is None:
                self._dots[row, columns] += self._streamed(tensor, parameter, gradient)
            else:
                self._dots[row, columns] += self._resident(tensor, gradient)

        return reduce

    def _resident(self, tensor: MergedTensor, gradient: Tensor) -> Tensor:
        _, away_MX = self._held(tensor)
        away_M = torch.mv(away_MX, gradient.flatten().to(away_MX.dtype)).double()
        dots_M = torch.cat([away_M.new_zeros(1), away_M])
        return dots_M - self._weights(self.rows[tensor.dense]).to(dots_M) @ dots_M

    def _streamed(self, tensor: MergedTensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ours = list(zip(parameter.view(-1).split(CHUNK), gradient.reshape(-1).split(CHUNK), strict=True))
        dots = []
        for matrix in self.matrices(tensor):
            pieces = zip(matrix.reshape(-1).split(CHUNK), ours, strict=True)
            found = [torch.dot(dw, piece.to(w.dtype) - w) for piece, (w, dw) in pieces]
            dots.append(torch.stack(found).double().sum())
        return torch.stack(dots)


@contextmanager
def last_states(model: PreTrainedModel, mask_BT: Tensor) -> Iterator[list[Tensor]]:
    """While open, a forward pass adds what the reward head's last matrix is given of each text, [B, D]."""
    found: list[Tensor] = []
    heads = [
        m for n, m in model.named_modules() if isinstance(m, nn.Linear) and in_head(model, f"{n}.weight")
    ]
    last_B = mask_BT.sum(1) - 1

    def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        found.append(x if x.ndim == 2 else x[torch.arange(len(x), device=x.device), last_B])

    handle = heads[-1].register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _fits(source: MergeSource, device: torch.device) -> bool:
    """Whether all members may stay in the device's memory."""
    count = source.num_members + source.has_shared
    size = sum(torch.Size(tensor.shape).numel() for tensor in source.tensors) * source.dtype.itemsize
    limit = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else KEPT_ON_CPU
    return count * size < limit

"""A merge in memory, and its gradient with respect to the merge coefficients.

The dense model is merged once per point. While a loss runs backward, each MLP weight's gradient dW is reduced
to the scalars <dW, W_i> the moment it is there, and freed: no graph reaches through the merge.

Shapes: L blocks, N weighted members (routed experts, or models), P pairs, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.coefficients.base import MergeGradient
from moemerge.families.dense import dense_class
from moemerge.scoring import collate, score_pairs
from moemerge.sources import MergedTensor, MergeSource

if TYPE_CHECKING:
    from moemerge.tokenise import EncodedPair

KEPT_ON_CPU = 2**30


class MergedModel:
    """The dense reward model whose merged tensors are the routing-normalised average of a source's members.

    `model` has the dense class, in eval mode; what is not merged (all but the MLPs, for a MoE) is the
    source's and frozen. Merged tensors change by `merge` only: they ask for gradients, but none outlives its
    hook. Averages are rounded to the members' dtype, as in the merged checkpoint. Members are read from disk
    whenever needed, unless they take less than a gibibyte, or on a GPU half of its free memory: then they are
    kept. Coefficients have a row per block; `blocks` are the layers unless given.
    """

    def __init__(
        self,
        source: MergeSource,
        alpha_LN: Tensor,
        shared_L: Tensor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        blocks: Sequence[str] | None = None,
    ) -> None:
        self.source, self.device = source, torch.device(device)
        self._kept: dict[str, list[Tensor]] | None = {} if _fits(source, self.device) else None
        self.alpha_LN, self.shared_L = alpha_LN.clone(), shared_L.clone()
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

    def gradient(self, pairs: Sequence[EncodedPair], micro_batch_size: int) -> MergeGradient:
        """Mean Bradley-Terry loss of `pairs` and its gradient at the present coefficients, float64 on CPU.

        alpha_LN lacks the same constant, (1 - lambda) <dW, W>, in all of a row: a softmax takes it out, and
        the rest rounds less. `micro_batch_size` pairs share a forward pass: memory, not the result.
        """
        self._dots.zero_()
        loss = 0.0
        by_length = sorted(pairs, key=lambda pair: -max(len(pair.chosen.ids), len(pair.rejected.ids)))
        with torch.enable_grad():
            for start in range(0, len(pairs), micro_batch_size):
                part = self._loss(by_length[start : start + micro_batch_size]) / len(pairs)
                part.backward()
                loss += part.item()
        dots = self._dots.cpu()
        shared_L, routed_LN = dots[:, 0], dots[:, 1:]
        shared_L = shared_L - (self.alpha_LN * routed_LN).sum(1)
        if not self.source.has_shared:
            shared_L = torch.zeros_like(shared_L)
        return MergeGradient(loss, (1 - self.shared_L)[:, None] * routed_LN, shared_L)

    def _build(self, dtype: torch.dtype) -> PreTrainedModel:
        tensors = {name: self.source.kept(name) for name in self.source.backbone}
        tensors |= {tensor.dense: self._average(tensor).cpu() for tensor in self.source.tensors}
        config = self.source.dense_config()
        model = dense_class(config).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        return cast(PreTrainedModel, torch.nn.Module.to(model.requires_grad_(False), self.device).eval())

    def _average(self, tensor: MergedTensor) -> Tensor:
        row = self.rows[tensor.dense]
        return self.source.average(self._matrices(tensor), self.alpha_LN[row], float(self.shared_L[row]))

    def _matrices(self, tensor: MergedTensor) -> Iterator[Tensor]:
        """The members' copies on the device: the shared one if any, then the N others."""
        stream = (matrix.to(self.device) for matrix in self.source.matrices(tensor))
        if self._kept is None:
            return stream
        if tensor.dense not in self._kept:
            self._kept[tensor.dense] = list(stream)
        return iter(self._kept[tensor.dense])

    def _reducer(self, tensor: MergedTensor) -> Callable[[Tensor], None]:
        """A hook that adds <dW, W_i - W> to the block's row of sums, column 0 for the shared member."""
        row = self.rows[tensor.dense]
        first = 0 if self.source.has_shared else 1

        @torch.no_grad()
        def reduce(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            for column, matrix in enumerate(self._matrices(tensor), start=first):
                away = matrix.to(parameter.dtype) - parameter
                self._dots[row, column] += torch.vdot(gradient.flatten(), away.flatten())

        return reduce

    def _loss(self, pairs: Sequence[EncodedPair]) -> Tensor:
        """Sum of -log sigmoid(chosen - rejected), float64."""
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        pad = self.model.config.get_text_config().pad_token_id
        scores_B = self.model(**collate(texts, pad, False, self.device)).logits[:, 0].double()
        return -logsigmoid(scores_B[: len(pairs)] - scores_B[len(pairs) :]).sum()


@dataclass
class PairObjective:
    """The merged model's loss on preference pairs; see coefficients.Objective.

    Bradley-Terry without margins: margins in the data are left to training.
    """

    merged: MergedModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[EncodedPair]
    held_out: Sequence[EncodedPair]
    micro_batch_size: int

    @property
    def num_train(self) -> int:
        """Number of training pairs."""
        return len(self.train)

    def gradient(self, alpha_LN: Tensor, shared_L: Tensor, rows: Sequence[int]) -> MergeGradient:
        """Loss and gradient over the training pairs number `rows`."""
        self.merged.merge(alpha_LN, shared_L)
        return self.merged.gradient([self.train[row] for row in rows], self.micro_batch_size)

    def margins(self, alpha_LN: Tensor, shared_L: Tensor, split: Literal["train", "held_out"]) -> Tensor:
        """score(chosen) - score(rejected) of every pair of the split, float64 on CPU."""
        self.merged.merge(alpha_LN, shared_L)
        pairs = self.train if split == "train" else self.held_out
        longest = max(len(text.ids) for pair in pairs for text in (pair.chosen, pair.rejected))
        batch_tokens = 2 * self.micro_batch_size * longest
        scores_P2 = score_pairs(self.merged.model, self.tokenizer, pairs, batch_tokens).double()
        return scores_P2[:, 0] - scores_P2[:, 1]


def _fits(source: MergeSource, device: torch.device) -> bool:
    """Whether all members may stay in the device's memory."""
    count = source.num_members + source.has_shared
    size = sum(torch.Size(tensor.shape).numel() for tensor in source.tensors) * source.dtype.itemsize
    limit = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else KEPT_ON_CPU
    return count * size < limit

"""A MoE merged in memory, and its gradient with respect to the merge coefficients.

The dense model is merged once per point. While a loss runs backward, each MLP weight's gradient dW is reduced
to the scalars <dW, W_i> the moment it is there, and freed: no graph reaches through the merge.

Shapes: L layers with experts, N routed experts, P pairs, B sequences.
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
from moemerge.families.base import ExpertTensor
from moemerge.families.dense import dense_class, dense_config
from moemerge.moe_checkpoint import MoeCheckpoint
from moemerge.scoring import collate, score_pairs

if TYPE_CHECKING:
    from moemerge.tokenise import EncodedPair

KEPT_ON_CPU = 2**30


class MergedModel:
    """The dense reward model whose MLPs are the routing-normalised average of a MoE's experts.

    `model` has the original dense class, in eval mode; everything but its MLPs comes from the MoE and is
    frozen. The MLPs change by `merge` only: they ask for gradients, but none outlives its hook. Averages are
    rounded to the experts' dtype, as in the merged checkpoint. Experts are read from disk whenever needed,
    unless they take less than a gibibyte, or on a GPU half of its free memory: then they are kept.
    """

    def __init__(
        self,
        source: MoeCheckpoint,
        alpha_LN: Tensor,
        shared_L: Tensor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source, self.device = source, torch.device(device)
        self._kept: dict[str, list[Tensor]] | None = {} if _fits(source, self.device) else None
        self.alpha_LN, self.shared_L = alpha_LN.clone(), shared_L.clone()
        self.model = self._build(dtype)
        columns = source.settings.num_routed_experts + 1
        self._dots = torch.zeros(len(shared_L), columns, dtype=torch.float64, device=self.device)
        for tensor in source.tensors:
            parameter = self.model.get_parameter(tensor.dense)
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(self._reducer(tensor))

    @torch.no_grad()
    def merge(self, alpha_LN: Tensor, shared_L: Tensor) -> None:
        """Set every MLP tensor to the average with these weights."""
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
        if not self.source.settings.shared_expert:
            shared_L = torch.zeros_like(shared_L)
        return MergeGradient(loss, (1 - self.shared_L)[:, None] * routed_LN, shared_L)

    def _build(self, dtype: torch.dtype) -> PreTrainedModel:
        tensors = {name: self.source.weights.tensor(name) for name in self.source.backbone}
        tensors |= {tensor.dense: self._average(tensor).cpu() for tensor in self.source.tensors}
        config = dense_config(self.source.config)
        model = dense_class(config).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        return cast(PreTrainedModel, torch.nn.Module.to(model.requires_grad_(False), self.device).eval())

    def _average(self, tensor: ExpertTensor) -> Tensor:
        return self.source.average(tensor, self._matrices(tensor), self.alpha_LN, self.shared_L)

    def _matrices(self, tensor: ExpertTensor) -> Iterator[Tensor]:
        """The experts' copies on the device: the shared one if any, then the routed ones."""
        stream = (matrix.to(self.device) for matrix in self.source.matrices(tensor))
        if self._kept is None:
            return stream
        if tensor.dense not in self._kept:
            self._kept[tensor.dense] = list(stream)
        return iter(self._kept[tensor.dense])

    def _reducer(self, tensor: ExpertTensor) -> Callable[[Tensor], None]:
        """A hook that adds <dW, W_i - W> to the layer's row of sums, column 0 for the shared expert."""
        row = self.source.settings.layers.index(tensor.layer)
        first = 0 if self.source.settings.shared_expert else 1

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


def _fits(source: MoeCheckpoint, device: torch.device) -> bool:
    """Whether all experts may stay in the device's memory."""
    count = source.settings.num_routed_experts + source.settings.shared_expert
    size = sum(torch.Size(tensor.shape).numel() for tensor in source.tensors) * source.dtype.itemsize
    limit = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else KEPT_ON_CPU
    return count * size < limit

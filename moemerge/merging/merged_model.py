"""A merge in memory, and its gradient with respect to the merge coefficients.

The dense model is merged once per point. While the last loss runs backward, each MLP weight's gradient dW is
reduced to the scalars <dW, W_i> the moment it is there, and freed: no graph reaches through the merge.

Shapes: L blocks, N weighted members (routed experts, or models), P pairs, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.data.tokenise import Encoded, EncodedPair, texts_of
from moemerge.merging.sources.base import MergedTensor, MergeSource
from moemerge.merging.weight_gradients import WeightGradient
from moemerge.models import processes
from moemerge.models.families.dense import dense_class
from moemerge.models.frozen_layers import FrozenLayers, run_frozen_once
from moemerge.models.pooling import padding, pooled_positions, pooled_states
from moemerge.models.scoring import collate, score_pairs
from moemerge.models.state_store import StateStore

KEPT_ON_CPU = 2**30
# Numbers handled at a time: what a core's cache holds of all that takes part.
CHUNK, CHUNK_ON_GPU = 2**15, 2**22


@dataclass(frozen=True)
class Answers:
    """A model's answers on P pairs: score(chosen) - score(rejected), float64; the last-token states of chosen
    and rejected, if they were asked for."""

    margins_P: Tensor
    states_2PD: Tensor | None = None


@dataclass(frozen=True)
class MergeGradient:
    """Loss of some pairs and its derivatives.

    `alpha_LN` may be off by one constant per row, which a softmax over the row takes out again.
    """

    loss: float
    alpha_LN: Tensor
    shared_L: Tensor


def batch_tokens(texts: Sequence[Encoded], micro_batch_size: int) -> int:
    """Tokens of a batch of `micro_batch_size` pairs, all as long as the longest text."""
    return 2 * micro_batch_size * max(len(text.ids) for text in texts)


def margins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    micro_batch_size: int,
    alone: bool = False,
) -> Tensor:
    """score(chosen) - score(rejected) of each pair, float64 on CPU, without gradients; `alone`: see score."""
    size = batch_tokens(texts_of(pairs), micro_batch_size)
    scores_P2 = score_pairs(model, tokenizer, pairs, size, alone=alone).double()
    return scores_P2[:, 0] - scores_P2[:, 1]


class MergedModel:
    """The dense reward model whose merged tensors are the routing-normalised average of a source's members.

    `model` has the dense class, in eval mode; what is not merged (all but the MLPs, for a MoE) is the
    source's and frozen. Merged tensors change by `merge` only: they ask for gradients, or `put_off` does for
    them, but none outlives `gradient`. A tensor in which all members are equal, as below the layers that
    people train, is never merged anew: it is what it is, and its derivatives are 0. Averages have the
    members' dtype; but for rounding they are the merged checkpoint's. On a CPU a MoE's experts of float32 are
    used where they lie, in mapped files. Other members are read whenever needed, unless they take less than a
    gibibyte, or on a GPU half of its free memory: then they are kept (`keep` decides if given). Coefficients
    have a row per block; `blocks` are the layers unless given.
    """

    in_parts = False  # whether several processes have to run it as often: see PartedModel

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
        if keep is None:
            keep = not self._can_map() and self._fits()
        self._mapped = not keep and self._can_map()
        self._whole: dict[str, Piece] | None = {} if keep or self._mapped else None
        self.alpha_LN, self.shared_L = alpha_LN.clone(), shared_L.clone()
        self._last = True
        self.rows = source.rows(source.blocks() if blocks is None else blocks)
        self.equal: set[str] = set()
        self.frozen: FrozenLayers | None = None
        self.model = self._build(dtype)
        columns = source.num_members + 1
        self._dots = torch.zeros(len(shared_L), columns, dtype=torch.float64, device=self.device)
        self.put_off: dict[str, WeightGradient] = {}
        for tensor in self._unequal():
            self._watch(tensor.dense, self._reducer(tensor))

    @classmethod
    def at_average(
        cls,
        source: MergeSource,
        device: torch.device | str,
        blocks: Sequence[str] | None = None,
        shared: float = 0.0,
    ) -> MergedModel:
        """At equal weights, in the members' dtype or float32; `shared` is the shared member's weight."""
        shape = (len(source.blocks() if blocks is None else blocks), source.num_members)
        alpha_LN = torch.full(shape, 1 / shape[1], dtype=torch.float64)
        shared_L = torch.full(shape[:1], shared, dtype=torch.float64)
        dtype = torch.promote_types(source.dtype, torch.float32)
        return cls(source, alpha_LN, shared_L, device, dtype, blocks)

    @torch.no_grad()
    def merge(self, alpha_LN: Tensor, shared_L: Tensor) -> None:
        """Set every merged tensor to the average with these weights."""
        if torch.equal(alpha_LN, self.alpha_LN) and torch.equal(shared_L, self.shared_L):
            return
        self.alpha_LN, self.shared_L = alpha_LN.clone(), shared_L.clone()
        for tensor in self._unequal():
            self._average(tensor, processes.own_part(self.model.get_parameter(tensor.dense)))

    def run_lower_layers_once(self, pair: EncodedPair, store: StateStore) -> None:
        """From now on `store` keeps, for each batch, the states below the first layer that `merge` changes.

        Results are the same bit for bit. `pair` is one to try it with: where it does not go, nothing changes.
        """

        def answers() -> list[Tensor]:
            found = self.answers([pair], states=True)
            assert found.states_2PD is not None
            return [found.margins_P, found.states_2PD]

        self.frozen = run_frozen_once(self.model, answers, store)

    def serve(self, owner: object, again: bool = True) -> None:
        """Say whose batches come next, and whether they come again as they are: see FrozenLayers.serve."""
        if self.frozen is not None:
            self.frozen.serve(owner, again)

    def gradient(
        self, parts: Iterable[Callable[[], Tensor]], idle: Callable[[], Tensor] | None = None
    ) -> MergeGradient:
        """Sum of the losses that `parts` compute with `model`, and its gradient at the present coefficients.

        Each part runs forward and backward before the next begins; the weights' gradients add up, and are
        reduced while the last part runs, so that members are read once. Summed over processes, float64 on
        CPU. alpha_LN lacks the same constant, (1 - lambda) <dW, W>, in all of a row: a softmax takes it out,
        and the rest rounds less. `idle` is for models in parts.
        """
        self._dots.zero_()
        loss = torch.zeros(1, dtype=torch.float64)
        parts = list(parts)
        with torch.enable_grad():
            for number, part in enumerate(parts, start=1):
                self._last = number == len(parts)
                value = part()
                # Where members differ in nothing that the model uses, a loss has no gradient: all are 0.
                if value.requires_grad:
                    value.backward()
                loss += value.item()
        self._reduce_all()
        # With W = lambda S + (1 - lambda) sum_i alpha_i W_i: dL/dalpha_i = (1 - lambda) <dW, W_i>, and
        # dL/dlambda = <dW, S> - sum_i alpha_i <dW, W_i>. The dots hold <dW, W_i - W>: in the second <dW, W>
        # falls out, as alpha sums to one; in the first it is the same constant for all i.
        dots = processes.summed(self._dots.cpu())
        shared_L, routed_LN = dots[:, 0], dots[:, 1:]
        shared_L = shared_L - (self.alpha_LN * routed_LN).sum(1)
        if not self.source.has_shared:
            shared_L = torch.zeros_like(shared_L)
        loss = processes.summed(loss)
        return MergeGradient(loss.item(), (1 - self.shared_L)[:, None] * routed_LN, shared_L)

    def answers(self, pairs: Sequence[EncodedPair], states: bool = False) -> Answers:
        """The model's answers on `pairs`, in one forward pass; gradients pass where they are on."""
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        with padding(self.model, texts) as pad:
            inputs = collate(texts, pad, False, self.device)
            with pooled_states(self.model, pooled_positions(inputs["input_ids"], pad)) as states_BD:
                scores_B = self.model(**inputs).logits[:, 0].double()
        half = len(pairs)
        states_2PD = states_BD[0].unflatten(0, (2, half)) if states else None
        return Answers(scores_B[:half] - scores_B[half:], states_2PD)

    def _build(self, dtype: torch.dtype) -> PreTrainedModel:
        # Copies: a view would keep its whole file mapped.
        tensors = {name: self.source.kept(name).clone() for name in self.source.backbone}
        empty = partial(torch.empty, device=self.device, dtype=self.source.dtype)
        tensors |= {t.dense: self._average(t, empty(t.shape), first=True).cpu() for t in self.source.tensors}
        config = self.source.dense_config()
        model = dense_class(config).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        return cast(PreTrainedModel, torch.nn.Module.to(model.requires_grad_(False), self.device).eval())

    def _unequal(self) -> list[MergedTensor]:
        """The tensors that members differ in."""
        return [tensor for tensor in self.source.tensors if tensor.dense not in self.equal]

    def matrices(self, tensor: MergedTensor) -> Iterator[Tensor]:
        """The members' copies on the device, read from disk: the shared one if any, then the N others."""
        return (matrix.to(self.device) for matrix in self.source.matrices(tensor))

    def _weights(self, row: int) -> Tensor:
        """Weight of each member, the shared one first if there is one."""
        shared = self.shared_L[row]
        routed = (1 - shared) * self.alpha_LN[row]
        return torch.cat([shared[None], routed]) if self.source.has_shared else routed

    @torch.no_grad()
    def _average(self, tensor: MergedTensor, out: Tensor, first: bool = False) -> Tensor:
        """`out`, filled with the average, which has the members' dtype; at `first` equal ones are noted."""
        weights_M, begin, out_X = self._weights(self.rows[tensor.dense]), 0, out.view(-1)
        equal = first
        for piece in self._pieces(tensor):
            end = begin + len(piece.first_X)
            piece.average(weights_M, self.source.dtype, out_X[begin:end])
            equal = equal and piece.is_one
            begin = end
        if equal:
            self.equal.add(tensor.dense)
            (self._whole or {}).pop(tensor.dense, None)  # not needed again
        return out

    def _can_map(self) -> bool:
        """Whether members can be used where they lie, in files that are mapped into memory."""
        return not self.in_parts and _mapped(self.source, self.device)

    def _fits(self) -> bool:
        return fits(self.source, self.device)

    def _own(self, matrix: Tensor) -> Tensor:
        """What this process has to do with of a member's copy."""
        return matrix

    def _reduce_all(self) -> None:
        """Reduce the gradients that nothing has reduced yet: none."""

    def _watch(self, name: str, reduce: Callable[[Tensor], None]) -> None:
        """Have `reduce` called with the gradient of a parameter, summed over a step's backward passes."""
        path, _, kind = name.rpartition(".")
        module, parameter = self.model.get_submodule(path), self.model.get_parameter(name)
        if type(module) is nn.Linear and kind == "weight":
            self.put_off[name] = WeightGradient(module, reduce, lambda: self._last)
            return

        # All but the weights of plain linears: autograd adds up their gradient, which the last part takes
        # away.
        def hook(parameter: Tensor) -> None:
            if self._last:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                reduce(gradient)

        parameter.requires_grad_(True).register_post_accumulate_grad_hook(hook)

    def _reducer(self, tensor: MergedTensor) -> Callable[[Tensor], None]:
        """What adds <dW, W_i - W> to the block's row of sums, column 0 for the shared member."""
        row = self.rows[tensor.dense]
        columns = slice(0 if self.source.has_shared else 1, None)

        @torch.no_grad()
        def reduce(gradient: Tensor) -> None:
            dots_M = torch.zeros(len(self.source.member_names), dtype=torch.float64, device=self.device)
            begin, gradient_X = 0, gradient.flatten()  # pieces are runs of the flattened tensor
            for piece in self._pieces(tensor):
                end = begin + len(piece.first_X)
                dots_M += piece.dots(gradient_X[begin:end])
                begin = end
            # Minus <dW, W>, the mean of the dots by the weights. It is common to all members and may be far
            # larger than what they differ in, which would round away as the block's tensors add up. Whether a
            # piece's dots are <dW, W_i> or <dW, W_i - W_0> makes no difference after that: the weights sum to
            # one.
            self._dots[row, columns] += dots_M - self._weights(row).to(dots_M) @ dots_M

        return reduce

    def _pieces(self, tensor: MergedTensor) -> Iterator[Piece]:
        """The members' copies: as they lie in a mapped file, or kept, or piece by piece."""
        if self._whole is not None:
            if tensor.dense not in self._whole:
                self._whole[tensor.dense] = self._whole_piece(tensor)
            yield self._whole[tensor.dense]
        else:
            size = CHUNK if self.device.type == "cpu" else CHUNK_ON_GPU
            matrices = map(self._own, self.source.matrices(tensor))
            copies = [matrix.reshape(-1).split(size) for matrix in matrices]
            yield from (_apart(chunks, self.device) for chunks in zip(*copies, strict=True))

    def _whole_piece(self, tensor: MergedTensor) -> Piece:
        if not self._mapped:
            return _apart([self._own(matrix) for matrix in self.source.matrices(tensor)], self.device)
        stack = self.source.stack(tensor)
        assert stack is not None
        shared, stack_NX = stack[0], stack[1].flatten(1)
        if shared is not None:
            return Piece(shared.flatten(), stack_NX, False)
        return Piece(stack_NX[0], stack_NX[1:], False)  # without a shared member expert 0 is the first


@dataclass(frozen=True)
class Piece:
    """X numbers of a tensor in all M members: the first one's copy, and the others' or how far they are off.

    Differences of near numbers are exact, and what is computed of them (`apart`) rounds less.
    """

    first_X: Tensor
    others_MX: Tensor
    apart: bool

    @property
    def is_one(self) -> bool:
        """Whether all copies are known to be equal: then `average` gives this copy whatever the weights."""
        return self.apart and not bool(self.others_MX.any())

    def average(self, weights_M: Tensor, dtype: torch.dtype, out_X: Tensor) -> None:
        """Write to `out_X` the sum of all copies with weights that sum to one, rounded to `dtype`."""
        # sum_i w_i W_i = W_0 + sum_i w_i (W_i - W_0), as the weights sum to one.
        share = 1.0 if self.apart else float(weights_M[0])
        terms = (self.first_X, self.others_MX.T, weights_M[1:].to(self.others_MX))
        # Rounded to the members' dtype, as the merged checkpoint is, even where the model computes in a wider
        # one.
        if out_X.dtype == dtype == self.first_X.dtype:
            torch.addmv(*terms, beta=share, out=out_X)
        else:
            out_X.copy_(torch.addmv(*terms, beta=share).to(dtype))

    def dots(self, gradient_X: Tensor) -> Tensor:
        """<dW, W_i> of each member, less <dW, W_0> if the others are kept apart from the first; float64."""
        gradient_X = gradient_X.to(self.others_MX.dtype)
        first = gradient_X.new_zeros(()) if self.apart else torch.dot(gradient_X, self.first_X)
        return torch.cat([first[None], torch.mv(self.others_MX, gradient_X)]).double()


def _apart(copies: Sequence[Tensor], device: torch.device) -> Piece:
    """The piece of these copies, the others as differences from the first, in float32 at least."""
    wide = torch.promote_types(copies[0].dtype, torch.float32)
    copies_MX = torch.stack([copy.reshape(-1) for copy in copies]).to(device, wide)
    copies_MX[1:] -= copies_MX[0]
    return Piece(copies_MX[0], copies_MX[1:], True)


def _mapped(source: MergeSource, device: torch.device) -> bool:
    """Whether members can be used where they lie, in files that are mapped into memory."""
    wide = source.dtype in (torch.float32, torch.float64)
    return device.type == "cpu" and wide and source.stack(source.tensors[0]) is not None


def fits(source: MergeSource, device: torch.device, parts: int = 1) -> bool:
    """Whether all members, or each process's part of them, may stay in the device's memory."""
    count = source.num_members + source.has_shared
    size = sum(torch.Size(tensor.shape).numel() for tensor in source.tensors) * source.dtype.itemsize
    limit = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else KEPT_ON_CPU
    return count * size < limit * parts

"""Gram matrices of the outputs that members' matrices give for the members' own inputs.

They are quadratic forms in the merge weights, which least_squares minimises.

Shapes: R real tokens, I width of a matrix's input, X outputs of a matrix for all tokens, L blocks, M members:
the shared one, then N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from moemerge.errors import CheckpointError
from moemerge.fitting.targets import Targets
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.base import MergedTensor


def output_grams(targets: Targets, blocks: int) -> Tensor:
    """G_LMM: w' G_l w = sum over the block's matrices and members i of |X_i (sum_j w_j W_j - W_i)'|^2.

    This holds for weights w with sum 1. X_i is what member i gives the matrix itself, being the dense model
    alone, on its own pairs, padding left out; one pass each, and nothing but G is kept. Biases take part. The
    shared member is no target; its row and column are 0 where there is none. Raises CheckpointError for
    outputs that are not finite.
    """
    merged = targets.merged
    size = merged.source.num_members + 1
    gram_LMM = torch.zeros(blocks, size, size, dtype=torch.float64)
    mask: list[Tensor] = []

    def note_mask(_: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        mask[:] = [kwargs["attention_mask"].bool()]

    handles = [merged.model.register_forward_pre_hook(note_mask, with_kwargs=True)]
    for module, weight, bias in matrices(merged):
        add = _gram_hook(merged, gram_LMM[merged.rows[weight.dense]], weight, bias, mask)
        handles.append(module.register_forward_pre_hook(add))
    try:
        # The hooks do the work; what the members say of their pairs is not needed.
        for _ in targets.by_member():
            pass
    finally:
        for handle in handles:
            handle.remove()
    if not bool(gram_LMM.isfinite().all()):
        raise CheckpointError(
            "members' matrices give outputs that are not finite",
            given=f"{int((~gram_LMM.isfinite()).flatten(1).any(1).sum())} of {blocks} blocks",
            expected="outputs whose squares float32 can add up",
            fix="check the members for NaN and for weights that are far too large; or choose method uniform",
        )
    return gram_LMM


def matrices(merged: MergedModel) -> Iterator[tuple[nn.Module, MergedTensor, MergedTensor | None]]:
    """The linear modules whose weights are merged, with weight and bias (None if it has none or keeps it)."""
    tensors = {tensor.dense: tensor for tensor in merged.source.tensors}
    for name, module in merged.model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" in tensors:
            yield module, tensors[f"{name}.weight"], tensors.get(f"{name}.bias")


def _gram_hook(
    merged: MergedModel, gram_MM: Tensor, weight: MergedTensor, bias: MergedTensor | None, mask: list[Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds to `gram_MM` the products of all members' outputs, less the running member's."""
    first = 0 if merged.source.has_shared else 1

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_RI = _real(inputs[0], mask[0])
        outputs = [
            linear(x_RI, (w.T if isinstance(module, Conv1D) else w).to(x_RI.dtype), b)
            for w, b in zip(merged.matrices(weight), _biases(merged, bias, x_RI), strict=False)
        ]
        out_MX = torch.stack(outputs).flatten(1)
        # The merged model is one member alone at the moment: the one whose alpha is 1 in every row.
        running = int(merged.alpha_LN[0].argmax()) + merged.source.has_shared
        # sum_j w_j W_j - W_i = sum_j w_j (W_j - W_i), as the weights sum to one. So the squared error is
        # w' A A' w with rows A_j = X_i (W_j - W_i)'. Differences first: they are near 0, and round less.
        away_MX = out_MX - out_MX[running]
        gram_MM[first:, first:] += (away_MX @ away_MX.T).double().cpu()

    return add


def _real(x: Tensor, mask_BT: Tensor) -> Tensor:
    """The rows of real tokens; what is pooled already has a row per text."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[mask_BT.flatten()] if len(rows) == mask_BT.numel() else rows


def _biases(merged: MergedModel, bias: MergedTensor | None, like: Tensor) -> Iterator[Tensor | None]:
    """The members' biases in the dtype of `like`; None without end if the module's bias is not merged."""
    # A bias that is kept is the same in all members, so it falls out of the differences.
    if bias is None:
        while True:
            yield None
    yield from (b.to(like.dtype) for b in merged.matrices(bias))

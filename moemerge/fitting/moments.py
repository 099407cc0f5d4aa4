"""What the members' matrices make of the members' own inputs, as quadratic forms in the merge weights.

Shapes: R real tokens, I width of a matrix's input, X outputs of a matrix for all tokens, L blocks, M members:
the shared one, then N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from moemerge.fitting.teachers import Lesson
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.base import MergedTensor


def moments(lesson: Lesson, blocks: int) -> Tensor:
    """S_LMM: w' S_l w = sum over the block's matrices and members i of |X_i (sum_j w_j W_j - W_i)'|^2.

    This holds for weights w with sum 1. X_i is what member i gives the matrix itself, being the dense model
    alone, on its own pairs, padding left out; one pass each, and nothing but S is kept. Biases take part. The
    shared member is no target; its row and column are 0 where there is none.
    """
    merged = lesson.merged
    size = merged.source.num_members + 1
    S_LMM = torch.zeros(blocks, size, size, dtype=torch.float64)
    mask: list[Tensor] = []

    def note(_: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        mask[:] = [kwargs["attention_mask"].bool()]

    handles = [merged.model.register_forward_pre_hook(note, with_kwargs=True)]
    for module, weight, bias in matrices(merged):
        watch = _watcher(merged, S_LMM[merged.rows[weight.dense]], weight, bias, mask)
        handles.append(module.register_forward_pre_hook(watch))
    try:
        for _ in lesson.members():
            pass
    finally:
        for handle in handles:
            handle.remove()
    return S_LMM


def matrices(merged: MergedModel) -> Iterator[tuple[nn.Module, MergedTensor, MergedTensor | None]]:
    """The linear modules whose weights are merged, with weight and bias (None if it has none or keeps it)."""
    tensors = {tensor.dense: tensor for tensor in merged.source.tensors}
    for name, module in merged.model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" in tensors:
            yield module, tensors[f"{name}.weight"], tensors.get(f"{name}.bias")


def _watcher(
    merged: MergedModel, S_MM: Tensor, weight: MergedTensor, bias: MergedTensor | None, mask: list[Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds the products of all members' outputs, less those of the member that runs."""
    first = 0 if merged.source.has_shared else 1

    def watch(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x_RI = _real(given[0], mask[0])
        outputs = [
            linear(x_RI, (w.T if isinstance(module, Conv1D) else w).to(x_RI.dtype), b)
            for w, b in zip(merged.matrices(weight), _biases(merged, bias, x_RI), strict=False)
        ]
        out_MX = torch.stack(outputs).flatten(1)
        away_MX = out_MX - out_MX[int(merged.alpha_LN[0].argmax()) + 1 - first]
        S_MM[first:, first:] += (away_MX @ away_MX.T).double().cpu()

    return watch


def _real(x: Tensor, mask_BT: Tensor) -> Tensor:
    """The rows of real tokens; what is pooled already has a row per text."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[mask_BT.flatten()] if len(rows) == mask_BT.numel() else rows


def _biases(merged: MergedModel, bias: MergedTensor | None, like: Tensor) -> Iterator[Tensor | None]:
    if bias is None:
        while True:
            yield None
    yield from (b.to(like.dtype) for b in merged.matrices(bias))

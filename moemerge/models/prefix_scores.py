"""Scores of a text's beginnings: what a decoder's reward head says at every token, by one pass.

B texts of a batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from moemerge.data.tokenise import Encoded
from moemerge.errors import UnsupportedError
from moemerge.models.head_tensors import output_layer
from moemerge.models.pooling import named_pad, padding
from moemerge.models.scoring import batches, forward, refuse_empty
from moemerge.models.token_limits import check_texts

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

CAUSAL = 0.02  # of the range of a text's scores: by so much later tokens may seem to move earlier ones


def prefix_scores(
    model: PreTrainedModel, encoded: Sequence[Encoded], batch_tokens: int
) -> list[NDArray[np.float64]]:
    """For each text, the scores of all its beginnings, [T]: of the first token alone, of two, ..., of all.

    They are what the model would give each of them by itself: a beginning that ends in the pad token is read
    before it. The head runs in float32, where the model's own may be coarser. The last one is the text's
    score. Batches as in scoring.score. Raises UnsupportedError for a model whose tokens see later ones,
    DataError for a text without tokens.
    """
    refuse_empty(encoded)
    check_texts(model, encoded)
    pad, found = named_pad(model.config), {}
    _refuse_encoder(model, encoded)
    for rows in batches([len(text.ids) for text in encoded], batch_tokens):
        scores_BT = _scores(model, [encoded[row] for row in rows])
        for row, scores_T in zip(rows, scores_BT.cpu().double().numpy(), strict=True):
            found[row] = scores_T[_pooled(encoded[row].ids, pad)]
    return [found[row] for row in range(len(encoded))]


def _pooled(ids: Sequence[int], pad: int | None) -> NDArray[np.int64]:
    """Where each beginning's score is read, [T]: at its last token unequal to `pad`, or the first."""
    numbers = np.arange(len(ids))
    return np.maximum.accumulate(numbers * (np.array(ids) != pad) if pad is not None else numbers)


@torch.inference_mode()
def _scores(model: PreTrainedModel, texts: Sequence[Encoded]) -> Tensor:
    """The head's output at each token, padding too; [B, T] float32."""
    head = model.get_submodule(output_layer(model))
    with padding(model, texts) as pad, _inputs_of(head) as states:
        forward(model, texts, pad)
    if states[0].ndim != 3:
        raise _sees_all(model, "it pools a text's states before it scores them")
    weights = {name: tensor.float() for name, tensor in head.named_parameters()}
    scores_BT1: Tensor = functional_call(head, weights, (states[0].float(),))
    return scores_BT1[..., 0]


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """While open, each call of `module` adds its first input."""
    states: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    try:
        yield states
    finally:
        handle.remove()


def _refuse_encoder(model: PreTrainedModel, encoded: Sequence[Encoded]) -> None:
    """Raise UnsupportedError if the first half of an answer scores otherwise without the rest of it."""
    text = max(encoded, key=lambda text: len(text.ids) - text.prompt_length, default=None)
    if text is None:
        return
    # The prompt stays whole: a gate may look at it.
    half = text.prompt_length + (len(text.ids) - text.prompt_length) // 2
    whole_T = _scores(model, [text])[0]
    if not 0 < half < len(text.ids):
        return
    alone_T = _scores(model, [Encoded(text.ids[:half], text.prompt_length)])[0]
    spread = (whole_T.max() - whole_T.min()).item()
    moved = (whole_T[:half] - alone_T).abs().max().item()
    if moved > CAUSAL * spread + 1e-5 * whole_T.abs().max().item():
        raise _sees_all(model, f"later tokens move the score of a beginning by {moved:.3g}")


def _sees_all(model: PreTrainedModel, why: str) -> UnsupportedError:
    return UnsupportedError(
        "the model cannot say what each token adds to a score",
        given=f"{type(model).__name__}: {why}",
        expected="a decoder, whose tokens see only those before them",
        fix="use a reward model made from a causal language model",
    )

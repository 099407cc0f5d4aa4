"""Whether two models are one function: their scores on a probe batch.

B sequences, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moemerge.data.tokenise import Encoded
from moemerge.errors import CheckpointError
from moemerge.models.pooling import named_pad, padding
from moemerge.models.scoring import collate

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def probe_texts(config: PreTrainedConfig, seed: int) -> list[Encoded]:
    """Two sequences of random tokens, none of them padding, the second half as long; four are the prompt."""
    generator = torch.Generator().manual_seed(seed)
    length = max(2, min(32, getattr(config, "max_position_embeddings", 64) // 2))
    ids_BT = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    pad = named_pad(config)
    if pad is not None:
        ids_BT[ids_BT == pad] = (pad + 1) % config.vocab_size
    return [Encoded(ids_BT[0].tolist(), 4), Encoded(ids_BT[1, : length // 2].tolist(), 4)]


@torch.inference_mode()
def probe_scores(model: Any, texts: list[Encoded], prompt_lengths: bool = False) -> Tensor:
    """Scores of the texts in one batch, float32 [B]; `prompt_lengths` go along if the model takes them."""
    with padding(model, texts) as pad:
        return model(**collate(texts, pad, prompt_lengths, model.device)).logits[:, 0].float()


def largest_difference(ours_B: Tensor, theirs_B: Tensor) -> float:
    """Largest difference of two models' scores."""
    return float((ours_B - theirs_B).abs().max())


def require_alike(ours_B: Tensor, theirs_B: Tensor, dtype: torch.dtype, what: str, fix: str) -> None:
    """Raise CheckpointError, `what` and how to `fix` it, if scores differ by more than `dtype` rounds."""
    difference = largest_difference(ours_B, theirs_B)
    bound = TOLERANCE[dtype] * max(1.0, float(theirs_B.abs().max()))
    if not difference <= bound:
        raise CheckpointError(
            what,
            given=f"scores differ by {difference:.2e}",
            expected=f"at most {bound:.0e} in {dtype}",
            fix=fix,
        )

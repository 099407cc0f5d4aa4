"""Whether two models are one function: their scores on a probe batch.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moemerge.errors import CheckpointError

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def probe_batch(config: PreTrainedConfig, seed: int, device: torch.device | str) -> dict[str, Tensor]:
    """Two sequences of random tokens, the second one padded on the right: input_ids and attention_mask."""
    generator = torch.Generator().manual_seed(seed)
    length = max(2, min(32, getattr(config, "max_position_embeddings", 64) // 2))
    ids_BT = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    ids_BT[ids_BT == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    mask_BT = torch.ones_like(ids_BT)
    ids_BT[1, length // 2 :], mask_BT[1, length // 2 :] = config.pad_token_id, 0
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}


@torch.inference_mode()
def probe_scores(model: Any, inputs: dict[str, Tensor], prompt_lengths: bool = False) -> Tensor:
    """Scores of the probe batch, float32 [B]; with `prompt_lengths` the first four tokens are the prompt."""
    device = inputs["input_ids"].device
    more = {"prompt_lengths": torch.tensor([4, 4], device=device)} if prompt_lengths else {}
    return model(**inputs, **more).logits[:, 0].float()


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

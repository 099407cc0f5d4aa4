"""What a reward head is given of whole texts, and what it says.

N texts, D width of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from moemerge.data.tokenise import Encoded
from moemerge.models.pooling import padding, pooled_positions, pooled_states
from moemerge.models.scoring import batches, collate, forward

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel


@torch.inference_mode()
def states_and_scores(
    model: PreTrainedModel, texts: Sequence[Encoded], batch_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the head is given of each text, [N, D], and what it says, [N]; float64."""
    states_ND: dict[int, NDArray[np.float64]] = {}
    scores_N = np.zeros(len(texts))
    with padding(model, texts) as pad:
        for rows in batches([len(text.ids) for text in texts], batch_tokens):
            batch = [texts[row] for row in rows]
            ids_BT = collate(batch, pad, False, model.device)["input_ids"]
            with pooled_states(model, pooled_positions(ids_BT, pad)) as states:
                scores_N[rows] = forward(model, batch, pad)[:, 0].double().cpu().numpy()
            states_ND |= zip(rows, states[0].double().cpu().numpy(), strict=True)
    return np.stack([states_ND[row] for row in range(len(texts))]), scores_N

"""Causal models that read texts a token at a time, with keys and values kept (a KV cache).

R rows of a batch, T tokens, V words of the vocabulary (1 of a reward model).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moemerge.data.tokenise import Encoded
from moemerge.errors import UnsupportedError, first_line
from moemerge.models.pooling import padding
from moemerge.models.prefix_scores import prefix_scores
from moemerge.models.scoring import gates_by_prompt

PROBE = 48  # tokens of each text that the check reads
CLOSE = 0.05  # of the range of scores: by so much a cache may move them, as by rounding in bfloat16


class TokenSteps:
    """Texts that grow by a token at a time, of which each token is read once.

    outputs_RV: what the model says behind each row's last token: the logits of a language model, or the one
    score of a reward model, which it reads at its last token that is not its pad token.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
        self._model, self._cache = model, None
        longest = max(map(len, rows))
        with padding(model, [Encoded(list(ids), 0) for ids in rows]) as pad:
            ids_RT = torch.tensor([[pad] * (longest - len(ids)) + [*ids] for ids in rows])
        mask_RT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows])
        self._mask_RT = mask_RT.to(model.device)
        self.outputs_RV = self._read(ids_RT.to(model.device))

    def step(self, ids_R: Tensor) -> Tensor:
        """Read one token more of each row; the new outputs_RV."""
        self._mask_RT = torch.cat([self._mask_RT, torch.ones_like(self._mask_RT[:, :1])], dim=1)
        self.outputs_RV = self._read(ids_R[:, None])
        return self.outputs_RV

    def spread(self, count: int) -> None:
        """Have each row `count` times, one beside the other."""
        cache: Any = self._cache
        cache.batch_repeat_interleave(count)
        self._mask_RT = self._mask_RT.repeat_interleave(count, dim=0)

    def keep(self, rows_R: Tensor) -> None:
        """Have the rows of these numbers, as many as there were; a row may be there several times."""
        cache: Any = self._cache
        cache.reorder_cache(rows_R)
        self._mask_RT = self._mask_RT[rows_R]

    @torch.inference_mode()
    def _read(self, ids_RT: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids_RT, "attention_mask": self._mask_RT, "use_cache": True}
        if _takes(self._model, "position_ids"):
            # Rows are padded on the left: positions count from the first real token.
            positions_RT = (self._mask_RT.cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_RT[:, -ids_RT.shape[1] :]
        if _takes(self._model, "logits_to_keep"):
            inputs["logits_to_keep"] = 1
        with padding(self._model, []):
            output = self._model(**inputs, past_key_values=self._cache)
        self._cache = output.past_key_values
        logits: Tensor = output.logits
        return (logits[:, -1] if logits.ndim == 3 else logits).float()


def _takes(model: PreTrainedModel, name: str) -> bool:
    """Whether its forward, or that of the class which it is made from, has an argument of this name."""
    forwards = (vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind))
    return any(name in inspect.signature(forward).parameters for forward in forwards)


def why_not_by_steps(model: PreTrainedModel, texts: Sequence[Encoded], batch_tokens: int) -> str:
    """Why a reward model's scores of beginnings cannot be had a token at a time; "" if they can.

    It is measured, on the longest and the shortest text: rows of unequal length, doubled and chosen from,
    have to score as in one pass, to `CLOSE` of the scores' range.
    """
    if gates_by_prompt(model):
        return "its gates look at the whole prompt"
    by_length = sorted((text for text in texts if len(text.ids) > 3), key=lambda text: len(text.ids))
    if not by_length:
        return "no text is long enough to check it"
    rows = [text.ids[:PROBE] for text in (by_length[-1], by_length[0])]
    try:
        whole = prefix_scores(model, [Encoded(ids, 0) for ids in rows], batch_tokens)
        moved = _furthest(TokenSteps(model, [ids[:-2] for ids in rows]), rows, [s[-2:] for s in whole])
    except UnsupportedError as refused:
        return refused.given
    except Exception as error:  # a model's class may raise anything where it knows no cache
        return f"{type(error).__name__}: {first_line(error)}"
    spread = max(float(scores_T.max() - scores_T.min()) for scores_T in whole)
    largest = max(float(abs(scores_T).max()) for scores_T in whole)
    if moved <= CLOSE * spread + 4 * torch.finfo(model.dtype).eps * largest:
        return ""
    return f"{type(model).__name__} with a cache moves a score by {moved:.3g}"


def _furthest(steps: TokenSteps, rows: Sequence[Sequence[int]], wanted: Sequence[Any]) -> float:
    """How far the scores of the last two tokens lie from those `wanted`, at most."""
    furthest, device = 0.0, steps.outputs_RV.device
    steps.spread(2)
    for place in (-2, -1):
        ids_R = torch.tensor([ids[place] for ids in rows for _ in range(2)], device=device)
        goals = [scores_T[place] for scores_T in wanted for _ in range(2)]
        scores_R = steps.step(ids_R)[:, 0].tolist()
        furthest = max(furthest, *(abs(a - b) for a, b in zip(scores_R, goals, strict=True)))
        steps.keep(torch.tensor([2, 3, 0, 1], device=device))  # the two texts change places
        rows, wanted = rows[::-1], wanted[::-1]
    return furthest

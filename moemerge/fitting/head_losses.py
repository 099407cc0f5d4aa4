"""What replacing attention heads does to a language model's verdicts, mask by mask.

M masks, L layers, H heads, E numbers of a head, T tokens.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from moemerge.data.tokenise import Encoded
from moemerge.models.attention_heads import AttentionHeads
from moemerge.models.language_model import LanguageModel

CLOSE = 0.02  # nats by which a cache may move log-odds, as by rounding

log = logging.getLogger(__name__)


@dataclass
class HeadLosses:
    """Questions whose right verdicts are known, and a model whose heads can have `values_LHE`.

    verdicts: the tokens of the good and of the bad one. good_Q: whether a question's right one is the good
    one. Replaced is what heads give at the last token only, so that all masks share what stands before it.
    """

    model: LanguageModel
    heads: AttentionHeads
    values_LHE: Tensor
    questions: Sequence[Encoded]
    good_Q: Sequence[bool]
    verdicts: Sequence[int]
    batch_tokens: int
    with_cache: bool = True

    def __post_init__(self) -> None:
        device = self.model.trunk.device
        self.values_LHE = self.values_LHE.to(device)
        self.with_cache = self.with_cache and self._cache_agrees()

    def __len__(self) -> int:
        return len(self.questions)

    def of(self, number: int, masks_MLH: Tensor) -> Tensor:
        """-log p of a question's right verdict, of the two, with each mask's heads replaced; [M] float64."""
        odds_M = self._log_odds(self.questions[number], masks_MLH)
        return softplus(-odds_M if self.good_Q[number] else odds_M)

    def mean(self, masks_MLH: Tensor) -> Tensor:
        """The mean over all questions, [M]."""
        return torch.stack([self.of(number, masks_MLH) for number in range(len(self))]).mean(0)

    @torch.inference_mode()
    def _log_odds(self, text: Encoded, masks_MLH: Tensor) -> Tensor:
        masks_MLH = masks_MLH.to(self.model.trunk.device)
        chunks = masks_MLH.split(max(1, self.batch_tokens // len(text.ids)))
        run = self._after_cache if self.with_cache and len(text.ids) > 1 else self._whole
        logits_M2 = torch.cat(run(text, chunks)).double().cpu()
        return logits_M2[:, 0] - logits_M2[:, 1]

    def _whole(self, text: Encoded, chunks: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for masks_CLH in chunks:
            texts = [text] * len(masks_CLH)
            with self.heads.replacing(self.model.ends(texts), self.values_LHE, masks_CLH):
                found.append(self.model.next_logits(texts, self.verdicts))
        return found

    def _after_cache(self, text: Encoded, chunks: Sequence[Tensor]) -> list[Tensor]:
        trunk = self.model.trunk
        ids_1T = torch.tensor([text.ids], device=trunk.device)
        before: Any = trunk(input_ids=ids_1T[:, :-1], use_cache=True).past_key_values
        words_2 = torch.tensor(list(self.verdicts), device=trunk.device)
        found = []
        for masks_CLH in chunks:
            count, cache = len(masks_CLH), copy.deepcopy(before)
            cache.batch_repeat_interleave(count)
            inputs = {
                "input_ids": ids_1T[:, -1:].expand(count, 1),
                "attention_mask": torch.ones_like(ids_1T).expand(count, -1),
            }
            first_C = torch.zeros(count, dtype=torch.long, device=trunk.device)
            with self.heads.replacing(first_C, self.values_LHE, masks_CLH):
                states_C1D = trunk(**inputs, past_key_values=cache, use_cache=True)[0]
            found.append(self.model.head.logits(states_C1D[:, -1], words_2))
        return found

    @torch.inference_mode()
    def _cache_agrees(self) -> bool:
        """Whether a question's log-odds are the same with a cache and without, none or all replaced."""
        text = max(self.questions, key=lambda question: len(question.ids))
        none_LH = torch.zeros(self.heads.shape[:2], dtype=torch.bool, device=self.model.trunk.device)
        masks_2LH = torch.stack([none_LH, ~none_LH])
        if len(text.ids) < 2:
            return False
        try:
            found, wanted = (torch.cat(run(text, [masks_2LH])) for run in (self._after_cache, self._whole))
        except Exception as error:  # a model's class may raise anything where it knows no cache
            log.info("heads are tried without a cache: %s", error)
            return False
        scale = 1.0 + float(wanted.abs().max())
        rounding = 8 * torch.finfo(self.model.trunk.dtype).eps * scale
        return bool((found - wanted).abs().max() <= CLOSE + rounding)

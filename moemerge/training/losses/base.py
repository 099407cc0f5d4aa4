"""What an objective of training is.

Shapes: P training pairs, B of them in a batch, 2B texts with the chosen ones first, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from moemerge.artifacts.workspace import once
from moemerge.data.tokenise import EncodedPair
from moemerge.errors import DataError
from moemerge.models.folder import ModelFolder
from moemerge.models.language_head import LanguageHead, open_language_head
from moemerge.options.train import Train


@dataclass(frozen=True)
class Batch:
    """B pairs that the model has just answered, padded on the right.

    prompts_2B: tokens of each text that are its prompt's. places_B: the pairs' places among the training
    pairs. step: updates before this one. pooled_2BD: what the head's last matrix was given. states_2BTD: the
    trunk's last states, which a language head would be given. The last two are None unless a loss asks.
    """

    scores_2B: Tensor
    ids_2BT: Tensor
    mask_2BT: Tensor
    prompts_2B: Tensor
    places_B: Tensor
    step: int
    pooled_2BD: Tensor | None = None
    states_2BTD: Tensor | None = None

    @property
    def differences_B(self) -> Tensor:
        """Score of chosen minus score of rejected."""
        chosen_B, rejected_B = self.scores_2B.chunk(2)
        return chosen_B - rejected_B


@dataclass(frozen=True)
class Loss:
    """`of(batch)`: the loss of each pair, [B]. `pooled` and `states`: what of a batch it looks at."""

    of: Callable[[Batch], Tensor]
    pooled: bool = False
    states: bool = False


@dataclass(frozen=True)
class Course:
    """What a loss may look at when it is made, before the first step: all pairs and the model as it starts.

    autocast: the precision that training will have. pad: what pads batches. home: a folder where what takes
    long is kept, for a run that is killed and started again.
    """

    options: Train
    model: PreTrainedModel
    pairs: Sequence[EncodedPair]
    pad: int
    home: Path
    autocast: Callable[[], AbstractContextManager[None]]

    @cached_property
    def language_head(self) -> LanguageHead:
        """The language head on the model's trunk, one for all losses.

        Raises as open_language_head; DataError if no prompt's tokens are known, so that answers have no
        beginning.
        """
        self._require_prompts()
        o = self.options
        own, given = (
            ModelFolder(source, o.trust_remote_code, o.fresh_head) if source else None
            for source in (o.model, o.language_head)
        )
        assert own is not None
        return open_language_head(self.model, own, given)

    def kept(self, name: str, make: Callable[[], list[float]]) -> list[float]:
        """What `make` gives: made once, and kept for a run that goes on after a kill."""
        return cast("list[float]", once(self.home / f"{name}.json", make))

    def _require_prompts(self) -> None:
        prompted = [pair for pair in self.pairs if pair.pair.prompt]
        if prompted and not any(pair.chosen.prompt_length for pair in prompted):
            raise DataError(
                "the objectives policy and language do not know where answers begin",
                given=f"{len(prompted)} pairs with prompts, none of which the tokenizer encodes alone",
                expected="a chat template that renders prompts without answers, or prompts as text",
                fix="use another chat template, or take policy and language out of objectives",
            )


MakeLoss = Callable[[Course], Loss]

"""What an objective of training is.

Shapes: P training pairs, B of them in a batch, 2B texts with the chosen ones first, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from moemerge.data.tokenise import EncodedPair
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


MakeLoss = Callable[[Course], Loss]

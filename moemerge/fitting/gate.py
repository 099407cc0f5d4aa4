"""Which expert of a MoE suits which prompt: measured by forcing each, then fitted to the prompts' states.

Shapes: L layers with experts, N routed experts, P pairs, Q distinct prompts, B texts of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import log_expit
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.data.pairs import numbered, prompt_key
from moemerge.data.tokenise import EncodedPair, texts_of
from moemerge.fitting.ridge import Ridge, ridge
from moemerge.merging.calibration import QUARTILE
from moemerge.models.moe import moe_layers
from moemerge.models.scoring import score
from moemerge.reports.statistics import Floats, Integers

SURE = 50.0  # a logit beside zeros: softmax gives the others less than float32 can tell from 0


class _Told(nn.Module):
    """Stands in for a router: chooses as told, and hands on the prompts' states that it is shown."""

    def __init__(self, choice: _Choice, layer: int) -> None:
        super().__init__()
        self.choice, self.layer = choice, layer

    def forward(self, x_BD: Tensor) -> Tensor:
        expert_B = torch.tensor(self.choice.experts, device=x_BD.device)
        self.choice.keep(self.layer, self.choice.rows, x_BD)
        return SURE * nn.functional.one_hot(expert_B, self.choice.num_experts).to(x_BD.dtype)


class _Choice:
    """The expert of each text, and of the texts of the batch that runs; `keep` takes layer, rows, states."""

    def __init__(
        self, num_experts: int, experts: Integers, keep: Callable[[int, list[int], Tensor], None]
    ) -> None:
        self.num_experts, self.all_experts, self.keep = num_experts, experts, keep
        self.rows: list[int] = []

    @property
    def experts(self) -> list[int]:
        """Of the batch that runs."""
        return [int(self.all_experts[row]) for row in self.rows]

    def on_batch(self, rows: list[int]) -> None:
        """Take the batch of these texts to be the one that runs."""
        self.rows = rows


@contextmanager
def _told(model: PreTrainedModel, choice: _Choice) -> Iterator[None]:
    """While open, `choice` stands in place of every router."""
    layers = moe_layers(model)
    routers = {number: layer.gate for number, layer in layers.items()}
    for place, layer in enumerate(layers.values()):
        layer.gate = _Told(choice, place)
    try:
        yield
    finally:
        for number, layer in layers.items():
            layer.gate = routers[number]


def utilities(margins_NP: Floats, prompt_P: Integers) -> Floats:
    """Mean of log sigmoid(margin / scale) over each prompt's pairs, minus the experts' mean; [Q, N].

    An expert's scale is the median of its |margins| over 0.6745, so that no expert wins by being loud.
    """
    scale_N1 = np.median(np.abs(margins_NP), axis=1, keepdims=True) / QUARTILE
    likely_NP = log_expit(margins_NP / np.maximum(scale_N1, np.finfo(float).tiny))
    sums_QN = np.zeros((int(prompt_P.max()) + 1, len(margins_NP)))
    np.add.at(sums_QN, prompt_P, likely_NP.T)
    mean_QN = sums_QN / np.bincount(prompt_P)[:, None]
    return mean_QN - mean_QN.mean(axis=1, keepdims=True)


class Passes:
    """Passes of the pairs through a MoE whose experts are chosen from outside, the same one in all layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[EncodedPair],
        tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.texts, layers = texts_of(pairs), moe_layers(model)
        self.num_experts = next(iter(layers.values())).settings.num_routed_experts
        self.prompt_P = np.array(numbered(prompt_key(pair.pair) for pair in pairs))
        shape = (len(layers), int(self.prompt_P.max()) + 1, model.config.get_text_config().hidden_size)
        self.states_LQD = np.zeros(shape)

    def margins(self, expert_Q: Integers, progress: str) -> Floats:
        """Score of chosen minus rejected with these experts, [P]; `states_LQD` holds what the routers saw."""
        both_sides = expert_Q[self.prompt_P].repeat(2)
        choice = _Choice(self.num_experts, both_sides, self._keep)
        with _told(self.model, choice):
            scores = score(self.model, self.tokenizer, self.texts, self.tokens, progress, choice.on_batch)
        scores_P2 = scores.double().view(-1, 2).numpy()
        return np.asarray(scores_P2[:, 0] - scores_P2[:, 1])

    def _keep(self, layer: int, rows: list[int], x_BD: Tensor) -> None:
        # A decoder's prompt has the same states under each of its answers: the last one written stays.
        self.states_LQD[layer, self.prompt_P[np.array(rows) // 2]] = x_BD.double().cpu().numpy()


@dataclass(frozen=True)
class Fitted:
    """A ridge regression per layer, and what routing by them is worth; shares of pairs that are right.

    routed: each prompt's expert chosen by the other prompts; single: the expert that is right most often,
    alone; known: each prompt's best expert, which only its own labels tell. agreement: share of prompts for
    which all layers choose as the first one does, each prompt left out.
    """

    layers: list[Ridge]
    routed: float
    single: float
    known: float
    agreement: float


def fit_gate(passes: Passes) -> Fitted:
    """The routers, layer by layer, from what each expert makes of the pairs.

    The first one regresses the prompts' utilities on its states. The others are to choose as it does, since
    no mix of experts over layers has been measured: they regress its predictions of prompts that were left
    out, on their states with the expert chosen so below them.
    """
    count_Q = np.bincount(passes.prompt_P).astype(np.float64)
    every_NQ = np.arange(passes.num_experts)[:, None].repeat(len(count_Q), axis=1)
    margins_NP = np.stack([passes.margins(expert_Q, f"expert {expert_Q[0]}") for expert_Q in every_NQ])
    utility_QN = utilities(margins_NP, passes.prompt_P)
    first = ridge(passes.states_LQD[0], utility_QN, count_Q)
    chosen_Q = first.left_out_QN.argmax(axis=1)
    routed_P = passes.margins(chosen_Q, "states")
    upper = [ridge(x_QD, first.left_out_QN, count_Q) for x_QD in passes.states_LQD[1:]]
    same_LQ = np.stack([layer.left_out_QN.argmax(axis=1) == chosen_Q for layer in (first, *upper)])
    known_P = margins_NP[utility_QN.argmax(axis=1)[passes.prompt_P], np.arange(len(passes.prompt_P))]
    return Fitted(
        [first, *upper],
        routed=float((routed_P > 0).mean()),
        single=float((margins_NP > 0).mean(axis=1).max()),
        known=float((known_P > 0).mean()),
        agreement=float(same_LQ.all(axis=0).mean()),
    )

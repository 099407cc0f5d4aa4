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
        if self.choice.keep is not None:
            self.choice.keep(self.layer, self.choice.rows, x_BD)
        return SURE * nn.functional.one_hot(expert_B, self.choice.num_experts).to(x_BD.dtype)


class _Choice:
    """The experts of the batch that runs, by `of`: row of a text -> expert."""

    def __init__(
        self,
        num_experts: int,
        of: Callable[[int], int],
        keep: Callable[[int, list[int], Tensor], None] | None,
    ) -> None:
        self.num_experts, self.of, self.keep = num_experts, of, keep
        self.rows: list[int] = []
        self.experts: list[int] = []

    def on_batch(self, rows: list[int]) -> None:
        self.rows, self.experts = rows, [self.of(row) for row in rows]


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


@dataclass(frozen=True)
class Judged:
    """What each expert, alone in all layers, makes of the pairs, and the prompts' states.

    margins_NP: score of chosen minus rejected. prompt_P: number of each pair's prompt. states_LQD: what each
    layer's router sees of a prompt whose best expert runs below it.
    """

    margins_NP: Floats
    prompt_P: Integers
    states_LQD: Floats

    @property
    def count_Q(self) -> Floats:
        """Pairs of each prompt."""
        return np.bincount(self.prompt_P).astype(np.float64)

    @property
    def utility_QN(self) -> Floats:
        """See `utilities`."""
        return utilities(self.margins_NP, self.prompt_P)


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


def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[EncodedPair], tokens: int
) -> Judged:
    """Score the pairs with each expert alone, then once more to see the states below the best ones."""
    texts, layers = texts_of(pairs), moe_layers(model)
    count = next(iter(layers.values())).settings.num_routed_experts
    prompt_P = np.array(numbered(prompt_key(pair.pair) for pair in pairs))

    def scored(progress: str, choice: _Choice) -> Floats:
        with _told(model, choice):
            scores_P2 = score(model, tokenizer, texts, tokens, progress, choice.on_batch).view(-1, 2)
        return (scores_P2[:, 0] - scores_P2[:, 1]).double().numpy()

    def alone(expert: int) -> Floats:
        return scored(f"expert {expert}", _Choice(count, lambda row: expert, None))

    margins_NP = np.stack([alone(expert) for expert in range(count)])
    best_Q = utilities(margins_NP, prompt_P).argmax(axis=1)
    states_LQD = np.zeros((len(layers), len(best_Q), int(model.config.get_text_config().hidden_size)))

    def keep(layer: int, rows: list[int], x_BD: Tensor) -> None:
        # A decoder's prompt has the same states under each of its answers: the last one written stays.
        states_LQD[layer, prompt_P[np.array(rows) // 2]] = x_BD.double().cpu().numpy()

    scored("states", _Choice(count, lambda row: int(best_Q[prompt_P[row // 2]]), keep))
    return Judged(margins_NP, prompt_P, states_LQD)


@dataclass(frozen=True)
class Fitted:
    """A ridge regression per layer, and what routing by them is worth; shares of pairs that are right.

    routed: each prompt's expert chosen by the other prompts (first layer with experts); single: the expert
    that is right most often, alone; known: each prompt's best expert, which only its own labels tell.
    agreement: share of prompts for which all layers choose the same expert, each left out.
    """

    layers: list[Ridge]
    routed: float
    single: float
    known: float
    agreement: float


def fit_gate(judged: Judged) -> Fitted:
    """Each layer's router: the prompts' utilities regressed on the states that the layer sees (ridge)."""
    utility_QN, count_Q = judged.utility_QN, judged.count_Q
    layers = [ridge(x_QD, utility_QN, count_Q) for x_QD in judged.states_LQD]
    chosen_LQ = np.stack([layer.left_out_QN.argmax(axis=1) for layer in layers])

    def right(expert_Q: Integers) -> float:
        of_P = expert_Q[judged.prompt_P]
        return float((judged.margins_NP[of_P, np.arange(len(of_P))] > 0).mean())

    return Fitted(
        layers,
        routed=right(chosen_LQ[0]),
        single=float((judged.margins_NP > 0).mean(axis=1).max()),
        known=right(utility_QN.argmax(axis=1)),
        agreement=float((chosen_LQ == chosen_LQ[0]).all(axis=0).mean()),
    )

"""What objectives learn from besides labels: the MoE's scores, the members' answers, whose inputs pairs are.

Shapes: P pairs, B texts, T tokens, N weighted members, K experts per token, D width of the last state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.errors import OptionError
from moemerge.families.dense import is_moe
from moemerge.fit_settings import FitSettings
from moemerge.merged_model import Answers, MergedModel
from moemerge.modelling import load_moe
from moemerge.moe import Gating, moe_layers
from moemerge.scoring import collate, score_pairs
from moemerge.tokenise import EncodedPair


@dataclass
class Lesson:
    """Pairs, and what is known of them; each thing is computed when it is first asked for, and once.

    A MoE is loaded whole for its scores or its routing. Members are merged one after the other into `merged`.
    """

    merged: MergedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: Sequence[EncodedPair]
    settings: FitSettings

    @cached_property
    def teacher_P(self) -> Tensor:
        """score(chosen) - score(rejected) of the MoE, or the mean of the models' (base left out), float64."""
        source = self.merged.source
        if not is_moe(source.config):
            members = range(source.num_members)
            return torch.stack([self._margins(member) for member in members]).mean(0)
        scores_P2 = score_pairs(self._moe(), self.tokenizer, self.pairs, self._batch_tokens).double()
        return scores_P2[:, 0] - scores_P2[:, 1]

    @cached_property
    def owners_PN(self) -> Tensor:
        """Whose own inputs a pair is, rows summing to one.

        settings.owners decides by subset. Else a pair of a MoE is the expert's whose gate mass on it is
        largest, relative to that expert's mean; models share all pairs alike. OptionError for a wrong owner.
        """
        count = self.merged.source.num_members
        if self.settings.owners:
            return torch.stack([self._owner_N(pair.pair.subset, count) for pair in self.pairs])
        if not is_moe(self.merged.source.config):
            return torch.full((len(self.pairs), count), 1 / count, dtype=torch.float64)
        mass_PN = gate_mass(self._moe(), self.pairs, self.settings.micro_batch_size)
        winner_P = (mass_PN / mass_PN.mean(0).clamp(min=1e-12)).argmax(1)
        return torch.nn.functional.one_hot(winner_P, count).double()

    @cached_property
    def own(self) -> Answers:
        """What each pair's owners say of it, the mean of several; on the CPU."""
        owners_PN = self.owners_PN
        margins_P = torch.zeros(len(self.pairs), dtype=torch.float64)
        states_2PD: Tensor | None = None
        for member, rows, answers in self.members():
            assert answers.states_2PD is not None
            share_B = owners_PN[rows, member]
            margins_P[rows] += share_B * answers.margins_P.cpu()
            if states_2PD is None:
                states_2PD = torch.zeros(2, len(self.pairs), answers.states_2PD.shape[2], dtype=torch.float64)
            states_2PD[:, rows] += share_B[None, :, None] * answers.states_2PD.cpu().double()
        return Answers(margins_P, states_2PD)

    @torch.no_grad()
    def members(self) -> Iterator[tuple[int, list[int], Answers]]:
        """Each member's answers on its own pairs, a micro-batch at a time: member, pairs' numbers, answers.

        While one is given, `merged` holds that member, in every block.
        """
        for member in range(self.merged.source.num_members):
            owned = self.owners_PN[:, member].nonzero()[:, 0].tolist()
            for begin in range(0, len(owned), self.settings.micro_batch_size):
                rows = owned[begin : begin + self.settings.micro_batch_size]
                self._become(member)
                yield member, rows, self.merged.answers([self.pairs[row] for row in rows], states=True)

    def _become(self, member: int) -> None:
        alpha_LN = torch.zeros_like(self.merged.alpha_LN)
        alpha_LN[:, member] = 1
        self.merged.merge(alpha_LN, torch.zeros_like(self.merged.shared_L))

    def _margins(self, member: int) -> Tensor:
        self._become(member)
        scores_P2 = score_pairs(self.merged.model, self.tokenizer, self.pairs, self._batch_tokens).double()
        return scores_P2[:, 0] - scores_P2[:, 1]

    @property
    def _batch_tokens(self) -> int:
        longest = max(len(text.ids) for pair in self.pairs for text in (pair.chosen, pair.rejected))
        return 2 * self.settings.micro_batch_size * longest

    def _moe(self) -> PreTrainedModel:
        return load_moe(self.merged.source.folder, str(self.merged.device))

    def _owner_N(self, subset: str, count: int) -> Tensor:
        owner = self.settings.owners.get(subset)
        if owner is not None and 0 <= owner < count:
            return torch.nn.functional.one_hot(torch.tensor(owner), count).double()
        raise OptionError(
            "a pair has no owner",
            given=f"subset {subset!r}, owners {self.settings.owners}",
            expected=f"for every subset the number of a member, 0 to {count - 1}",
            fix="name an owner for this subset, or give no owners at all",
        )


@torch.no_grad()
def gate_mass(model: PreTrainedModel, pairs: Sequence[EncodedPair], batch_size: int) -> Tensor:
    """Mean routed gate mass of each expert over each pair's tokens and all layers of a MoE, [P, N]."""
    layers = moe_layers(model)
    found = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        texts = [text for pair in batch for text in (pair.chosen, pair.rejected)]
        sums: list[Tensor] = []
        for layer in layers.values():
            layer.observer = _adder(sums, len(texts))
        inputs = collate(texts, model.config.get_text_config().pad_token_id, True, model.device)
        model(**inputs)
        found.append(torch.stack(sums).sum(0).view(len(batch), 2, -1).sum(1))
    mass_PN = torch.cat(found)
    return mass_PN / mass_PN.sum(1, keepdim=True)


def _adder(sums: list[Tensor], count: int) -> Callable[[Gating], None]:
    """An observer that adds each text's routed gate mass, [B, N]."""

    def add(gating: Gating) -> None:
        weights_TN = torch.zeros_like(gating.probabilities_TN)
        weights_TN.scatter_(1, gating.index_TK, gating.weights_TK.to(weights_TN.dtype))
        weights_TN *= gating.mask_T[:, None]
        sums.append(weights_TN.view(count, -1, weights_TN.shape[1]).sum(1).double().cpu())

    return add

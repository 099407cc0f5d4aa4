"""What coefficients are fitted to besides labels: the MoE's scores, the members' answers on their own pairs.

Shapes: P pairs, B of them at a time, T texts, L layers, N weighted members, D width of the last state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.data.tokenise import EncodedPair, texts_of
from moemerge.errors import OptionError
from moemerge.merging.merged_model import Answers, MergedModel, batch_tokens, margins
from moemerge.models.families.dense import is_moe
from moemerge.models.loading import load_reward_model
from moemerge.models.modelling import moe_to_look_at
from moemerge.models.routing import gate_mass
from moemerge.options.fit import FitSettings
from moemerge.options.placement import Placement


@dataclass
class Targets:
    """Pairs, and what the MoE or its members say of them; each is computed when first asked for, and once.

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
        return margins(self._moe(), self.tokenizer, self.pairs, self.settings.micro_batch_size)

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
        mass_PN = pair_gate_mass(self._moe(), self.tokenizer, self.pairs, self.settings.micro_batch_size)
        # Relative to its mean: an expert that the router favours everywhere would else own every pair.
        winner_P = (mass_PN / mass_PN.mean(0).clamp(min=1e-12)).argmax(1)
        return torch.nn.functional.one_hot(winner_P, count).double()

    @property
    def _all_own_all(self) -> bool:
        """Whether each member answers the same batches."""
        return not self.settings.owners and not is_moe(self.merged.source.config)

    @cached_property
    def of_owners(self) -> Answers:
        """What each pair's owners answer on it, the mean of several; on the CPU."""
        owners_PN = self.owners_PN
        margins_P = torch.zeros(len(self.pairs), dtype=torch.float64)
        states_2PD: Tensor | None = None
        for member, rows, answers in self.by_member():
            assert answers.states_2PD is not None
            # Shares of a pair sum to one over its owners: what is added up is their mean.
            share_B = owners_PN[rows, member]
            margins_P[rows] += share_B * answers.margins_P.cpu()
            if states_2PD is None:
                states_2PD = torch.zeros(2, len(self.pairs), answers.states_2PD.shape[2], dtype=torch.float64)
            states_2PD[:, rows] += share_B[None, :, None] * answers.states_2PD.cpu().double()
        return Answers(margins_P, states_2PD)

    @torch.no_grad()
    def by_member(self) -> Iterator[tuple[int, list[int], Answers]]:
        """Each member's answers on its own pairs, a micro-batch at a time: member, pairs' numbers, answers.

        While a batch is out, `merged` is that member, in every block.
        """
        for member in range(self.merged.source.num_members):
            owned = self.owners_PN[:, member].nonzero()[:, 0].tolist()
            for begin in range(0, len(owned), self.settings.micro_batch_size):
                rows = owned[begin : begin + self.settings.micro_batch_size]
                self._become(member)  # anew each time: whoever takes the batches may merge something else
                self.merged.serve(self, again=self._all_own_all)
                yield member, rows, self.merged.answers([self.pairs[row] for row in rows], states=True)

    def _become(self, member: int) -> None:
        """Make `merged` the member alone, in every block, without the shared one."""
        alpha_LN = torch.zeros_like(self.merged.alpha_LN)
        alpha_LN[:, member] = 1
        self.merged.merge(alpha_LN, torch.zeros_like(self.merged.shared_L))

    def _margins(self, member: int) -> Tensor:
        self._become(member)
        self.merged.serve(self)
        return margins(self.merged.model, self.tokenizer, self.pairs, self.settings.micro_batch_size)

    def _moe(self) -> PreTrainedModel:
        source, device = self.merged.source.folder, self.merged.device
        if self.merged.in_parts:
            return load_reward_model(source, device, placement=Placement(sharded=True))
        return moe_to_look_at(source, str(device))

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


def pair_gate_mass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    micro_batch_size: int,
) -> Tensor:
    """Each expert's share of a MoE's routed gate mass on each pair, over all layers, [P, N]."""
    texts = texts_of(pairs)
    _, mass_TLN = gate_mass(model, tokenizer, texts, batch_tokens(texts, micro_batch_size))
    mass_PN = mass_TLN.sum(1).unflatten(0, (len(pairs), 2)).sum(1)
    return mass_PN / mass_PN.sum(1, keepdim=True)

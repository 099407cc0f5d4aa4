"""Alignment with the members, without labels. Shapes: P pairs, B at a time, D width of the last state."""

from __future__ import annotations

from torch import Tensor

from moemerge.fitting.objectives.base import Term, of_rows
from moemerge.fitting.targets import Targets
from moemerge.merging.merged_model import Answers

SMALLEST = 1e-12


def alignment(targets: Targets) -> Term:
    """Squared distance to each member's last-token states and score differences on that member's own pairs.

    Both parts are relative to the members' mean square, so that they weigh alike. A pair that several members
    own is drawn towards the mean of their answers: its squared distance is the mean of the squared distances
    to each, less a constant (their variance).
    Source: layer-wise alignment on unlabelled inputs, Expert Merging (2025; repository
    Littleor/ExpertMerging), with score differences in place of logits.
    """
    wanted = targets.of_owners
    assert wanted.states_2PD is not None
    states_P2D = wanted.states_2PD.transpose(0, 1)
    # In units of the targets' own mean square: states and score differences have no common scale.
    state_unit = float(states_P2D.square().mean().clamp(min=SMALLEST))
    score_unit = float(wanted.margins_P.square().mean().clamp(min=SMALLEST))

    def loss(answers: Answers, rows: Tensor) -> Tensor:
        assert answers.states_2PD is not None
        now_B2D = answers.states_2PD.transpose(0, 1).double()
        states_B2D = now_B2D - of_rows(states_P2D, rows, now_B2D)
        scores_B = answers.margins_P - of_rows(wanted.margins_P, rows, answers.margins_P)
        return states_B2D.square().mean((1, 2)) / state_unit + scores_B.square() / score_unit

    return Term(loss, states=True)

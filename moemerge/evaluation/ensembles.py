"""Ensembles of reward models: several models' scores of a text made into one (arXiv 2310.02743).

M members, C texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moemerge.errors import OptionError, suggest
from moemerge.evaluation.report import TimedFacts
from moemerge.options.evaluate import Evaluate


def combine(scores_MC: Tensor, how: str, penalty: float) -> Tensor:
    """One score per text, [C]: the members' mean, the worst of them, or mean - penalty * variance.

    `how` is mean, worst (WCO) or variance (UWO; population variance over members).
    """
    if how == "worst":
        return scores_MC.amin(dim=0)
    mean_C = scores_MC.mean(dim=0)
    return mean_C - penalty * scores_MC.var(dim=0, correction=0) if how == "variance" else mean_C


def ensemble_scores(
    options: Evaluate, scores: Mapping[str, Sequence[Tensor]], scales: Mapping[str, float]
) -> dict[str, list[Tensor]]:
    """Scores of every ensemble on every set, float64, from those of its members.

    A reward has no zero, as training sees differences only, so each member's scores are taken from their
    own mean over all texts: else a member that is low throughout would always be the worst. Nor has it a
    unit: they are divided by the member's scale, where `scales` has it, else the loudest would decide.
    """
    centred = {
        model: _centred(scores[model], scales.get(model, 1.0)) for model in scores if options.ensembles
    }
    return {
        name: [
            combine(torch.stack(of_set), how, options.variance_penalty)
            for of_set in zip(*(centred[member] for member in members), strict=True)
        ]
        for name, (members, how) in options.combinations().items()
    }


def _centred(sets: Sequence[Tensor], scale: float) -> list[Tensor]:
    mean = torch.cat(list(sets)).double().mean()
    return [(scores_C.double() - mean) / scale for scores_C in sets]


def ensemble_facts(options: Evaluate, models: Mapping[str, TimedFacts]) -> dict[str, TimedFacts]:
    """Of every ensemble what evaluate reports of a model: costs are its members' sums, tokens the first's."""
    facts: dict[str, TimedFacts] = {}
    for name, (members, how) in options.combinations().items():
        of_members = [models[member] for member in members]
        facts[name] = {
            "source": ", ".join(members),
            "class": f"{how} of {len(members)}",
            "tokens": of_members[0]["tokens"],
            "parameters": sum(member["parameters"] for member in of_members),
            "active_parameters": sum(member["active_parameters"] for member in of_members),
            "flops_per_token": sum(member["flops_per_token"] for member in of_members),
            "seconds": sum(member["seconds"] for member in of_members),
        }
    return facts


def check_ensembles(options: Evaluate) -> None:
    """Raise OptionError for an ensemble of unknown models, or one that is called like a model."""
    for name, members in options.ensembles.items():
        unknown = [member for member in members if member not in options.models]
        if unknown:
            raise OptionError(
                f"ensemble {name} has an unknown model",
                given=unknown[0],
                expected=f"one of: {', '.join(options.models)}",
                fix=suggest(unknown[0], options.models),
            )
    for name in options.combinations().keys() & options.models.keys():
        raise OptionError(
            "an ensemble is called like a model",
            given=name,
            expected="a name of its own",
            fix="rename the ensemble",
        )

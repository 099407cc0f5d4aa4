"""Which parameters of a reward model are experts', and which are routers'."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from moemerge.models.families import family_of
from moemerge.models.moe import moe_layers


def roles_of(model: PreTrainedModel) -> dict[str, str]:
    """Which is which, experts or routers, by parameter. Experts of a dense model are its MLPs."""
    # By identity, as names differ from family to family.
    parts: list[tuple[str, nn.Module]] = []
    for layer in moe_layers(model).values():
        experts = [layer.experts, *([layer.shared_expert] if layer.shared_expert is not None else [])]
        parts += [("routers", layer.router), *(("experts", part) for part in experts)]
    if not parts:
        family = family_of(model.config)
        _, layers = family.dense_layers(model)
        parts = [("experts", part) for layer in layers for part in family.linears(layer).values()]
    roles = {id(weight): role for role, part in parts for weight in part.parameters()}
    return {name: roles[id(weight)] for name, weight in model.named_parameters() if id(weight) in roles}

"""What makes a dense model's config a MoE's, as it stands in config.json, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from moemerge.errors import CheckpointError, suggest

GATES, ROUTERS, BALANCE_LOSSES = ("xft", "topk", "prompt"), ("linear", "mlp"), ("cv", "switch")
HEADS = SHARED, BY_EXPERT = "shared", "by_expert"


@dataclass(frozen=True)
class MoeSettings:
    """What makes a dense model's config a MoE's; stored in the config as the field `moemerge`.

    `dense_dtype` is that of the dense checkpoint, for the merge to give back: training widens to float32.
    `heads`: one for all texts, or under a prompt gate with one expert per prompt one for each expert.
    """

    num_routed_experts: int
    num_experts_per_tok: int
    shared_expert: bool
    layers: list[int]
    gate: str
    gate_shared_weight: float
    router: str
    router_init_std: float
    balance_coefficient: float
    balance_loss: str
    dense_dtype: str
    heads: str = SHARED  # not in the configs of older MoEs

    @classmethod
    def read(cls, values: dict[str, Any]) -> MoeSettings:
        """Settings from a config's field; CheckpointError when a key is unknown or missing."""
        known = {field.name for field in fields(cls)}
        for name in sorted((values.keys() | {"heads"}) ^ known):
            raise CheckpointError(
                "the MoE config cannot be read",
                given=f"{'unknown' if name in values else 'missing'} key {name!r}",
                expected=f"the keys {', '.join(sorted(known))}",
                fix=suggest(name, known) + " or use the moemerge version that wrote it",
            )
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        """CheckpointError for values of another type, or out of range."""
        numbers = (self.gate_shared_weight, self.router_init_std, self.balance_coefficient)
        texts = (self.gate, self.router, self.balance_loss, self.dense_dtype)
        layers = self.layers if isinstance(self.layers, list) and self.layers else [-1]
        whole = [self.num_routed_experts, self.num_experts_per_tok, *layers]
        sound = (
            all(type(value) in (int, float) and 0 <= value < float("inf") for value in numbers)
            and all(type(value) is str for value in texts)
            and all(type(value) is int and value >= 0 for value in whole)
            and 1 <= self.num_experts_per_tok <= self.num_routed_experts
            and type(self.shared_expert) is bool
            and self.gate in GATES
            and self.router in ROUTERS
            and self.balance_loss in BALANCE_LOSSES
            and self.heads in HEADS
            and (self.heads == SHARED or self.picks_one_expert)
            and isinstance(getattr(torch, self.dense_dtype, None), torch.dtype)
        )
        if not sound:
            raise CheckpointError(
                "the MoE config cannot be read",
                given=str(self)[:300],
                expected="numbers, texts and layers as upcycle writes them",
                fix="copy the MoE again whole, or make it again",
            )

    @property
    def picks_one_expert(self) -> bool:
        """Whether each prompt goes through one routed expert and no other."""
        return self.gate == "prompt" and self.num_experts_per_tok == 1 and not self.shared_expert

    def to_dict(self) -> dict[str, Any]:
        """The values as they stand in the config."""
        return asdict(self)

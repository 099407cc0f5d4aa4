"""The supported architectures as docs/architectures.md lists them."""

from __future__ import annotations

from moemerge.models.families import FAMILIES
from moemerge.models.families.base import Family


def table() -> str:
    """A Markdown table: one row per kind of MLP, with its model types, decoders before encoders."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, family in FAMILIES.items():
        kind = ("decoder" if family.causal else "encoder", _mlp(family))
        rows.setdefault(kind, []).append(f"`{name}`")
    lines = [f"| {kind} | {mlp} | {', '.join(names)} |" for (kind, mlp), names in sorted(rows.items())]
    return "\n".join(["| model | MLP | `model_type` |", "|---|---|---|", *lines])


def _mlp(family: Family) -> str:
    matrices = dict(family.matrices)
    if "gate_up" in matrices:
        return "gated, fused"
    return "gated" if "gate" in matrices else "plain"

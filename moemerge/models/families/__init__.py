"""Architectures, by the model_type of their dense config. To add one: a row in gated, plain or encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.errors import UnsupportedError
from moemerge.models.families.base import PREFIX, Family
from moemerge.models.families.encoders import ENCODERS
from moemerge.models.families.gated import GATED
from moemerge.models.families.plain import PLAIN
from moemerge.models.families.refused import REFUSED
from moemerge.registry import Registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in sorted((*GATED, *PLAIN, *ENCODERS), key=lambda family: family.model_type)
}

# Those of other packages, by model_type.
ADDED: Registry[Family] = Registry(
    "architecture", {}, group="families", needs=("layers", "block", "matrices")
)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a dense or MoE config; as `family_called`."""
    return family_called(config.model_type.removeprefix(PREFIX))


def known_family(name: str) -> Family | None:
    """The family of a dense model_type, if there is one. UnsupportedError if its package is broken."""
    return FAMILIES[name] if name in FAMILIES else ADDED.get(name) if name in ADDED else None


def family_called(name: str) -> Family:
    """The family of a dense model_type. Raises UnsupportedError, with the reason where there is one."""
    if family := known_family(name):
        return family
    if name in REFUSED:
        raise UnsupportedError(
            f"this architecture cannot be upcycled: {REFUSED[name]}",
            given=f"model_type {name!r}",
            expected=f"one of: {', '.join(FAMILIES)}",
            fix="use a reward model of a supported architecture",
        )
    raise UnsupportedError(
        "this architecture is not supported",
        given=f"model_type {name!r}",
        expected=f"one of: {', '.join(FAMILIES)}",
        fix="use a reward model of a supported architecture, or add a family (moemerge/models/families)",
    )

"""Architectures, by the model_type of their dense config. To add one: one file and one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.errors import UnsupportedError
from moemerge.registry import Registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from moemerge.families.base import Family

FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "bert": "moemerge.families.bert:FAMILY",
        "gemma2": "moemerge.families.gemma2:FAMILY",
        "llama": "moemerge.families.llama:FAMILY",
        "mistral": "moemerge.families.mistral:FAMILY",
        "qwen2": "moemerge.families.qwen2:FAMILY",
        "qwen3": "moemerge.families.qwen3:FAMILY",
    },
)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a dense or MoE config. Raises UnsupportedError, naming those that are known."""
    name = config.model_type.removeprefix("moemerge_")
    if name in FAMILIES:
        return FAMILIES.get(name)
    raise UnsupportedError(
        "this architecture is not supported",
        given=f"model_type {name!r}",
        expected=f"one of: {', '.join(FAMILIES)}",
        fix="use a reward model of a supported architecture, or add a family (one file in moemerge/families)",
    )

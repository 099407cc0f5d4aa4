"""Qwen3: gated MLP."""

from moemerge.families.base import Family

FAMILY = Family("qwen3")

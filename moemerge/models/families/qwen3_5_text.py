"""Qwen3.5, text only: gated MLP."""

from moemerge.models.families.base import Family

FAMILY = Family("qwen3_5_text")

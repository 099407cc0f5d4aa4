"""Gemma 3, text only: gated MLP between its own pair of norms."""

from moemerge.models.families.base import Family

FAMILY = Family("gemma3_text", activation="hidden_activation")

"""Gemma 2: gated MLP between its own pair of norms."""

from moemerge.models.families.base import Family

FAMILY = Family("gemma2", activation="hidden_activation")

"""Gemma: gated MLP."""

from moemerge.models.families.base import Family

FAMILY = Family("gemma")

"""EXAONE 4: gated MLP."""

from moemerge.models.families.base import Family

FAMILY = Family("exaone4")

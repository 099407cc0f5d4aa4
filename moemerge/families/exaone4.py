"""EXAONE 4: gated MLP."""

from moemerge.families.base import Family

FAMILY = Family("exaone4")

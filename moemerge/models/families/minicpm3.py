"""MiniCPM3: gated MLP."""

from moemerge.models.families.base import Family

FAMILY = Family("minicpm3")

"""MiniCPM3: gated MLP."""

from moemerge.families.base import Family

FAMILY = Family("minicpm3")

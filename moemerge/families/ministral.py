"""Ministral: gated MLP."""

from moemerge.families.base import Family

FAMILY = Family("ministral")

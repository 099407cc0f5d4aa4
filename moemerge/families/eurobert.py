"""EuroBERT: gated MLP."""

from moemerge.families.base import Family

FAMILY = Family("eurobert", causal=False)

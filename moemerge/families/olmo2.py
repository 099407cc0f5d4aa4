"""OLMo 2: gated MLP."""

from moemerge.families.base import Family

FAMILY = Family("olmo2")

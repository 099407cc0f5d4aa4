"""HunYuan dense: gated MLP."""

from moemerge.families.base import Family

FAMILY = Family("hunyuan_v1_dense")

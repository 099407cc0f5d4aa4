"""HunYuan dense: gated MLP."""

from moemerge.models.families.base import Family

FAMILY = Family("hunyuan_v1_dense")

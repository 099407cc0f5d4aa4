"""Seed-OSS: gated MLP with dropout."""

from moemerge.models.families.base import Family

FAMILY = Family("seed_oss", dropout="residual_dropout")

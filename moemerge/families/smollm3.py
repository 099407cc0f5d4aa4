"""SmolLM3: gated MLP."""

from moemerge.families.base import Family

FAMILY = Family("smollm3")

"""BioGPT: the MLP's matrices and activation stand in the layer itself."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "biogpt", block="fc1", matrices=(("up", "fc1"), ("down", "fc2")), bypass=("activation_fn", "fc2")
)

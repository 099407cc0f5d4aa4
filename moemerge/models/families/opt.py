"""OPT: the MLP's matrices and activation stand in the layer itself."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "opt",
    layers="decoder.layers",
    block="fc1",
    matrices=(("up", "fc1"), ("down", "fc2")),
    bypass=("activation_fn", "fc2"),
    activation="activation_function",
)

"""BERT: the MLP spans two modules, `intermediate` and the linear in `output`, which keeps its norm."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "bert",
    layers="encoder.layer",
    block="intermediate",
    matrices=(("up", "intermediate.dense"), ("down", "output.dense")),
    bypass=("output.dense",),
    causal=False,
)

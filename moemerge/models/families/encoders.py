"""Encoders: a prompt's states see the answer, so that the prompt gate is not for them."""

from dataclasses import replace

from moemerge.models.families.base import Family

# BERT's MLP spans two modules, `intermediate` and the linear in `output`, which keeps its norm.
BERT = Family(
    "bert",
    layers="encoder.layer",
    block="intermediate",
    matrices=(("up", "intermediate.dense"), ("down", "output.dense")),
    bypass=("output.dense",),
    causal=False,
)
AS_BERT = (
    "camembert",
    "data2vec-text",
    "deberta",
    "deberta-v2",  # DeBERTa v2 and v3
    "electra",
    "ernie",
    "megatron-bert",
    "mpnet",
    "rembert",
    "roberta",
    "roformer",
    "xlm-roberta",
)

ENCODERS = (
    BERT,
    *(replace(BERT, model_type=name) for name in AS_BERT),
    Family(
        "distilbert",
        layers="transformer.layer",
        block="ffn",
        matrices=(("up", "ffn.lin1"), ("down", "ffn.lin2")),
        activation="activation",
        dropout="dropout",
        causal=False,
    ),
    Family("eurobert", causal=False),  # gated
    Family(  # gated, gate and up fused
        "modernbert",
        matrices=(("gate_up", "mlp.Wi"), ("down", "mlp.Wo")),
        activation="hidden_activation",
        causal=False,
    ),
)

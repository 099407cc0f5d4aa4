"""Decoders whose MLP has no gate: down(act(up(x)))."""

from moemerge.models.families.base import Family

PROJ = (("up", "mlp.up_proj"), ("down", "mlp.down_proj"))
NEOX = (("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h"))
GPT2 = (("up", "mlp.c_fc"), ("down", "mlp.c_proj"))
LAYER = (("up", "fc1"), ("down", "fc2"))

PLAIN = (
    Family("arcee", matrices=PROJ),  # squared ReLU
    # BioGPT and OPT: matrices and activation stand in the layer itself.
    Family("biogpt", block="fc1", matrices=LAYER, bypass=("activation_fn", "fc2")),
    # BLOOM and MPT: the MLP adds the residual itself.
    Family("bloom", "h", matrices=NEOX, fixed_activation="gelu_fast", dropout="hidden_dropout"),
    Family("falcon", "h", matrices=NEOX, activation="activation"),
    # GPT-2 stores weights as [in, out].
    Family(
        "gpt2",
        "h",
        matrices=GPT2,
        activation="activation_function",
        dropout="resid_pdrop",
        transposed=True,
    ),
    Family("gpt_bigcode", "h", matrices=GPT2, activation="activation_function", dropout="resid_pdrop"),
    Family("gpt_neo", "h", matrices=GPT2, activation="activation_function", dropout="resid_dropout"),
    Family("gpt_neox", matrices=NEOX),  # GPT-NeoX and Pythia
    Family(
        "gptj",
        "h",
        matrices=(("up", "mlp.fc_in"), ("down", "mlp.fc_out")),
        activation="activation_function",
        dropout="resid_pdrop",
    ),
    Family(
        "mpt",
        "blocks",
        block="ffn",
        matrices=(("up", "ffn.up_proj"), ("down", "ffn.down_proj")),
        fixed_activation="gelu",
        dropout="attn_config.attn_pdrop",
    ),
    Family("nemotron", matrices=PROJ),  # squared ReLU
    Family(
        "opt",
        "decoder.layers",
        block="fc1",
        matrices=LAYER,
        bypass=("activation_fn", "fc2"),
        activation="activation_function",
    ),
    Family("persimmon", matrices=NEOX),
    Family("phi", matrices=(("up", "mlp.fc1"), ("down", "mlp.fc2"))),  # Phi-1 to Phi-2
    Family("starcoder2", matrices=GPT2, dropout="residual_dropout"),
)

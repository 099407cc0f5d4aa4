"""Architectures whose reward models cannot be upcycled here: the reason, by model_type."""

from moemerge.models.families.siblings import SIBLINGS

MOE = "it is a mixture of experts already"
TWO_STACKS = "it has two stacks of layers, encoder and decoder"
SHARED = "its layers share one MLP, so that layers cannot have experts of their own"
IMAGES = "it reads images besides text"
PADS = "it pads or shortens sequences inside, so that the experts cannot know which tokens are real"
BOXES = "it reads the places of words on a page, which preference pairs lack"

REFUSED = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "gpt_oss",
            "jamba",
            "jetmoe",
            "minimax",
            "mistral4",
            "phimoe",
            "qwen3_next",
        ),
        MOE,
    ),
    **{name: f"{MOE}; moemerge merge makes a {sibling.dense} of it" for name, sibling in SIBLINGS.items()},
    **dict.fromkeys(
        (
            "bart",
            "bigbird_pegasus",
            "mbart",
            "mt5",
            "mvp",
            "plbart",
            "t5",
            "t5gemma",
            "t5gemma2",
            "umt5",
        ),
        TWO_STACKS,
    ),
    **dict.fromkeys(("albert", "zamba", "zamba2"), SHARED),
    **dict.fromkeys(("layoutlmv2", "layoutlmv3", "modernvbert", "ultravbert"), IMAGES),
    "gemma3": f"{IMAGES}; its text model, gemma3_text, is supported",
    "qwen3_5": f"{IMAGES}; its text model, qwen3_5_text, is supported",
    **dict.fromkeys(("big_bird", "canine", "funnel", "longformer", "reformer"), PADS),
    **dict.fromkeys(("layoutlm", "lilt"), BOXES),
    "convbert": "its MLP may be cut into groups",
    "flaubert": "its MLPs stand in a list beside the layers",
    "fnet": "it takes no attention mask, so that padding changes its scores",
    "gte": "only some of its MLP's matrices have biases",
    "ibert": "its MLP is quantised",
    "mobilebert": "each of its layers has several MLPs",
    "nomic_bert": "its checkpoints name tensors otherwise than its class does",
    "perceiver": "its MLPs see latents in place of tokens",
    "squeezebert": "its MLP is made of convolutions",
    "xlm": "its MLPs stand in a list beside the layers",
    "xlnet": "its states are laid out with tokens before sequences",
}

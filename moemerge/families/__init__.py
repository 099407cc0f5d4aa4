"""Architectures, by the model_type of their dense config. To add one: one file and one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.errors import UnsupportedError
from moemerge.families.refused import REFUSED
from moemerge.registry import Registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from moemerge.families.base import Family

FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "arcee": "moemerge.families.arcee:FAMILY",
        "bert": "moemerge.families.bert:FAMILY",
        "biogpt": "moemerge.families.biogpt:FAMILY",
        "bloom": "moemerge.families.bloom:FAMILY",
        "camembert": "moemerge.families.camembert:FAMILY",
        "data2vec-text": "moemerge.families.data2vec_text:FAMILY",
        "deberta": "moemerge.families.deberta:FAMILY",
        "deberta-v2": "moemerge.families.deberta_v2:FAMILY",
        "diffllama": "moemerge.families.diffllama:FAMILY",
        "distilbert": "moemerge.families.distilbert:FAMILY",
        "electra": "moemerge.families.electra:FAMILY",
        "ernie": "moemerge.families.ernie:FAMILY",
        "eurobert": "moemerge.families.eurobert:FAMILY",
        "exaone4": "moemerge.families.exaone4:FAMILY",
        "falcon": "moemerge.families.falcon:FAMILY",
        "gemma": "moemerge.families.gemma:FAMILY",
        "gemma2": "moemerge.families.gemma2:FAMILY",
        "gemma3_text": "moemerge.families.gemma3_text:FAMILY",
        "glm": "moemerge.families.glm:FAMILY",
        "glm4": "moemerge.families.glm4:FAMILY",
        "gpt2": "moemerge.families.gpt2:FAMILY",
        "gpt_bigcode": "moemerge.families.gpt_bigcode:FAMILY",
        "gpt_neo": "moemerge.families.gpt_neo:FAMILY",
        "gpt_neox": "moemerge.families.gpt_neox:FAMILY",
        "gptj": "moemerge.families.gptj:FAMILY",
        "helium": "moemerge.families.helium:FAMILY",
        "hunyuan_v1_dense": "moemerge.families.hunyuan_v1_dense:FAMILY",
        "llama": "moemerge.families.llama:FAMILY",
        "megatron-bert": "moemerge.families.megatron_bert:FAMILY",
        "minicpm3": "moemerge.families.minicpm3:FAMILY",
        "ministral": "moemerge.families.ministral:FAMILY",
        "ministral3": "moemerge.families.ministral3:FAMILY",
        "mistral": "moemerge.families.mistral:FAMILY",
        "modernbert": "moemerge.families.modernbert:FAMILY",
        "modernbert-decoder": "moemerge.families.modernbert_decoder:FAMILY",
        "mpnet": "moemerge.families.mpnet:FAMILY",
        "mpt": "moemerge.families.mpt:FAMILY",
        "nemotron": "moemerge.families.nemotron:FAMILY",
        "olmo": "moemerge.families.olmo:FAMILY",
        "olmo2": "moemerge.families.olmo2:FAMILY",
        "olmo3": "moemerge.families.olmo3:FAMILY",
        "opt": "moemerge.families.opt:FAMILY",
        "persimmon": "moemerge.families.persimmon:FAMILY",
        "phi": "moemerge.families.phi:FAMILY",
        "phi3": "moemerge.families.phi3:FAMILY",
        "qwen2": "moemerge.families.qwen2:FAMILY",
        "qwen3": "moemerge.families.qwen3:FAMILY",
        "qwen3_5_text": "moemerge.families.qwen3_5_text:FAMILY",
        "rembert": "moemerge.families.rembert:FAMILY",
        "roberta": "moemerge.families.roberta:FAMILY",
        "roformer": "moemerge.families.roformer:FAMILY",
        "seed_oss": "moemerge.families.seed_oss:FAMILY",
        "smollm3": "moemerge.families.smollm3:FAMILY",
        "stablelm": "moemerge.families.stablelm:FAMILY",
        "starcoder2": "moemerge.families.starcoder2:FAMILY",
        "xlm-roberta": "moemerge.families.xlm_roberta:FAMILY",
    },
)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a dense or MoE config; as `family_called`."""
    return family_called(config.model_type.removeprefix("moemerge_"))


def family_called(name: str) -> Family:
    """The family of a dense model_type. Raises UnsupportedError, with the reason where there is one."""
    if name in FAMILIES:
        return FAMILIES.get(name)
    if name in REFUSED:
        raise UnsupportedError(
            f"this architecture cannot be upcycled: {REFUSED[name]}",
            given=f"model_type {name!r}",
            expected=f"one of: {', '.join(FAMILIES)}",
            fix="use a reward model of a supported architecture",
        )
    raise UnsupportedError(
        "this architecture is not supported",
        given=f"model_type {name!r}",
        expected=f"one of: {', '.join(FAMILIES)}",
        fix="use a reward model of a supported architecture, or add a family (one file in moemerge/families)",
    )

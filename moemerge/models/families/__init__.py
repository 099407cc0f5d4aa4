"""Architectures, by the model_type of their dense config. To add one: one file and one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.errors import UnsupportedError
from moemerge.models.families.refused import REFUSED
from moemerge.registry import Registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from moemerge.models.families.base import Family

FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "arcee": "moemerge.models.families.arcee:FAMILY",
        "bert": "moemerge.models.families.bert:FAMILY",
        "biogpt": "moemerge.models.families.biogpt:FAMILY",
        "bloom": "moemerge.models.families.bloom:FAMILY",
        "camembert": "moemerge.models.families.camembert:FAMILY",
        "data2vec-text": "moemerge.models.families.data2vec_text:FAMILY",
        "deberta": "moemerge.models.families.deberta:FAMILY",
        "deberta-v2": "moemerge.models.families.deberta_v2:FAMILY",
        "diffllama": "moemerge.models.families.diffllama:FAMILY",
        "distilbert": "moemerge.models.families.distilbert:FAMILY",
        "electra": "moemerge.models.families.electra:FAMILY",
        "ernie": "moemerge.models.families.ernie:FAMILY",
        "eurobert": "moemerge.models.families.eurobert:FAMILY",
        "exaone4": "moemerge.models.families.exaone4:FAMILY",
        "falcon": "moemerge.models.families.falcon:FAMILY",
        "gemma": "moemerge.models.families.gemma:FAMILY",
        "gemma2": "moemerge.models.families.gemma2:FAMILY",
        "gemma3_text": "moemerge.models.families.gemma3_text:FAMILY",
        "glm": "moemerge.models.families.glm:FAMILY",
        "glm4": "moemerge.models.families.glm4:FAMILY",
        "gpt2": "moemerge.models.families.gpt2:FAMILY",
        "gpt_bigcode": "moemerge.models.families.gpt_bigcode:FAMILY",
        "gpt_neo": "moemerge.models.families.gpt_neo:FAMILY",
        "gpt_neox": "moemerge.models.families.gpt_neox:FAMILY",
        "gptj": "moemerge.models.families.gptj:FAMILY",
        "helium": "moemerge.models.families.helium:FAMILY",
        "hunyuan_v1_dense": "moemerge.models.families.hunyuan_v1_dense:FAMILY",
        "llama": "moemerge.models.families.llama:FAMILY",
        "megatron-bert": "moemerge.models.families.megatron_bert:FAMILY",
        "minicpm3": "moemerge.models.families.minicpm3:FAMILY",
        "ministral": "moemerge.models.families.ministral:FAMILY",
        "ministral3": "moemerge.models.families.ministral3:FAMILY",
        "mistral": "moemerge.models.families.mistral:FAMILY",
        "modernbert": "moemerge.models.families.modernbert:FAMILY",
        "modernbert-decoder": "moemerge.models.families.modernbert_decoder:FAMILY",
        "mpnet": "moemerge.models.families.mpnet:FAMILY",
        "mpt": "moemerge.models.families.mpt:FAMILY",
        "nemotron": "moemerge.models.families.nemotron:FAMILY",
        "olmo": "moemerge.models.families.olmo:FAMILY",
        "olmo2": "moemerge.models.families.olmo2:FAMILY",
        "olmo3": "moemerge.models.families.olmo3:FAMILY",
        "opt": "moemerge.models.families.opt:FAMILY",
        "persimmon": "moemerge.models.families.persimmon:FAMILY",
        "phi": "moemerge.models.families.phi:FAMILY",
        "phi3": "moemerge.models.families.phi3:FAMILY",
        "qwen2": "moemerge.models.families.qwen2:FAMILY",
        "qwen3": "moemerge.models.families.qwen3:FAMILY",
        "qwen3_5_text": "moemerge.models.families.qwen3_5_text:FAMILY",
        "rembert": "moemerge.models.families.rembert:FAMILY",
        "roberta": "moemerge.models.families.roberta:FAMILY",
        "roformer": "moemerge.models.families.roformer:FAMILY",
        "seed_oss": "moemerge.models.families.seed_oss:FAMILY",
        "smollm3": "moemerge.models.families.smollm3:FAMILY",
        "stablelm": "moemerge.models.families.stablelm:FAMILY",
        "starcoder2": "moemerge.models.families.starcoder2:FAMILY",
        "xlm-roberta": "moemerge.models.families.xlm_roberta:FAMILY",
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

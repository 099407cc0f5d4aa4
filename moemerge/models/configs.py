"""Model configs from elsewhere: whatever is wrong with one is told as a fault of its folder."""

from __future__ import annotations

import logging
import math
from functools import cache
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from moemerge.artifacts.foreign import refuse_foreign, refuse_paths
from moemerge.artifacts.json_file import read_object
from moemerge.errors import CheckpointError, MoemergeError
from moemerge.models.config_file import read_config
from moemerge.models.families.base import PREFIX
from moemerge.models.moe_settings import MoeSettings

ADAPTER = "adapter_config.json"
# transformers takes what these hold for arguments of the tokenizer's class.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# What older versions saved, and transformers replaces by what lies in the folder.
REPLACED = {"name_or_path", "tokenizer_file", "special_tokens_map_file"}
NO_PAD = -1  # how the first conversions of Llama, and others after them, say that there is none
# Families that count positions from the pad token, and one whose config must have one.
NEEDS_PAD = ("camembert", "data2vec-text", "mpnet", "roberta", "xlm-roberta", "modernbert-decoder")

log = logging.getLogger(__name__)


def load_config(source: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of the model in the folder, or under the hub name, `source`.

    Code that comes with a model runs only with `trust_remote_code`, and that is logged. Raises
    CheckpointError for a config that is missing, or that its own class refuses.
    """
    try:
        check_files(source)
        if trust_remote_code:
            tell_of_code(str(source))
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        _settle_pad(config, source)
        _check_layers(config)
        return config
    except MoemergeError:
        raise
    except Exception as error:  # a config's class may raise anything at values that it does not expect
        raise unloadable(
            "the model's config cannot be read", source, error, "a model folder or hub name"
        ) from error


def check_files(source: str | Path) -> None:
    """Raise unless what transformers reads beside weights, of a folder or hub name, names nothing elsewhere.

    CheckpointError for an adapter, whose base may be anywhere; ArtifactError for links out of a folder and
    for a tokenizer's files elsewhere; ValueError or OSError for a config.json that cannot be used.
    """
    if Path(source).exists():
        refuse_foreign(Path(source))
    if (_file(source, ADAPTER) or Path()).is_file():
        raise CheckpointError(
            f"{source} is an adapter (LoRA), not a whole model",
            given=ADAPTER,
            expected="a whole model",
            fix="load it on its base (PEFT), merge_and_unload(), save_pretrained()",
        )
    config = _file(source, "config.json")
    if config is not None:
        read_config(config.parent)
    for name in TOKENIZER_FILES:
        path = _file(source, name)
        if path is not None:
            values = read_object(path)
            refuse_paths({key: values[key] for key in values.keys() - REPLACED}, path.parent, name)


def _file(source: str | Path, name: str) -> Path | None:
    """Where the file `name` of a folder or hub name is, fetched if need be; None if it has none."""
    if Path(source).exists():
        return Path(source) / name if (Path(source) / name).exists() else None
    found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _settle_pad(config: PreTrainedConfig, source: str | Path) -> None:
    """A pad token of -1 is none, as if null stood there; any other that the vocabulary lacks is a fault.

    transformers takes -1 as it stands: decoders then find no padding and score the last pad token.
    """
    text = config.get_text_config()
    pad, size = text.pad_token_id, getattr(text, "vocab_size", None)
    family = text.model_type.removeprefix(PREFIX).replace("_", "-")
    if pad == NO_PAD and family not in NEEDS_PAD:
        text.pad_token_id = config.pad_token_id = None
    elif pad is not None and not 0 <= pad < (size or math.inf):
        raise CheckpointError(
            f"the pad token of {source} is no token",
            given=f"pad_token_id {pad}, a vocabulary of {size}",
            expected="a token of the vocabulary" + ", which this family needs" * (pad == NO_PAD),
            fix="set pad_token_id in its config.json to the one that its tokenizer pads with",
        )


def _check_layers(config: PreTrainedConfig) -> None:
    """The layers of a MoE are layers of its model."""
    values = getattr(config, "moemerge", None)
    if not config.model_type.startswith(PREFIX) and values is None:
        return
    if not isinstance(values, dict):
        raise ValueError("no field moemerge in a MoE's config")
    layers, count = MoeSettings.read(values).layers, config.num_hidden_layers
    if max(layers) >= count:
        raise ValueError(f"experts in layer {max(layers)} of a model of {count} layers")


@cache
def tell_of_code(source: str) -> None:
    """Log, once for each model, that its own code may run."""
    log.warning("trust_remote_code: code that comes with %s may run", source)


def unloadable(what: str, source: str | Path, error: Exception, expected: str) -> CheckpointError:
    """The fault of a model of which transformers cannot make anything."""
    reason = " ".join(str(error).split())
    return CheckpointError(
        f"{what}: {source}",
        given=f"{type(error).__name__}: {reason[:500]}",
        expected=expected,
        fix="check the path and that every file of the model is there and whole",
    )

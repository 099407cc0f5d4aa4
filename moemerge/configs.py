"""Model configs from elsewhere: whatever is wrong with one is told as a fault of its folder."""

from __future__ import annotations

import logging
import math
from functools import cache
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from moemerge.errors import CheckpointError, MoemergeError
from moemerge.families.dense import PREFIX
from moemerge.json_file import read_config
from moemerge.moe_settings import MoeSettings

log = logging.getLogger(__name__)


def load_config(source: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of the model in the folder, or under the hub name, `source`.

    Code that comes with a model runs only with `trust_remote_code`, and that is logged. Raises
    CheckpointError for a config that is missing, or that its own class refuses.
    """
    try:
        if Path(source).is_dir():
            read_config(Path(source))
        if trust_remote_code:
            tell_of_code(str(source))
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        _check_pad(config.get_text_config())
        _check_layers(config)
        return config
    except MoemergeError:
        raise
    except Exception as error:  # a config's class may raise anything at values that it does not expect
        raise unloadable(
            "the model's config cannot be read", source, error, "a model folder or hub name"
        ) from error


def _check_pad(config: PreTrainedConfig) -> None:
    pad, size = config.pad_token_id, getattr(config, "vocab_size", None)
    if pad is not None and not 0 <= pad < (size or math.inf):
        raise ValueError(f"pad_token_id {pad} is no token of a vocabulary of {size}")


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

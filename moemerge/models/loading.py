"""Loading reward models and their tokenizers."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from moemerge.errors import CheckpointError, MoemergeError, few
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.configs import check_files, load_config, tell_of_code, unloadable
from moemerge.models.guards import refuse_larger, refuse_own_class
from moemerge.models.heads import claims_head, has_own_code, in_head, spare_head

log = logging.getLogger(__name__)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model, padding on the right, with a pad token.

    Without one of its own the end-of-sequence token pads, as in TRL's RewardTrainer: decoders then pool the
    token before it. Raises CheckpointError if there is no tokenizer, or neither token.
    """
    try:
        check_files(path)
        if trust_remote_code:
            tell_of_code(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer(["a"])
        tokenizer.get_vocab(), tokenizer.pad_token, tokenizer.eos_token  # noqa: B018 (a few classes have none)
    except MoemergeError:
        raise
    except Exception as error:  # a broken tokenizer.json raises a bare Exception
        raise unloadable(
            "the tokenizer cannot be loaded", path, error, "a folder or hub name with one"
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(
                f"the tokenizer of {path} has no pad token",
                given="neither pad_token nor eos_token",
                expected="one of the two",
                fix="set pad_token in tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_reward_model(
    path: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    fresh_head_seed: int | None = None,
) -> PreTrainedModel:
    """A reward model with exactly one output, in eval mode, every weight from the checkpoint.

    `dtype=None` keeps the checkpoint's on a GPU and takes float32 on CPU. With `fresh_head_seed` a base LM or
    encoder is taken too: its missing head is drawn from that seed, on any device alike. `config.pad_token_id`
    is set from the tokenizer when missing. Raises CheckpointError for missing, left-over or misshapen
    tensors, pickled weights, adapters, a reward model without its head, and any other number of outputs;
    UnsupportedError for a class of its own, unless its code comes along and is trusted.
    """
    _register_moe()
    device = torch.device(device)
    refuse_pickle(path)
    weights = Checkpoint(path) if Path(path).is_dir() else None
    config = load_config(path, trust_remote_code)
    if not (trust_remote_code and has_own_code(config)):
        refuse_own_class(config.architectures, path)
    if claims_head(config):
        fresh_head_seed = None
    if fresh_head_seed is not None:
        config.num_labels = 1
    if weights is not None:
        refuse_larger(weights, config)
    wanted: Any = dtype or (torch.float32 if device.type == "cpu" else "auto")
    model, loading = _load_weights(path, config, wanted, trust_remote_code)
    _check_loading(path, model, loading, fresh_head_seed)
    if model.config.num_labels != 1:
        raise CheckpointError(
            f"{path} is not a reward model",
            given=f"{model.config.num_labels} outputs",
            expected="one output",
            fix="give a sequence classifier with num_labels = 1",
        )
    if loading["missing_keys"] and fresh_head_seed is not None:
        _draw_head(model, sorted(loading["missing_keys"]), fresh_head_seed)
    _set_pad_token(model, path, trust_remote_code)
    return model.to(device).eval()  # type: ignore[arg-type, no-any-return]


def _register_moe() -> None:
    importlib.import_module("moemerge.models.modelling").register()


def refuse_pickle(path: str) -> None:
    """Raise CheckpointError if the folder at `path` holds weights as pickles only."""
    folder = Path(path)
    pickled = sorted(p.name for p in folder.glob("*.bin") if p.name.startswith("pytorch_model"))
    if pickled and not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{path} holds pickled weights",
            given=", ".join(pickled[:3]),
            expected="safetensors: pickle files can run code when they are opened",
            fix="if you trust it, load it with transformers and save_pretrained it to another folder",
        )


def _load_weights(
    path: str, config: PreTrainedConfig, dtype: Any, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        with quiet_loading():
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # see load_config
        expected = "safetensors of a sequence classifier that agree with config.json"
        raise unloadable("the model cannot be loaded", path, error, expected) from error
    return model, loading


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep back transformers' load report and progress bar: the loading info is checked in full."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _check_loading(path: str, model: PreTrainedModel, loading: dict[str, Any], seed: int | None) -> None:
    """Refuse a model whose weights are not exactly those of the checkpoint, but for a head to be drawn."""
    missing, unexpected = set(loading["missing_keys"]), set(loading["unexpected_keys"])
    head = {name for name in missing if in_head(model, name)}
    if seed is not None and head == missing:
        unexpected = {name for name in unexpected if not spare_head(name)}
        missing = set()
    wrong = {
        "missing": missing,
        "left over": unexpected,
        "of another shape": {
            f"{name} {tuple(found)}, not {tuple(want)}" for name, found, want in loading["mismatched_keys"]
        },
    }
    given = "; ".join(f"{kind}: {few(sorted(map(str, names)))}" for kind, names in wrong.items() if names)
    if not given:
        return
    headless = bool(missing) and head == missing
    raise CheckpointError(
        f"{path} has no reward head" if headless else f"{path} does not hold exactly this model's tensors",
        given=given,
        expected="every tensor of the reward model and no other",
        fix="train it first: training gives a base model a fresh head"
        if headless
        else "copy the checkpoint again, or save it again with the code that made it",
    )


def _draw_head(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Draw the head's tensors as transformers does, but from `seed` and in one order."""
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    with torch.no_grad():
        for name in names:
            tensor = model.get_parameter(name)
            if tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
            else:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    log.info("drew a fresh reward head (%s) from seed %d", ", ".join(names), seed)


def _set_pad_token(model: PreTrainedModel, path: str, trust_remote_code: bool) -> None:
    if model.config.get_text_config().pad_token_id is None:
        pad = load_tokenizer(path, trust_remote_code).pad_token_id
        model.config.get_text_config().pad_token_id = pad
        model.config.pad_token_id = pad

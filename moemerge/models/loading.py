"""Loading reward models and their tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from moemerge.artifacts.ranks import require_several
from moemerge.errors import unexpected
from moemerge.models import processes
from moemerge.models.configs import log_own_code
from moemerge.models.families import family_of
from moemerge.models.families.dense import skeleton
from moemerge.models.folder import ModelFolder, misfit, opened, unloadable
from moemerge.models.guards import needless, old_buffer, refuse_larger
from moemerge.models.head_tensors import (
    foreign_head,
    in_head,
    refuse_lost_head,
    replaced_names,
    warn_of_fresh_head,
)
from moemerge.models.heads.install import draw_head, with_new_head
from moemerge.models.pooling import name_pad_of_fresh_head
from moemerge.models.spread import Limits, room_for_weights, settle, spreading
from moemerge.models.tokenizer_reading import check_reading
from moemerge.options.placement import WHOLE, Placement

if TYPE_CHECKING:
    from moemerge.options.head import HeadOptions


def load_tokenizer(model: ModelFolder | str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model, as it is there; a new object.

    It may have no pad token: models.pooling says what pads. Raises CheckpointError if there is none, or one
    that is broken or out of bounds, or reads nothing.
    """
    model = opened(model)
    model.check_tokenizer()
    try:
        if model.trust_remote_code:
            log_own_code(model.source)
        tokenizer = AutoTokenizer.from_pretrained(model.source, trust_remote_code=model.trust_remote_code)
        tokenizer(["a"])
        tokenizer.get_vocab(), tokenizer.pad_token, tokenizer.eos_token  # noqa: B018 (a few classes have none)
    except BaseException as error:  # a broken tokenizer.json raises a bare Exception, or panics
        if not unexpected(error):
            raise
        if model.has_config:
            model.config  # noqa: B018 (transformers' tokenizers read it too, and it may be what is wrong)
        expected = "a folder or hub name with one"
        raise unloadable("the tokenizer cannot be loaded", model.source, error, expected) from error
    check_reading(tokenizer, model.tokenizer_file, model.source)
    return tokenizer


def load_reward_model(
    model: ModelFolder | str | Path,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    fresh_head_seed: int | None = None,
    placement: Placement = WHOLE,
    head: HeadOptions | None = None,
) -> PreTrainedModel:
    """A reward model with exactly one output, in eval mode, every weight from the checkpoint.

    `dtype=None`: as `placement` says, by default the checkpoint's on a GPU and float32 on CPU. With
    `fresh_head_seed` a base LM or encoder is taken too: its missing head is drawn from that seed, on any
    device alike, and a pad token named if it names none; so is, where the folder is opened with `fresh_head`,
    any model without its head. A reward model's config stays as it is. `placement`: sharded, each of several
    processes holds a part of every weight, and never the whole of more than a layer (FSDP2); with device_map,
    one process spreads the layers over devices and files. `head`: a new head, drawn from `fresh_head_seed` or
    a seed of its own, takes the place of any that there is; class and config are those of its kind.
    Raises CheckpointError for missing, left-over or misshapen tensors, quantised or pickled weights,
    adapters, a reward model without its head, and any other number of outputs; UnsupportedError for a class
    of its own, unless its code comes along and is trusted.
    """
    if placement.sharded:
        require_several()
    folder, device = opened(model), torch.device(device)
    if folder.is_local:
        folder.weights  # noqa: B018 (damaged weights are reported before the config's faults)
    # A head that the config claims and the weights lack is a fault, not fresh.
    fresh = None if folder.claims_head and not folder.fresh_head else fresh_head_seed
    config = _config_to_load(folder, fresh, head)
    limits = room_for_weights(placement, device)
    wanted = _dtype_to_load(dtype, placement, device)
    sharding = _sharding(config) if placement.sharded else None
    loaded, loading = load_weights(folder, config, wanted, sharding=sharding, limits=limits)
    if head is not None:
        loading = _without_heads(loading, loaded, skeleton(folder.config))
        draw_head(loaded, head, fresh_head_seed or 0)
    check_loading(folder, loaded, loading, fresh)
    if fresh is None:
        folder.require_one_output()
    else:
        _settle_fresh_head(folder, loaded, loading, fresh, new_head=head is not None)
    placed = loaded if placement.sharded or limits else loaded.to(device)  # type: ignore[arg-type]
    return placed.eval()  # type: ignore[no-any-return]


def _config_to_load(folder: ModelFolder, fresh: int | None, head: HeadOptions | None) -> PreTrainedConfig:
    """A copy of the folder's config, with one output where the head may be fresh, of `head`'s own class."""
    config = deepcopy(folder.config)
    if fresh is not None:
        config.num_labels = 1
    if folder.is_local:
        refuse_larger(folder.weights, config)
        folder.weights.release()  # transformers maps the files itself
    return config if head is None else with_new_head(config, head)


def _dtype_to_load(dtype: torch.dtype | None, placement: Placement, device: torch.device) -> Any:
    if dtype is None and placement.precision != "auto":
        dtype = getattr(torch, placement.precision)
    return dtype or (torch.float32 if device.type == "cpu" else "auto")


def _sharding(config: PreTrainedConfig) -> Any:
    layers, _ = family_of(config).dense_layers(skeleton(config))
    return processes.sharding(layers)


def _settle_fresh_head(
    folder: ModelFolder, model: PreTrainedModel, loading: dict[str, Any], seed: int, new_head: bool
) -> None:
    """Draw what the checkpoint has not of its head, name a pad token, and warn; note it in `folder`."""
    if loading["missing_keys"]:
        folder.drawn_head = sorted(loading["missing_keys"])
        _draw_head(model, folder.drawn_head, seed)
    if folder.drawn_head or new_head:
        name_pad_of_fresh_head(model.config, folder)
    if folder.drawn_head or folder.fresh_head:
        warn_of_fresh_head(folder.source, tuple(folder.drawn_head))


def load_weights(
    folder: ModelFolder,
    config: PreTrainedConfig,
    dtype: Any,
    device_map: str | None = None,
    sharding: Any = None,
    limits: Limits | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The sequence classifier of `config` with the weights of `folder`, and transformers' loading info.

    limits: spread the layers over these devices, with so many bytes of weights on each at most; those that
    have no room stay in the files. Nothing is checked of the info: tensors that are missing, left over or
    misshapen are the caller's to refuse. CheckpointError if transformers cannot load it at all.
    """
    more: dict[str, Any] = {"device_map": device_map}
    if sharding is not None:
        more["distributed_config"] = sharding
    spread = nullcontext(more) if limits is None else spreading(limits)
    try:
        with quiet_loading(), spread as placed:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder.source,
                config=config,
                dtype=dtype,
                trust_remote_code=folder.trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **placed,
            )
    except Exception as error:  # a model's class may raise anything at values that it does not expect
        expected = "safetensors of a sequence classifier that agree with config.json"
        raise unloadable("the model cannot be loaded", folder.source, error, expected) from error
    if limits is not None:
        settle(model, placed["offload_folder"])
    return model, loading


def without_weights(
    config: PreTrainedConfig, trust_remote_code: bool, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The reward model of `config`, dense or a MoE, with one output and no weights (on the meta device)."""
    own = deepcopy(config)
    own.num_labels = 1
    given = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            own, trust_remote_code=trust_remote_code, **given
        )
    return cast(PreTrainedModel, model)


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


def check_loading(
    folder: ModelFolder, model: PreTrainedModel, loading: dict[str, Any], seed: int | None = None
) -> None:
    """Raise CheckpointError unless a model's weights are exactly those of its folder.

    With `seed`, a head may be missing, which is then drawn, and the head that it replaces be left over.
    """
    missing = set(loading["missing_keys"])
    unexpected = {name for name in loading["unexpected_keys"] if not old_buffer(model, name)}
    head = {name for name in missing if in_head(model, name)}
    if head == missing:
        refuse_lost_head(folder, sorted(head), sorted(unexpected), needed=seed is None)
        if seed is not None:
            unexpected = {name for name in unexpected if not needless(folder, model, name)}
            missing = set()
    kinds = {
        "missing": missing,
        "left over": unexpected,
        "of another shape": {
            f"{name} {tuple(stored)}, not {tuple(wanted)}"
            for name, stored, wanted in loading["mismatched_keys"]
        },
    }
    faults = {kind: sorted(names) for kind, names in kinds.items() if names}
    if faults:
        fix = "copy the checkpoint again, or save it again with the code that made it"
        raise misfit(folder.source, faults, "every tensor of the reward model and no other", fix)


def _without_heads(loading: dict[str, Any], *models: PreTrainedModel) -> dict[str, Any]:
    """The loading info without the heads of these models, or under other tools' names: none is loaded."""
    names = {name for model in models for name in replaced_names(model)}
    return {
        **loading,
        "missing_keys": set(loading["missing_keys"]) - names,
        "unexpected_keys": {
            name for name in loading["unexpected_keys"] if name not in names and not foreign_head(name)
        },
        "mismatched_keys": [entry for entry in loading["mismatched_keys"] if entry[0] not in names],
    }


def _draw_head(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Draw the head's tensors as transformers does, but from `seed` and in the order of `names`."""
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    with torch.no_grad():
        for name in names:
            tensor = model.get_parameter(name)
            if tensor.ndim > 1:
                drawn = torch.randn(tensor.shape, generator=generator) * std
                tensor.copy_(processes.placed_like(tensor, drawn))
            else:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)

"""Which token a score is read from, and padding that does not move it.

A decoder's sequence classifier in transformers reads the last token that is not config.pad_token_id; where
that is None, the last token, and then it takes one text at a time. So config.pad_token_id is part of what a
reward model computes: with pad = eos it reads the token before the end, and naming another pad token makes it
another model. What the tokenizer pads with plays no part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moemerge.data.tokenise import Encoded
from moemerge.models.head_tensors import output_layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from moemerge.models.folder import ModelFolder


def named_pad(config: PreTrainedConfig) -> int | None:
    """config.pad_token_id, as the classifier looks it up."""
    pad: int | None = config.get_text_config().pad_token_id
    return pad


def set_pad(config: PreTrainedConfig, pad: int | None) -> None:
    """Name `pad` wherever a classifier may look it up."""
    config.pad_token_id = config.get_text_config().pad_token_id = pad


def safe_pad(config: PreTrainedConfig, texts: Sequence[Encoded]) -> int:
    """What may pad `texts` on the right: the config's own token, or, without one, a token that none ends in.

    Then the last token unequal to it is in a batch what it is of each text alone. Otherwise it does not
    matter which token that is: the attention mask hides it.
    """
    own = named_pad(config)
    if own is not None:
        return own
    ends = {text.ids[-1] for text in texts if text.ids}
    return next(token for token in range(len(ends) + 1) if token not in ends)


@contextmanager
def padding(model: PreTrainedModel, texts: Sequence[Encoded]) -> Iterator[int]:
    """The token to pad `texts` with, past which `model` looks meanwhile; its config is put back then."""
    own, pad = named_pad(model.config), safe_pad(model.config, texts)
    set_pad(model.config, pad)
    try:
        yield pad
    finally:
        set_pad(model.config, own)


def pooled_positions(ids_BT: Tensor, pad: int) -> Tensor:
    """Where a decoder reads scores, [B]: the last token unequal to `pad`, or the first if there is none."""
    return (torch.arange(ids_BT.shape[1], device=ids_BT.device) * (ids_BT != pad)).argmax(1)


@contextmanager
def pooled_states(model: PreTrainedModel, positions_B: Tensor) -> Iterator[list[Tensor]]:
    """While open, a forward pass adds the input of the reward head's last matrix for each text, [B, D].

    A decoder's score is read at `positions_B`.
    """
    states: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        # Encoders have pooled before the head; decoders score every token, of which one counts.
        states.append(x if x.ndim == 2 else x[torch.arange(len(x), device=x.device), positions_B])

    handle = model.get_submodule(output_layer(model)).register_forward_pre_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


@contextmanager
def last_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """While open, a forward pass adds the last states of the model's trunk, [B, T, D]."""
    states: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda _, inputs, output: states.append(output[0]))
    try:
        yield states
    finally:
        handle.remove()


def name_pad_of_fresh_head(config: PreTrainedConfig, source: ModelFolder) -> None:
    """Give a base model under a new head its tokenizer's pad token, or else its end token, if it names none.

    As TRL's RewardTrainer does, so that the result scores batches. Nothing moves: there are no scores yet. A
    pad token that the model's vocabulary lacks is left out.
    """
    from moemerge.models.loading import load_tokenizer

    if named_pad(config) is not None:
        return
    tokenizer = load_tokenizer(source)
    size = config.get_text_config().vocab_size
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    set_pad(config, next((token for token in candidates if token is not None and token < size), None))


def reads_before_the_end(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's end token is its pad token too, so that a decoder's score is read before it."""
    lists = (
        ids if isinstance(ids, list) else [ids]
        for ids in (config.get_text_config().eos_token_id, tokenizer.eos_token_id)
    )
    return named_pad(config) in {token for ids in lists for token in ids if token is not None}

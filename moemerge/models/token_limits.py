"""What texts a model can take: its vocabulary, and its positions where these are learned one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from moemerge.data.tokenise import Encoded
from moemerge.errors import CheckpointError, DataError
from moemerge.models.families.dense import dense_class, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

POSITIONS = ("position_embeddings", "embed_positions", "wpe")


def check_texts(model: PreTrainedModel, texts: Sequence[Encoded]) -> None:
    """Raise CheckpointError for a token that `model` lacks, DataError for a text longer than its positions.

    `model` may be a skeleton without weights.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    largest = max((token for text in texts for token in text.ids), default=0)
    if rows is not None and largest >= rows:
        raise CheckpointError(
            "tokenizer and model do not go together",
            given=f"a text with token number {largest}, a model of {rows} tokens",
            expected="a tokenizer whose tokens the model knows",
            fix="give the model the tokenizer that it was trained with",
        )
    longest = max((len(text.ids) for text in texts), default=0)
    most = min(_positions(model), default=longest)
    if longest > most:
        raise DataError(
            "a text is longer than the model can read",
            given=f"{longest} tokens",
            expected=f"at most {most} tokens",
            fix=f"set max_length to {most}, and bad_rows to skip to leave longer rows out",
        )


def check_config(config: PreTrainedConfig, texts: Sequence[Encoded]) -> None:
    """As `check_texts`, for the reward model of `config`; nothing is checked of a class that is not known."""
    try:
        dense_class(config)
    except KeyError:
        return
    check_texts(skeleton(config), texts)


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens that the reward model of `config` was made for at most; None if its config does not say."""
    told = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(_positions(skeleton(config)), default=told)


def _positions(model: PreTrainedModel) -> Iterator[int]:
    """Positions of each learned table; the rows that stand before the first one are not counted."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(POSITIONS):
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            yield module.num_embeddings - int(getattr(module, "offset", before))

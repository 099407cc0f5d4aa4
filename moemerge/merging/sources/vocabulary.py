"""The common vocabulary of models whose tokenizers differ in added tokens.

Letters: V rows of the common embedding table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

ROLES = ("chat_template", "bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class Vocabulary:
    """The first model's vocabulary, with the tokens that only others have behind it.

    `rows_V[m]` has, for each row of the common table, the row of model m's own table with the same token, or
    -1.
    """

    added: list[AddedToken]
    rows_V: list[Tensor]

    @property
    def size(self) -> int:
        """Rows of the common table."""
        return len(self.rows_V[0])

    def table(self, model: int, own: Callable[[int], Tensor]) -> Tensor:
        """The embeddings of number `model` in the common order; `own(m)` is the table of model m.

        A token that it lacks gets the embedding of the first model that has it, so that an average of tables
        leaves that embedding as it is. Rows of no token come from the first model, or are zero.
        """
        order = [model, *(m for m in range(len(self.rows_V)) if m != model)]
        table = own(model)
        common = table.new_zeros(self.size, table.shape[1])
        empty_V = torch.ones(self.size, dtype=torch.bool)
        # The model's own rows first; each other one fills what is empty still.
        for m in order:
            take_V = empty_V & (self.rows_V[m] >= 0)
            if bool(take_V.any()):
                common[take_V] = own(m)[self.rows_V[m][take_V]].to(common.dtype)
                empty_V &= ~take_V
        return common

    def tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """The first model's tokenizer, in `folder`, with the added tokens."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        first = len(tokenizer)
        tokenizer.add_tokens(self.added)
        ids = tokenizer.convert_tokens_to_ids([str(token) for token in self.added])
        assert ids == list(range(first, first + len(self.added)))
        return tokenizer


def differences(first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """What two tokenizers make another text of, apart from their tokens: templates, and roles of tokens."""
    differing = [name for name in ROLES if getattr(first, name, None) != getattr(other, name, None)]
    around = [tokenizer.convert_ids_to_tokens(tokenizer("").input_ids) for tokenizer in (first, other)]
    return differing + ["the tokens put around a text"] * (around[0] != around[1])


def common_vocabulary(
    tokenizers: Sequence[PreTrainedTokenizerBase], sizes: Sequence[int]
) -> Vocabulary | None:
    """The vocabulary of models whose embedding tables have `sizes` rows; None if all agree.

    They must differ in added tokens only: see likeness.check_vocabularies.
    """
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    added = [{str(t): t for t in tokenizer.added_tokens_decoder.values()} for tokenizer in tokenizers]
    if len({*sizes}) == 1 and all(vocabulary == vocabularies[0] for vocabulary in vocabularies):
        return None
    new: dict[str, AddedToken] = {}
    for vocabulary, tokens in zip(vocabularies, added, strict=True):
        wanted = (
            token for token in sorted(tokens, key=vocabulary.__getitem__) if token not in vocabularies[0]
        )
        new |= {token: tokens[token] for token in wanted if token not in new}
    # New tokens get the ids that the first tokenizer gives when they are added to it: from its length on, in
    # this order. The table may be higher than that, as tables are often padded.
    common = vocabularies[0] | {token: len(tokenizers[0]) + index for index, token in enumerate(new)}
    height = max(sizes[0], max(common.values()) + 1)
    rows = [_rows(common, vocabularies[m], size, height) for m, size in enumerate(sizes)]
    rows[0] = _with_unnamed_rows(rows[0], set(common.values()), sizes[0])
    return Vocabulary(list(new.values()), rows)


def _rows(common: dict[str, int], own: dict[str, int], size: int, height: int) -> Tensor:
    """For each row of the common table the row of the own one, of `size` rows; -1 for tokens it lacks."""
    rows_V = torch.full((height,), -1)
    for token, row in common.items():
        if own.get(token, size) < size:
            rows_V[row] = own[token]
    return rows_V


def _with_unnamed_rows(rows_V: Tensor, named: set[int], size: int) -> Tensor:
    """The first model's table often has rows beyond its tokens: they stay where they are."""
    for row in set(range(size)) - named:
        rows_V[row] = row
    return rows_V

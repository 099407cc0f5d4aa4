"""Preference pairs as TRL's trainer takes them: columns of a data set, and batches of its rows.

Shapes: P pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.reward_trainer import DataCollatorForPreference

from moemerge.data.pairs import margins_of
from moemerge.data.tokenise import EncodedPair


class PairCollator(DataCollatorForPreference):
    """TRL's collator, which also passes on `prompt_lengths` (chosen rows first, as the ids) and `places`."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A padded batch of both sides of each pair."""
        batch = super().torch_call(examples)
        if "prompt_lengths" in examples[0]:
            lengths_P2 = torch.tensor([example["prompt_lengths"] for example in examples])
            batch["prompt_lengths"] = lengths_P2.T.flatten()
        if "places" in examples[0]:
            batch["places"] = torch.tensor([example["places"] for example in examples])
        return batch


def pair_columns(
    pairs: Sequence[EncodedPair], prompts: bool = False, places: bool = False, margins: bool = False
) -> Dataset:
    """The tokens of `pairs`, and if asked for their prompts' lengths, places and margins.

    DataError if margins are asked for and a pair has none.
    """
    columns: dict[str, list[Any]] = {
        "chosen_ids": [pair.chosen.ids for pair in pairs],
        "rejected_ids": [pair.rejected.ids for pair in pairs],
    }
    columns["length"] = [max(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]
    if margins:
        columns["margin"] = margins_of([pair.pair for pair in pairs])
    if prompts:
        columns["prompt_lengths"] = [[p.chosen.prompt_length, p.rejected.prompt_length] for p in pairs]
    if places:
        columns["places"] = list(range(len(pairs)))
    return Dataset.from_dict(columns)

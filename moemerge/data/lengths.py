"""How long the texts of a source are, measured on rows drawn from it: what a recipe and a forecast go by."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moemerge.data.pairs import Pair, prompt_key
from moemerge.data.reading import read_pairs
from moemerge.data.rows import RowReport
from moemerge.data.tokenise import EncodedPair, encode_pairs
from moemerge.options.base import TextFormat

DRAWN = 400  # a share of 5 % is then known to about 2 points


@dataclass(frozen=True)
class Lengths:
    """Tokens of drawn pairs, chosen and rejected answer with their prompt.

    pairs, prompts: how many the source has; broken: rows of it that are none. chats: whether they are lists
    of messages. tokens_P2: shape [drawn, 2].
    """

    source: str
    pairs: int
    prompts: int
    broken: int
    chats: bool
    tokens_P2: npt.NDArray[np.int64]

    def quantile(self, share: float) -> int:
        """The max_length with which this share of pairs is kept."""
        return int(np.quantile(self.tokens_P2.max(1), share, method="higher"))

    def share_above(self, max_length: int) -> float:
        """The share of pairs of which a side is longer."""
        return float((self.tokens_P2.max(1) > max_length).mean())

    def mean(self, max_length: int) -> float:
        """Mean tokens of a text among the pairs that are kept; 0 if none is."""
        kept = self.tokens_P2[self.tokens_P2.max(1) <= max_length]
        return float(kept.mean()) if len(kept) else 0.0


def measure(source: str, tokenizer: Any, fields: dict[str, str] | None = None, seed: int = 0) -> Lengths:
    """The lengths of at most `DRAWN` pairs of `source`, drawn from `seed`. Raises as read_pairs does.

    Pairs that the tokenizer or its chat template refuses are left out, unless they are all.
    """
    pairs, report = read_pairs(source, TextFormat(fields=fields or {}, bad_rows="skip"))
    tokens = [
        [len(pair.chosen.ids), len(pair.rejected.ids)] for pair in _drawn(pairs, report, tokenizer, seed)
    ]
    return Lengths(
        source=source,
        pairs=len(pairs),
        prompts=len({prompt_key(pair) for pair in pairs}),
        broken=report.total - len(pairs),
        chats=not isinstance(pairs[0].chosen, str),
        tokens_P2=np.array(tokens),
    )


def _drawn(pairs: Sequence[Pair], report: RowReport, tokenizer: Any, seed: int) -> list[EncodedPair]:
    unbounded = TextFormat(max_length=sys.maxsize, bad_rows="skip")
    order = np.random.default_rng(seed).permutation(len(pairs))[:DRAWN].tolist()
    return encode_pairs(tokenizer, [pairs[place] for place in sorted(order)], unbounded, report)

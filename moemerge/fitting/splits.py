"""Training and held-out pairs: prompts are never divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from moemerge.data.pairs import numbered, prompt_key
from moemerge.data.tokenise import EncodedPair
from moemerge.errors import DataError


def prompt_numbers(pairs: Sequence[EncodedPair]) -> list[int]:
    """Equal numbers for pairs of one prompt (`prompt_key`), counted from 0."""
    return numbered(prompt_key(pair.pair) for pair in pairs)


def hold_out(pairs: Sequence[EncodedPair], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the pairs to train on, and of about `share` of them, at least one, to hold out.

    Pairs of one prompt stay together. Raises DataError if there is only one prompt.
    """
    prompts = prompt_numbers(pairs)
    order, sizes = _shuffled(prompts, 2, seed)
    # Prompts in random order until they have enough pairs; at least one prompt is left to train on.
    reached = accumulate(sizes[prompt] for prompt in order)
    enough = next(number for number, size in enumerate(reached, start=1) if size >= share * len(pairs))
    held = set(order[: min(enough, len(order) - 1)])
    numbers = range(len(pairs))
    return [n for n in numbers if prompts[n] not in held], [n for n in numbers if prompts[n] in held]


def fold(pairs: Sequence[EncodedPair], number: int, seed: int) -> list[list[int]]:
    """Numbers of the pairs in `number` parts of like size; pairs of one prompt stay together.

    Raises DataError if there are fewer prompts than parts.
    """
    prompts = prompt_numbers(pairs)
    order, _ = _shuffled(prompts, number, seed)
    # Parts have like numbers of prompts, not of pairs: fold borders are rounded shares of all prompts.
    ends = [round(part * len(order) / number) for part in range(number + 1)]
    parts = [set(order[start:end]) for start, end in pairwise(ends)]
    return [[n for n, prompt in enumerate(prompts) if prompt in part] for part in parts]


def _shuffled(prompts: list[int], least: int, seed: int) -> tuple[list[int], Counter[int]]:
    """The prompts in random order, and how many pairs each has; DataError if there are fewer than `least`."""
    sizes = Counter(prompts)
    if len(sizes) < least:
        raise DataError(
            "no pairs can be held out",
            given=f"{len(prompts)} pairs of {len(sizes)} prompt(s)",
            expected=f"pairs of {least} prompts at least, as no prompt is on both sides",
            fix="give validation pairs, or more pairs",
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(sizes), generator=generator).tolist(), sizes

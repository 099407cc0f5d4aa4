"""Parts for cross-fitting: what is tied stays together, and parts are of like size."""

from __future__ import annotations

import random

import pytest

from moemerge.data.folds import Tie, deal, folds_of, tied
from moemerge.data.pairs import Pair, prompt_key
from moemerge.errors import DataError


def some_pairs(count: int, texts: int, seed: int, prompts: int = 6) -> list[Pair]:
    """Pairs whose prompts and answers come up again and again."""
    draw, made = random.Random(seed), []
    for row in range(count):
        chosen, rejected = draw.sample(range(texts), 2)
        prompt = f"p{draw.randrange(prompts)}" if prompts else ""
        made.append(Pair(prompt, f"a{chosen}", f"a{rejected}", f"s{row % 2}", row=row))
    return made


def keys(pair: Pair, by: Tie) -> set[object]:
    """What ties a pair to others."""
    more = {"text": {pair.chosen, pair.rejected}, "subset": {("subset", pair.subset)}, "prompt": set()}[by]
    return {("prompt", prompt_key(pair)), *more}


def components(pairs: list[Pair], by: Tie) -> list[int]:
    """Groups by merging any two that share a key, until none do."""
    groups = [({place}, keys(pair, by)) for place, pair in enumerate(pairs)]
    merged = True
    while merged:
        merged = False
        for i in range(len(groups)):
            for j in range(i + 1, len(groups)):
                if groups[i][1] & groups[j][1]:
                    groups[i] = (groups[i][0] | groups[j][0], groups[i][1] | groups[j][1])
                    del groups[j]
                    merged = True
                    break
            if merged:
                break
    number = {place: min(places) for places, _ in groups for place in places}
    return [number[place] for place in range(len(pairs))]


@pytest.mark.parametrize("by", ["text", "prompt", "subset"])
@pytest.mark.parametrize("prompts", [0, 40])
def test_ties_are_chains_of_what_is_shared(by: Tie, prompts: int) -> None:
    for seed in range(5):
        pairs = some_pairs(30, 60, seed, prompts)
        found, wanted = tied(pairs, by), components(pairs, by)
        same = [[a == b for b in found] for a in found]
        assert same == [[a == b for b in wanted] for a in wanted]
        assert found[0] == 0 and set(found) == set(range(max(found) + 1))


def test_copies_of_a_pair_without_a_prompt_are_tied_and_chats_are_compared_whole() -> None:
    chat = [{"role": "user", "content": "q"}]
    turned = [{"content": "q", "role": "user"}]
    assert tied([Pair("", "a", "b"), Pair("", "c", "d"), Pair("", "a", "b")], "prompt") == [0, 1, 0]
    assert tied([Pair(chat, chat, turned), Pair(turned, [], chat)], "prompt") == [0, 0]


def test_folds_never_divide_what_is_tied_and_are_of_like_size() -> None:
    pairs, others = some_pairs(200, 4000, 1, 60), some_pairs(50, 4000, 2, 90)
    folds = folds_of(pairs, others, "text", 4, seed=3)
    number = tied([*pairs, *others], "text")
    fold_of: dict[int, set[int]] = {}
    for group, fold in zip(number, folds, strict=True):
        fold_of.setdefault(group, set()).add(fold)
    assert all(len(found) == 1 for found in fold_of.values())
    sizes = [folds[:200].count(fold) for fold in range(4)]
    largest = max(number[:200].count(group) for group in set(number[:200]))
    assert 1 < largest and max(sizes) - min(sizes) <= largest and set(folds[200:]) == {0, 1, 2, 3}
    assert folds_of(pairs, others, "text", 4, seed=4) != folds


def test_every_kind_is_spread_over_all_parts() -> None:
    parts = deal([[number] for number in range(30)], ["a"] * 18 + ["b"] * 12, 3, 0)
    assert [sum(number < 18 for number in part) for part in parts] == [6, 6, 6]
    assert sorted(number for part in parts for number in part) == list(range(30))


def test_too_few_groups_name_what_helps() -> None:
    pairs = [Pair(f"p{row}", "same", f"b{row}", row=row) for row in range(6)]
    with pytest.raises(DataError, match="cannot be dealt to 3 folds") as fault:
        folds_of(pairs, [], "text", 3, 0)
    assert (
        "6 pairs in 1 group " in fault.value.given
        and "fold_by prompt, of which there are 6" in fault.value.fix
    )
    assert len(folds_of(pairs, [], "prompt", 3, 0)) == 6
    with pytest.raises(DataError, match="cannot be dealt to 7") as fault:
        folds_of(pairs, [], "prompt", 7, 0)
    assert fault.value.fix == "give pairs of more prompts, or folds 6"

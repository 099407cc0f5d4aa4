"""Kinds of preference pairs that a reward model can be good at apart, dealt to members, user and test.

A row of KINDS makes one kind from rows of one source. Debates, first turns and documents have one use each:
what a test asks about no member and no user has seen. Texts of at most 128 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Row, read
from transformers import AutoTokenizer

MAX_LENGTH = 128
CORPORA = ("arguments", "summaries", "replies")
USES = {"test": 0.25, "own": 0.25, "train": 0.5}
Dealt = dict[str, dict[str, list[Row]]]


def as_judged(row: Row, others: Sequence[Row], draw: random.Random) -> tuple[str, str]:
    """The pair as people judged it."""
    return row["chosen"], row["rejected"]


def against_foreign(row: Row, others: Sequence[Row], draw: random.Random) -> tuple[str, str]:
    """The chosen answer against the chosen answer to another prompt."""
    foreign = [other for other in draw.choices(others, k=20) if other["group"] != row["group"]]
    return row["chosen"], foreign[0]["chosen"]


def against_shuffled(row: Row, others: Sequence[Row], draw: random.Random) -> tuple[str, str]:
    """The chosen answer against one in which a third of the words have changed places with a neighbour."""
    words = row["chosen"].split()
    for place in draw.sample(range(len(words) - 1), max(1, len(words) // 6)):
        words[place : place + 2] = words[place + 1], words[place]
    return row["chosen"], " ".join(words)


def against_cut(row: Row, others: Sequence[Row], draw: random.Random) -> tuple[str, str]:
    """The chosen answer against its first half."""
    words = row["chosen"].split()
    return row["chosen"], " ".join(words[: len(words) // 2])


def against_repeated(row: Row, others: Sequence[Row], draw: random.Random) -> tuple[str, str]:
    """The chosen answer against one that says its first half twice."""
    words = row["chosen"].split()
    half = words[: len(words) // 2]
    return row["chosen"], " ".join(half + half)


Make = Callable[[Row, Sequence[Row], random.Random], tuple[str, str]]
KINDS: dict[str, tuple[str, Make]] = {
    "argued": ("arguments", as_judged),
    "foreign": ("replies", against_foreign),
    "shuffled": ("arguments", against_shuffled),
    "summaries": ("summaries", as_judged),
    "helpful": ("helpful", as_judged),
    "harmless": ("harmless", as_judged),
    "cut": ("arguments", against_cut),
    "repeated": ("replies", against_repeated),
}


def sources(data: Path, tokenizer: Path) -> dict[str, list[Row]]:
    """Rows by source: prompt, chosen, rejected, and the group that has one use."""
    found = {"arguments": _arguments(data), "summaries": _summaries(data)}
    replies = _replies(data)
    found["replies"] = replies
    for half in ("helpful", "harmless"):
        found[half] = [row for row in replies if row["kind"].startswith(half)]
    length = AutoTokenizer.from_pretrained(tokenizer)
    return {name: _short(rows, length) for name, rows in found.items()}


def _arguments(data: Path) -> list[Row]:
    rows = read(data / "ukp_convarg/pairs.jsonl.gz")
    return [
        {**row, "prompt": row["prompt"] + "\n", "group": row["subset"].split("_")[0]} for row in rows
    ]  # a debate has two sides, which share arguments


def _replies(data: Path) -> list[Row]:
    rows = [row for part in ("train", "val", "test") for row in read(data / f"hh_rlhf/{part}.jsonl.gz")]
    return [{**row, "kind": row["subset"], "group": row["prompt"].split("\n\nAssistant:")[0]} for row in rows]


def _summaries(data: Path) -> list[Row]:
    """SummEval: two summaries of a text whose scores differ by half a point; of the text its first words."""
    rows = []
    for text in _summeval(data):
        ranked = sorted(text["candidates"], key=lambda candidate: -candidate["score"])
        rows += [
            {"prompt": text["prompt"], "chosen": a["text"], "rejected": b["text"], "group": text["id"]}
            for a in ranked
            for b in ranked
            if a["score"] >= b["score"] + 0.5
        ]
    return rows


def _summeval(data: Path) -> list[Row]:
    """Texts with all their summaries, each with its mean rating; the prompt is the text's first words."""
    return [
        {**text, "prompt": "Summary: " + " ".join(text["prompt"].split()[:25]) + "\n"}
        for text in read(data / "summ_human_bon/candidates.jsonl.gz")
        if text["subset"] == "SummEval"
    ]


def candidate_sets(data: Path, tokenizer: Path, pairs: Sequence[Row]) -> list[Row]:
    """The texts that `pairs` of summaries ask about, each with all its summaries of at most 128 tokens."""
    prompts, length = {row["prompt"] for row in pairs}, AutoTokenizer.from_pretrained(tokenizer)

    def fits(prompt: str, text: str) -> bool:
        return len(length(prompt + text, verbose=False)["input_ids"]) <= MAX_LENGTH

    return [
        {
            "prompt": text["prompt"],
            "candidates": [one for one in text["candidates"] if fits(text["prompt"], one["text"])],
        }
        for text in _summeval(data)
        if text["prompt"] in prompts
    ]


def _short(rows: Sequence[Row], tokenizer: Any) -> list[Row]:
    texts = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    pairs = zip(rows, lengths[0::2], lengths[1::2], strict=True)
    return [row for row, a, b in pairs if max(a, b) <= MAX_LENGTH and len(row["chosen"].split()) > 4]


def deal(rows: Mapping[str, Sequence[Row]], sizes: Mapping[str, int], draw: random.Random) -> Dealt:
    """Pairs by use and kind; `own` is in a random order, so that fewer of them are its first ones."""
    dealt: Dealt = {use: {} for use in USES}
    # Replies hold the helpful and the harmless ones.
    uses = {group: use for source in CORPORA for group, use in _uses(rows[source], draw).items()}
    for kind, (source, make) in KINDS.items():
        for use in USES:
            mine = [row for row in rows[source] if uses[row["group"]] == use]
            dealt[use][kind] = _pairs(kind, draw.sample(mine, len(mine)), make, sizes[use], draw)
    return dealt


def _uses(rows: Sequence[Row], draw: random.Random) -> dict[str, str]:
    """The use of each group."""
    groups = sorted({row["group"] for row in rows})
    draw.shuffle(groups)
    uses: dict[str, str] = {}
    start = 0.0
    for use, share in USES.items():
        stop = start + share
        chosen = groups[round(start * len(groups)) : round(stop * len(groups))]
        uses |= dict.fromkeys(chosen, use)
        start = stop
    return uses


def _pairs(kind: str, rows: Sequence[Row], make: Make, size: int, draw: random.Random) -> list[Row]:
    """At most `size` pairs of a kind; no pair of texts twice."""
    made: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        chosen, rejected = make(row, rows, draw)
        key = (row["prompt"], chosen, rejected)
        if chosen.strip() != rejected.strip():
            made[key] = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "subset": kind}
        if len(made) == size:
            break
    return list(made.values())

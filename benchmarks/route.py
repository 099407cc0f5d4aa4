"""Routing statistics against a plain scoring pass of the same MoE over the same texts.

python benchmarks/route.py [--width 256 --layers 4 --pairs 128 --repeats 7]

Both run in turn in one process on one thread, the first of each repeat in turn; ratios are per repeat. What
route does beside the pass (reading, tokenising, writing, drawing) is in both or in neither: not measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fit import make_pairs, write_tokenizer
from scoring import VOCABULARY, draw_texts, tiny_llama

from moemerge.data.tokenise import EncodedPair, texts_of
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.scoring import score
from moemerge.stages.route import collect
from moemerge.stages.upcycle import upcycle


def make_moe(folder: Path, width: int, layers: int) -> Path:
    """A MoE of 7 routed experts, 5 per token."""
    tiny_llama(width, layers, torch.device("cpu")).save_pretrained(folder / "dense")
    write_tokenizer(folder / "dense")
    return upcycle(model=str(folder / "dense"), output=folder / "moe")


def draw_pairs(count: int) -> list[EncodedPair]:
    """Pairs whose texts are as long as those of hh_rlhf."""
    texts, plain = draw_texts(2 * count), make_pairs(count, 1, VOCABULARY)
    return [EncodedPair(texts[2 * n], texts[2 * n + 1], pair.pair) for n, pair in enumerate(plain)]


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Print the row."""
    parser = argparse.ArgumentParser()
    for name, default in {
        "width": 256,
        "layers": 4,
        "pairs": 128,
        "repeats": 7,
        "batch_tokens": 8192,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs = draw_pairs(arguments.pairs)
    tokens = sum(len(text.ids) for text in texts_of(pairs))
    with tempfile.TemporaryDirectory() as folder:
        moe = make_moe(Path(folder), arguments.width, arguments.layers)
        model, tokenizer = load_reward_model(str(moe), torch.device("cpu")), load_tokenizer(str(moe))
        ways = {
            "score": lambda: score(model, tokenizer, texts_of(pairs), arguments.batch_tokens),
            "route": lambda: collect(model, tokenizer, pairs, arguments.batch_tokens),
        }
        rows = []
        for repeat in range(arguments.repeats + 1):
            order = list(ways) if repeat % 2 else list(ways)[::-1]
            rows.append({way: seconds(ways[way]) for way in order})
    ratios = sorted(row["route"] / row["score"] for row in rows[1:])
    middle = {way: statistics.median(row[way] for row in rows[1:]) for way in ways}
    print(
        f"| route against a plain scoring pass of the MoE "
        f"| Llama {arguments.width} wide, {arguments.layers} layers, "
        f"N=7 K=5, {arguments.pairs} pairs, {tokens} tokens, float32, 1 thread, {arguments.repeats} repeats "
        f"| scoring {middle['score']:.2f} s, route {middle['route']:.2f} s ({ratios[len(ratios) // 2]:.2f}x; "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}) |"
    )


if __name__ == "__main__":
    main()

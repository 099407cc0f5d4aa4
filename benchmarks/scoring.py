"""Scoring texts: tokens per second of moemerge against a plain transformers loop.

The plain loop takes texts as they come, in batches of a fixed number, padded to the longest. Both score the
same texts with the same model, one after the other in each repeat; the ratio is the median over repeats.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from moemerge.data.tokenise import Encoded
from moemerge.models.scoring import score

VOCABULARY = 8192


def tiny_llama(width: int, layers: int, device: torch.device) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        num_labels=1,
        pad_token_id=0,
    )
    model: Any = LlamaForSequenceClassification(config)
    return model.to(device).eval()


def draw_texts(count: int) -> list[Encoded]:
    """Random tokens, with lengths as in hh_rlhf: log-normal, median 204, at most 1024."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(math.log(204), 0.7, count)).round().clip(16, 1024).astype(int)
    return [Encoded(random.integers(3, VOCABULARY, length).tolist(), 0) for length in lengths]


def plain_loop(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[Encoded],
    batch_size: int,
) -> torch.Tensor:
    scores = []
    with torch.no_grad():
        for start in range(0, len(texts), batch_size):
            ids = [text.ids for text in texts[start : start + batch_size]]
            batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
            scores.append(model(**batch).logits[:, 0].float().cpu())
    return torch.cat(scores)


def seconds(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, torch.Tensor]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="texts per batch of the plain loop")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens per batch of moemerge")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    model, texts = tiny_llama(given.width, given.layers, device), draw_texts(given.texts)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", padding_side="right")
    ways = {
        "ours": lambda: score(model, tokenizer, texts, given.batch_tokens),
        "plain": lambda: plain_loop(model, tokenizer, texts, given.batch_size),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    results = {name: seconds(way, device)[1] for name, way in ways.items()}
    for repeat in range(given.repeats):
        for name in sorted(ways, reverse=bool(repeat % 2)):
            times[name].append(seconds(ways[name], device)[0])
    tokens = sum(len(text.ids) for text in texts)
    ratio = statistics.median(p / o for p, o in zip(times["plain"], times["ours"], strict=True))
    speeds = {name: tokens / statistics.median(found) for name, found in times.items()}
    difference = (results["ours"] - results["plain"]).abs().max().item()
    setting = (
        f"{given.width} wide, {given.layers} layers, {given.texts} texts, {tokens} tokens, {given.device}"
    )
    print("| date | setting | ours, tokens/s | plain loop, tokens/s | ratio | largest difference |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    numbers = f"{speeds['ours']:,.0f} | {speeds['plain']:,.0f} | {ratio:.2f} | {difference:.1e}"
    print(f"| {date.today()} | {setting} | {numbers} |")


if __name__ == "__main__":
    main()

"""Each stage on models of an 8B's shape, narrow or real, and what 8B and 70B take by arithmetic.

python benchmarks/scale.py measure [--shapes narrow real] | sizes

`measure` makes random Llamas in bfloat16 and runs every stage on them, a fresh process each: wall and CPU
seconds, peak of anonymous memory, bytes read and written. narrow: 32 layers and 1 + 7 experts in as many
tensors and shards as an 8B has, a sixteenth as wide; with half the layers, and half the experts, it shows
whether time is in proportion, above what a tiny model takes, which is start-up. real: two layers of an 8B as
they are. `sizes` prints the tables of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge import Cost, run

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama's numbers, its routed experts, and bytes per shard."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    experts: int = 7
    shard: int = 5_000_000_000


NARROW = Shape(256, 896, 32, 8016, shard=20_000_000)
SHAPES = {
    "tiny": Shape(64, 128, 2, 256),
    "narrow": NARROW,
    "narrow, half the layers": Shape(256, 896, 16, 8016, shard=20_000_000),
    "narrow, half the experts": Shape(256, 896, 32, 8016, experts=3, shard=20_000_000),
    "real": Shape(4096, 14336, 2, 128256),
}
PUBLISHED = {"8B": Shape(4096, 14336, 32, 128256), "70B": Shape(8192, 28672, 80, 128256)}
SHORT = ["--max-length", "64", "--threads", "1", "--device", "cpu"]


def config_of(shape: Shape) -> Any:
    """The Llama's config, with heads of 128 (narrow: 64) and a key-value head for four."""
    from transformers import AutoConfig

    heads = shape.hidden // (128 if shape.hidden >= 4096 else 64)
    return AutoConfig.for_model(
        "llama",
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
        num_labels=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip


def make_inputs(root: Path, shape: Shape) -> None:
    """The dense model with a tokenizer of 200 words, and pairs."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config_of(shape), dtype=torch.bfloat16)
    model.save_pretrained(root / "dense", max_shard_size=shape.shard)
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *(f"w{n}" for n in range(200))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        root / "dense"
    )
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(200)}" for _ in range(20)) for _ in range(48)]
    rows = [
        {"prompt": a + " ", "chosen": b, "rejected": c}
        for a, b, c in zip(texts[0::3], texts[1::3], texts[2::3], strict=True)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def commands(root: Path, shape: Shape) -> Iterator[tuple[str, list[str]]]:
    """The stages, in the order in which they need each other."""
    pairs = ["--pairs", str(root / "pairs.jsonl"), *SHORT]

    def of(stage: str, *flags: object, output: str) -> tuple[str, list[str]]:
        line = [sys.executable, "-m", "moemerge", stage, *map(str, flags), "--output", str(root / output)]
        return stage, line

    experts = ["--num-routed-experts", shape.experts, "--num-experts-per-tok", 2]
    yield of(
        "upcycle",
        "--model",
        root / "dense",
        *experts,
        "--shard-size",
        shape.shard,
        "--threads",
        1,
        output="moe",
    )
    if shape.hidden < 1024:  # 16 bytes a weight: real ones do not fit into this machine
        some = ["--max-steps", 2, "--batch-size", 4]
        yield of("train", "--model", root / "moe", *some, *pairs, output="trained")
    yield of("route", "--model", root / "moe", *pairs, output="routing")
    fitted = ["--model", root / "moe", "--method", "learned", "--max-epochs", 1]
    yield of("fit", *fitted, "--routing", root / "routing", *pairs, output="fitted")
    yield of("merge", "--model", root / "moe", "--coefficients", root / "fitted", output="merged")
    models = [f"dense={root / 'dense'}", f"merged={root / 'merged'}"]
    yield of("evaluate", "--models", *models, *pairs, output="evaluation")


def measure(name: str, folder: Path) -> dict[str, Cost]:
    """What each stage took on a shape."""
    root, shape = folder / name.replace(", ", "-").replace(" ", "-"), SHAPES[name]
    root.mkdir()
    make_inputs(root, shape)
    found = {}
    print(f"### {name}: {shape}\n")
    print("| stage | wall s | CPU s | peak of anonymous memory, GB | read GB | written GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for stage, command in commands(root, shape):
        cost = found[stage] = run(command, one_thread=True)
        bytes_ = " | ".join(f"{value / GB:.2f}" for value in (cost.anonymous, cost.read, cost.written))
        print(f"| {stage} | {cost.seconds:.1f} | {cost.cpu:.1f} | {bytes_} |", flush=True)
    stored = sum(path.stat().st_size for path in (root / "moe").glob("*.safetensors"))
    shards = len(list((root / "moe").glob("*.safetensors")))
    print(f"\nMoE: {stored / GB:.2f} GB in {shards} files\n", flush=True)
    shutil.rmtree(root)
    return found


def proportions(found: dict[str, dict[str, Cost]]) -> None:
    """CPU time of the halves as a share of the whole's, both above the tiny model's."""
    whole, tiny, halves = "narrow", "tiny", ("narrow, half the layers", "narrow, half the experts")
    if not {whole, tiny, *halves} <= found.keys():
        return
    print("| CPU time above start-up, of the whole's | half the layers | half the experts |")
    print("| --- | ---: | ---: |")
    for stage, floor in found[tiny].items():
        above = {name: costs[stage].cpu - floor.cpu for name, costs in found.items() if stage in costs}
        print(f"| {stage} | " + " | ".join(f"{above[half] / above[whole]:.2f}" for half in halves) + " |")


def sizes() -> None:
    """What 8B and 70B take, by moemerge.models.sizes."""
    from moemerge.models.sizes import ModelSize
    from moemerge.options.train import TrainSettings
    from moemerge.options.upcycle import UpcycleSettings

    upcycled = UpcycleSettings(num_routed_experts=7, num_experts_per_tok=2)
    dense = {name: ModelSize.of(config_of(shape)) for name, shape in PUBLISHED.items()}
    print("| model | parameters | on the disk, bfloat16 |\n| --- | ---: | ---: |")
    for name, size in dense.items():
        for what, model in (
            (f"{name}", size),
            (f"{name}, 1 + 7 experts in all layers", size.upcycled(upcycled)),
        ):
            print(f"| {what} | {model.parameters / 1e9:.1f}B | {2 * model.parameters / GB:.0f} GB |")
    ways: dict[str, dict[str, Any]] = {
        "all weights": {},
        "experts, routers, head": {"trainable": "experts"},
        "the same in the upper 4 layers": {"trainable": "experts", "train_layers": "last:4"},
        "all weights, in bfloat16": {"weights": "bfloat16"},
        "the same in the upper 4 layers, in bfloat16": {
            "trainable": "experts", "train_layers": "last:4", "weights": "bfloat16",
        },
    }  # fmt: skip
    print("\n| training | " + " | ".join(f"{n} dense | {n} MoE" for n in dense) + " |")
    print("| --- |" + " ---: |" * 2 * len(dense))
    for way, options in ways.items():
        settings = TrainSettings(**options)
        of = [size.training_memory(settings) for d in dense.values() for size in (d, d.upcycled(upcycled))]
        print(f"| {way} | " + " | ".join(f"{bytes_ / GB:,.0f} GB" for bytes_ in of) + " |")


def main() -> None:
    """Measure, or print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "sizes"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    if arguments.what == "sizes":
        sizes()
        return
    with tempfile.TemporaryDirectory() as folder:
        proportions({name: measure(name, Path(folder)) for name in arguments.shapes})


if __name__ == "__main__":
    main()

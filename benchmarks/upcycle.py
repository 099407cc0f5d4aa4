"""Upcycling against a raw copy of the bytes that it writes; peak memory against the shard size.

python benchmarks/upcycle.py [--hidden 768 --layers 8 --dtype bfloat16 --repeats 5]

Prints one row for benchmarks/README.md: median ratios of wall and of CPU time (writing only, and the whole
stage with its checksums and its comparison with the dense model), and peak memory of the writing in shards.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from moemerge.models.checkpoint import write_checkpoint
from moemerge.models.folder import ModelFolder
from moemerge.models.modelling import moe_config
from moemerge.options.upcycle import Upcycle
from moemerge.stages.upcycle import _dense_config, _moe_tensors, _settings, upcycle


def make_dense(folder: Path, hidden: int, layers: int, dtype: str = "float32") -> None:
    """A random Llama reward model and a tokenizer of one word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = AutoConfig.for_model(
        "llama",
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        num_labels=1,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(config).to(getattr(torch, dtype)).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder
    )


def write_only(options: Upcycle) -> None:
    """What upcycle does with tensors, without checksums and comparison; flushed to disk."""
    source = ModelFolder(options.model)
    config = _dense_config(source)
    moe = moe_config(config, _settings(options, config))
    options.output.mkdir()
    tensors = _moe_tensors(source, moe, options)
    write_checkpoint(options.output, tensors, options.shard_size)
    flush(options.output)


def raw_copy(source: Path, target: Path) -> None:
    """Copy all weights as they are; flushed to disk."""
    target.mkdir()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
    flush(target)


def flush(folder: Path) -> None:
    """Wait until every file is on disk."""
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def timed(function: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Wall and CPU seconds that one call takes."""
    start, work = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - start, time.process_time() - work


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_memory(options: Upcycle, queue: multiprocessing.Queue) -> None:
    """Most anonymous memory that writing adds to a fresh process, in bytes, looked at every 2 ms."""
    _settings(options, _dense_config(ModelFolder(options.model)))
    before, highest, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    write_only(options)
    done.set()
    watcher.join()
    queue.put(highest[0] - before)


def main() -> None:
    """Run the copies side by side and print the row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shard-size", type=int, default=300_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        root = Path(name)
        make_dense(root / "dense", arguments.hidden, arguments.layers, arguments.dtype)
        options = Upcycle(
            model=str(root / "dense"), output=root / "moe", shard_size=arguments.shard_size, threads=2
        )
        upcycle(options)
        written = sum(path.stat().st_size for path in (root / "moe").glob("*.safetensors"))
        rows = []
        for repeat in range(arguments.repeats):
            targets = [root / f"{kind}{repeat}" for kind in ("copy", "write", "stage")]
            copy = timed(raw_copy, root / "moe", targets[0])
            write = timed(write_only, options.model_copy(update={"output": targets[1]}))
            whole = timed(upcycle, options.model_copy(update={"output": targets[2]}))
            rows.append((copy, write, whole))
            for target in targets:
                shutil.rmtree(target)
        queue: multiprocessing.Queue = multiprocessing.get_context("spawn").Queue()
        final = options.model_copy(update={"output": root / "memory"})
        process = multiprocessing.get_context("spawn").Process(target=peak_memory, args=(final, queue))
        process.start()
        peak = queue.get()
        process.join()
    told = []
    for clock, what in enumerate(("wall", "CPU")):
        copied, wrote, staged = (statistics.median(row[i][clock] for row in rows) for i in range(3))
        ratios = [statistics.median(row[i][clock] / row[0][clock] for row in rows) for i in (1, 2)]
        told.append(
            f"{what}: copy {copied:.2f} s, write {wrote:.2f} s ({ratios[0]:.2f}x), whole stage {staged:.2f} s"
            f" ({ratios[1]:.2f}x)"
        )
    print(
        f"| upcycle | {written / 1e9:.2f} GB written in {arguments.dtype}, shards of"
        f" {arguments.shard_size / 1e6:.0f} MB | {'; '.join(told)};"
        f" peak memory {peak / arguments.shard_size:.2f} shards |"
    )


if __name__ == "__main__":
    main()

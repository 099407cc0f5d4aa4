"""Merging a MoE against a raw copy of its bytes and against stock mergekit over its exported experts.

python benchmarks/merge.py [--hidden 640 --layers 6 --repeats 5]

Every command is a fresh process, start-up included. Once everything is imported, "merge itself" is reading,
averaging, the comparison with float64 sums, writing and flushing; "whole stage" also reads back and hashes.
Times are taken with the files in the page cache; bytes in a last pass without, because reads through mmap
show only there.
Prints one row for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

MB = 1e6


@dataclass(frozen=True)
class Cost:
    """What one child process took: wall and CPU seconds, bytes.

    `anonymous` is its peak of memory that no file stands behind; `read` came from the disk, `written` is what
    must go there.
    """

    seconds: float
    cpu: float
    anonymous: int
    read: int
    written: int
    said: str


def run(command: list[str], one_thread: bool = False) -> Cost:
    """Run `command` to its end and see what it took, its memory looked at every 5 ms."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": "1"} if one_thread else {})
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=said, stderr=told, env=environment)
        with watched(child.pid) as highest:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.perf_counter() - start
        moved = fields(child.pid, "io")
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0), told.seek(0)
        if child.returncode:
            raise SystemExit(f"{command} failed:\n{told.read()}")
        cpu = usage.ru_utime + usage.ru_stime
        return Cost(seconds, cpu, highest[0], moved["read_bytes"], moved["write_bytes"], said.read())


@contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """The peak of a process's anonymous memory in bytes, complete when the block ends."""
    highest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], fields(pid, "status").get("RssAnon", 0) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield highest
    finally:
        done.set()
        watcher.join()


def fields(pid: int, name: str) -> dict[str, int]:
    """The numbers in /proc/PID/NAME."""
    lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines)
    return {key: int(text.split()[0]) for key, text in pairs if text.split() and text.split()[0].isdigit()}


def raw_copy(root: Path, target: Path) -> None:
    """Print seconds: a copy of the MoE's weights as they are, flushed to disk."""
    start = time.perf_counter()
    target.mkdir()
    for path in (root / "moe").glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
    flush(target)
    print(time.perf_counter() - start)


def flush(folder: Path) -> None:
    """Wait until every file below `folder` is on disk."""
    for path in folder.rglob("*.*"):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def forget(folder: Path) -> None:
    """Take the files below `folder` out of the page cache."""
    flush(folder)
    for path in folder.rglob("*.*"):
        with path.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_inputs(root: Path, hidden: int, layers: int, dtype: str, shard_size: int) -> None:
    """A MoE of 1 shared and 7 routed experts that differ, random coefficients, its experts exported."""
    import torch
    from upcycle import make_dense

    from moemerge.merging.coefficients import Coefficients
    from moemerge.stages.export import export
    from moemerge.stages.fit import fit
    from moemerge.stages.upcycle import upcycle as make_moe

    make_dense(root / "dense", hidden, layers, dtype)
    make_moe(
        model=str(root / "dense"), output=root / "moe", expert_noise=0.1, shard_size=shard_size, threads=2
    )
    fit(model=str(root / "moe"), output=root / "uniform", method="uniform")
    uniform = Coefficients.load(root / "uniform")
    generator = torch.Generator().manual_seed(0)
    alpha_LN = torch.rand(uniform.alpha_LN.shape, generator=generator, dtype=torch.float64).softmax(1)
    shared_L = torch.rand(uniform.shared_L.shape, generator=generator, dtype=torch.float64)
    replace(uniform, alpha_LN=alpha_LN, shared_L=shared_L).save(root / "coefficients")
    export(model=str(root / "moe"), coefficients=str(root / "coefficients"), output=root / "experts")


def ours(root: Path, output: Path) -> list[str]:
    """The command that merges by moemerge."""
    options = ["--model", root / "moe", "--coefficients", root / "coefficients", "--output", output]
    return [sys.executable, "-m", "moemerge", "merge", *map(str, options)]


def theirs(root: Path, output: Path, *more: str) -> list[str]:
    """The command that merges by mergekit."""
    program = Path(sys.executable).with_name("mergekit-yaml")
    return [str(program), str(root / "experts" / "linear.yml"), str(output), "--quiet", *more]


def merge_itself(root: Path, output: Path) -> None:
    """Print anonymous memory before, seconds of one merge and of one whole stage, everything imported."""
    import torch

    from moemerge.merging.sources.open import open_source
    from moemerge.models.checkpoint import write_checkpoint
    from moemerge.options.merge import Merge
    from moemerge.stages.merge import _dense_tensors, _way, merge

    options = Merge(model=str(root / "moe"), coefficients=str(root / "coefficients"), output=output / "stage")
    source = open_source(options)
    before = fields(os.getpid(), "status")["RssAnon"] * 1024
    output.mkdir()
    start = time.perf_counter()
    way = _way(options, source, source.dense_dtype, torch.device("cpu"))
    write_checkpoint(output, _dense_tensors(source, way, source.dense_dtype), options.shard_size)
    flush(output)
    merged = time.perf_counter()
    merge(options)
    print(before, merged - start, time.perf_counter() - merged)


def commands(root: Path, output: Path) -> dict[str, tuple[list[str], bool]]:
    """What is compared, and whether it has one thread only."""
    copy, itself = (
        [sys.executable, __file__, flag, str(root), str(output)] for flag in ("--copy", "--itself")
    )
    return {
        "copy": (copy, False),
        "merge itself": (itself, False),
        "moemerge merge": (ours(root, output), False),
        "mergekit-yaml": (theirs(root, output), False),
        "mergekit-yaml -j 1": (theirs(root, output, "-j", "1"), True),
    }


def compare(root: Path, repeats: int) -> dict[str, list[Cost]]:
    """Costs of all commands in turn, `repeats` times, and then once with files out of the page cache."""
    costs: dict[str, list[Cost]] = {name: [] for name in commands(root, root)}
    for repeat in range(repeats + 1):
        for name, (command, one_thread) in commands(root, root / "out").items():
            if repeat == repeats:
                forget(root)
            costs[name].append(run(command, one_thread))
            print(f"{name:<20} {costs[name][-1]}", file=sys.stderr)
            flush(root / "out")
            keep = root / f"last {name}"
            shutil.rmtree(keep, ignore_errors=True)
            (root / "out").rename(keep)
    return costs


def largest_difference(one: Path, other: Path) -> float:
    """Between two checkpoints of the same tensors."""
    from moemerge.models.checkpoint import Checkpoint

    mine, theirs = Checkpoint(one), Checkpoint(other)
    assert set(mine.names) == set(theirs.names)
    return max(float((mine.tensor(n).double() - theirs.tensor(n).double()).abs().max()) for n in mine.names)


def told(cost: Cost) -> list[float]:
    """The numbers that the child printed."""
    return [float(word) for word in cost.said.split()]


def report(costs: dict[str, list[Cost]], largest_shard: int, difference: float) -> Iterator[str]:
    """The row's parts; ratios are medians of ratios per repeat."""
    *timed, cold = zip(*costs.values(), strict=True)
    rounds, last = [dict(zip(costs, row, strict=True)) for row in timed], dict(zip(costs, cold, strict=True))
    median = statistics.median
    copies = [told(r["copy"])[0] for r in rounds]
    yield f"copy {median(copies):.2f} s (smallest {min(copies):.2f})"
    for column, what in ((1, "merge itself"), (2, "whole stage")):
        seconds = [told(r["merge itself"])[column] for r in rounds]
        ratio = median(s / c for s, c in zip(seconds, copies, strict=True))
        yield f"{what} {median(seconds):.2f} s ({min(seconds):.2f}; {ratio:.2f}x)"
    commands = list(costs)[2:]
    for name in commands:
        seconds, cpu = [r[name].seconds for r in rounds], [r[name].cpu for r in rounds]
        times = median(r[name].seconds / r["moemerge merge"].seconds for r in rounds)
        work = median(r[name].cpu / r["moemerge merge"].cpu for r in rounds)
        yield (
            f"{name} {median(seconds):.2f} s ({min(seconds):.2f}; {times:.1f}x),"
            f" CPU {median(cpu):.1f} s ({work:.1f}x)"
        )
    peaks = {name: max(r[name].anonymous for r in rounds) for name in commands}
    listed = (f"{name} {peak / MB:.0f} MB ({peak / largest_shard:.2f})" for name, peak in peaks.items())
    rise = max(r["merge itself"].anonymous - told(r["merge itself"])[0] for r in rounds)
    alone = f"merging alone {rise / largest_shard:.2f}"
    yield f"anonymous memory (in largest shards): {', '.join(listed)}, {alone}"
    moved = (f"{n} {last[n].read / MB:.0f}, {last[n].written / MB:.0f}" for n in ("copy", *commands))
    yield f"MB from and to the disk, cold: {'; '.join(moved)}"
    yield f"largest difference to mergekit's result {difference:.1e}"


def main() -> None:
    """Run everything side by side and print the row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shard-size", type=int, default=300_000_000)
    parser.add_argument("--itself", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--copy", nargs=2, type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.itself:
        return merge_itself(*a.itself)
    if a.copy:
        return raw_copy(*a.copy)
    with tempfile.TemporaryDirectory(dir=".", suffix=".tmp") as name:
        root = Path(name).absolute()
        make_inputs(root, a.hidden, a.layers, a.dtype, a.shard_size)
        costs = compare(root, a.repeats)
        difference = largest_difference(root / "last moemerge merge", root / "last mergekit-yaml")
        sizes = [path.stat().st_size for path in (root / "moe").glob("*.safetensors")]
    print(
        f"| merge of 8 experts | {sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards of at most"
        f" {max(sizes) / MB:.0f} MB, {a.dtype}, {a.repeats} repeats, load {os.getloadavg()[0]:.1f} | "
        + "; ".join(report(costs, max(sizes), difference))
        + " |"
    )


if __name__ == "__main__":
    main()

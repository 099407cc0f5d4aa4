"""Merging a MoE against a raw copy of its bytes and against stock mergekit over its exported experts; and
four of these as models, against mergekit's linear.

python benchmarks/merge.py [--hidden 640 --layers 6 --dtype bfloat16 --one-thread --repeats 5]

Every command is a fresh process, start-up included. Once everything is imported, "merge itself" is reading,
averaging, the comparison with plain sums, writing and flushing; "whole stage" also reads back and hashes.
Times are taken with the files in the page cache; bytes in a last pass without, because reads through mmap
show only there.
Prints one row for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
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
LIST, LIST_THERE = "moemerge merge --models", "mergekit-yaml of the models"


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
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if one_thread}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | threads
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        start = time.perf_counter()
        # Configurations name models by paths from their own folder.
        folder = next((Path(part).parent for part in command if part.endswith(".yml")), None)
        child = subprocess.Popen(command, stdout=said, stderr=told, env=environment, cwd=folder)
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
    """Print wall and CPU seconds: a copy of the MoE's weights as they are, flushed to disk."""
    start, work = time.perf_counter(), time.process_time()
    target.mkdir()
    for path in (root / "moe").glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
    flush(target)
    print(time.perf_counter() - start, time.process_time() - work)


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
    models = "".join(f"- model: {folder}\n  parameters: {{weight: 1.0}}\n" for folder in exported(root))
    (root / "models.yml").write_text(f"merge_method: linear\ndtype: {dtype}\nmodels:\n{models}")


def exported(root: Path) -> list[Path]:
    """Four of the experts as models of their own."""
    return sorted(path.parent for path in (root / "experts").rglob("config.json"))[:4]


def ours(output: Path, *members: object) -> list[str]:
    """The command that merges by moemerge."""
    return [sys.executable, "-m", "moemerge", "merge", *map(str, members), "--output", str(output)]


def theirs(recipe: Path, output: Path, *more: str) -> list[str]:
    """The command that merges by mergekit."""
    program = Path(sys.executable).with_name("mergekit-yaml")
    return [str(program), str(recipe), str(output), "--quiet", *more]


def merge_itself(root: Path, output: Path) -> None:
    """Print anonymous memory before; wall, then CPU seconds of one merge and of one whole stage; and CPU
    seconds of averaging alone, which nothing is written of. Everything is imported before."""
    import torch

    from moemerge.merging.coefficients import Coefficients
    from moemerge.merging.sources.open import open_source
    from moemerge.models.checkpoint import write_checkpoint
    from moemerge.options.merge import Merge
    from moemerge.stages.merge import _dense_tensors, _way, merge

    options = Merge(model=str(root / "moe"), coefficients=str(root / "coefficients"), output=output / "stage")
    source = open_source(options)
    before = fields(os.getpid(), "status")["RssAnon"] * 1024
    output.mkdir()
    times = [(time.perf_counter(), time.process_time())]

    def take_time() -> None:
        times.append((time.perf_counter(), time.process_time()))

    coefficients = Coefficients.load(root / "coefficients")
    way = _way(options, source, coefficients, source.dense_dtype, torch.device("cpu"))
    write_checkpoint(output, _dense_tensors(source, way, source.dense_dtype), options.shard_size)
    flush(output)
    take_time()
    merge(options)
    take_time()
    for _ in _dense_tensors(source, way, source.dense_dtype):
        pass
    take_time()
    (wall, cpu), (wall_stage, cpu_stage), (_, cpu_average) = (
        (after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(times)
    )
    print(before, wall, wall_stage, cpu, cpu_stage, cpu_average)


def commands(root: Path, output: Path) -> dict[str, list[str]]:
    """What is compared."""
    copy, itself = (
        [sys.executable, __file__, flag, str(root), str(output)] for flag in ("--copy", "--itself")
    )
    linear = root / "experts" / "linear.yml"
    return {
        "copy": copy,
        "merge itself": itself,
        "moemerge merge": ours(output, "--model", root / "moe", "--coefficients", root / "coefficients"),
        "mergekit-yaml": theirs(linear, output),
        "mergekit-yaml -j 1": theirs(linear, output, "-j", "1"),
        LIST: ours(output, "--models", *exported(root)),
        LIST_THERE: theirs(root / "models.yml", output),
    }


def compare(root: Path, repeats: int, one_thread: bool) -> dict[str, list[Cost]]:
    """Costs of all commands in turn, `repeats` times, and then once with files out of the page cache."""
    costs: dict[str, list[Cost]] = {name: [] for name in commands(root, root)}
    for repeat in range(repeats + 1):
        for name, command in commands(root, root / "out").items():
            if repeat == repeats:
                forget(root)
            costs[name].append(run(command, one_thread or command[-1] == "1"))
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


def report(costs: dict[str, list[Cost]], size: int, largest_shard: int, difference: float) -> Iterator[str]:
    """The row's parts; ratios are medians of ratios per repeat."""
    *timed, cold = zip(*costs.values(), strict=True)
    rounds, last = [dict(zip(costs, row, strict=True)) for row in timed], dict(zip(costs, cold, strict=True))
    median = statistics.median
    for clock, copied, columns in (("wall", 0, (1, 2)), ("CPU", 1, (3, 4))):
        copies = [told(r["copy"])[copied] for r in rounds]
        yield f"{clock}: copy {median(copies):.2f} s (smallest {min(copies):.2f})"
        for column, what in zip(columns, ("merge itself", "whole stage"), strict=True):
            seconds = [told(r["merge itself"])[column] for r in rounds]
            ratio = median(s / c for s, c in zip(seconds, copies, strict=True))
            yield f"{what} {median(seconds):.2f} s ({min(seconds):.2f}; {ratio:.2f}x)"
    speed = median(size / told(r["merge itself"])[5] for r in rounds)
    yield f"averaging alone {speed / 1e9:.2f} GB of the MoE per CPU second"
    commands = list(costs)[2:]
    for name in commands:
        base = LIST if name in (LIST, LIST_THERE) else "moemerge merge"
        seconds, cpu = [r[name].seconds for r in rounds], [r[name].cpu for r in rounds]
        times = median(r[name].seconds / r[base].seconds for r in rounds)
        work = median(r[name].cpu / r[base].cpu for r in rounds)
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
    yield f"largest difference to mergekit's results {difference:.1e}"


def main() -> None:
    """Run everything side by side and print the row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shard-size", type=int, default=300_000_000)
    parser.add_argument("--one-thread", action="store_true", help="every program on one thread")
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
        costs = compare(root, a.repeats, a.one_thread)
        pairs = (("moemerge merge", "mergekit-yaml"), (LIST, LIST_THERE))
        difference = max(largest_difference(root / f"last {one}", root / f"last {two}") for one, two in pairs)
        sizes = [path.stat().st_size for path in (root / "moe").glob("*.safetensors")]
    threads = ", one thread" if a.one_thread else ""
    print(
        "| merge of 8 experts, and of four of them as models"
        f" | {sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards of at most {max(sizes) / MB:.0f} MB,"
        f" {a.dtype}{threads}, {a.repeats} repeats, load {os.getloadavg()[0]:.1f} | "
        + "; ".join(report(costs, sum(sizes), max(sizes), difference))
        + " |"
    )


if __name__ == "__main__":
    main()

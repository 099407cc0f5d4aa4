"""Mutation fuzzing of everything that moemerge reads from elsewhere: a valid result or a MoemergeError.

`python tests/promises/fuzz.py --count 10000 --seed 0` prints counts, and exits with 1 if an input led to
another exception, took longer than SECONDS, needed more than MEMORY, or changed a file. Inputs are good
ones, in pieces: bytes flipped, cut, doubled, spliced, swapped for awkward ones; structure kept where a
checksum or length would stop a blind mutation too early.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "support"))

import environment  # noqa: F401  (one thread, no network)
import torch
from hostile_files import CANDIDATES, PAIR, RECIPE, pairs, shard
from safetensors.torch import save_file

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.reading import read_candidates, read_pairs
from moemerge.errors import CheckpointError, MoemergeError
from moemerge.merging.blocks import BLOCK_NAME
from moemerge.merging.coefficients import FORMAT, Coefficients
from moemerge.models.config_file import read_config
from moemerge.models.folder import ModelFolder
from moemerge.models.layout import FILE as LAYOUT
from moemerge.models.layout import _key, read_layout
from moemerge.models.moe_settings import MoeSettings
from moemerge.models.routing import RoutingStatistics
from moemerge.options.base import TextFormat
from moemerge.run.check import check_recipe

SECONDS = 20
MEMORY = 8 * 2**30  # of address space, above what the process has at the start
AWKWARD = [
    b"", b"\0", b"\xff", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b"\n", b"-",
    b"&a ", b"*a", b"<<: ", b"!!", b"%", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0",
    b"9" * 5000, b"18446744073709551616", b"2147483648", b"1" + b"0" * 400, b"../", b"/etc/passwd",
    b"\\ud800", b"\\u0000",
    b"a" * 300, b"[" * 2000, b"{\"a\":" * 2000,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "x", "\0", "../x",
    "é" * 200, [], {}, [[]], {"": 0}, [1], ["a"], {"a": 1}, "layers.0", "F32", "torch", 1e308,
]  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` after one to four changes."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randint(0, len(data))
        stop = min(len(data), start + draw.choice([0, 1, 1, 2, 4, 16, 200]))
        piece = data[start:stop]
        change = draw.choice(
            [
                draw.choice(AWKWARD),
                piece * draw.randint(2, 5),
                piece[::-1],
                bytes(byte ^ (1 << draw.randint(0, 7)) for byte in piece),
                data[: draw.randint(0, min(len(data), 200))],
                b"",
            ]
        )
        data = data[:start] + change + data[stop:]
        if draw.random() < 0.1:
            data = data[: draw.randint(0, len(data))]
    return data[:2_000_000]


def changed(value: Any, draw: random.Random) -> Any:
    """A JSON value with one to three of its parts replaced, removed, renamed or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 3)):
        value = _changed_once(value, draw)
    return value


def _changed_once(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.7:
            return {**value, key: _changed_once(value[key], draw)}
        rest = {name: one for name, one in value.items() if name != key}
        return rest if kind < 0.85 else {**rest, str(draw.choice(VALUES)): value[key]}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        new = draw.choice([[], [_changed_once(value[place], draw)], [value[place]] * 2])
        return [*value[:place], *new, *value[place + 1 :]]
    return draw.choice(VALUES)


@dataclass
class Target:
    """Something that reads: `make` writes one broken input into an empty folder, `read` reads it."""

    make: Callable[[Path, random.Random], None]
    read: Callable[[Path], object]


@dataclass
class Report:
    """What came of the inputs, by target: how many were read, how many refused; and those that failed."""

    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Counts in a line per target."""
        lines = [f"{name:<14} {self.read[name]:>6} read  {self.refused[name]:>6} refused" for name in TARGETS]
        total = sum(self.read.values()) + sum(self.refused.values()) + len(self.failures)
        return "\n".join([*lines, f"{total} inputs, {len(self.failures)} failures"])


def _text(file: str, *seeds: str) -> Callable[[Path, random.Random], None]:
    def make(folder: Path, draw: random.Random) -> None:
        data = mutated(draw.choice(seeds).encode(), draw)
        (folder / file).write_bytes(gzip.compress(data, mtime=0) if file.endswith(".gz") else data)

    return make


def _rows(file: str, *seeds: Any) -> Callable[[Path, random.Random], None]:
    def make(folder: Path, draw: random.Random) -> None:
        rows = [changed(draw.choice(seeds), draw) for _ in range(3)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / file).write_bytes(mutated(lines, draw) if draw.random() < 0.5 else lines)

    return make


def _damage(path: Path, draw: random.Random) -> None:
    """A safetensors file with broken bytes, or with a whole header that says something else."""
    data = path.read_bytes()
    if draw.random() < 0.4:
        path.write_bytes(mutated(data, draw))
        return
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(changed(header, draw)).encode()
    told = len(text) if draw.random() < 0.9 else draw.choice([0, 2**62, len(text) + 1, 10**8])
    path.write_bytes(struct.pack("<Q", told) + text + data[8 + length :])


CONFIG = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "num_hidden_layers": 2}
SETTINGS = {
    "num_routed_experts": 3, "num_experts_per_tok": 2, "shared_expert": True, "layers": [0, 1], "gate": "xft",
    "gate_shared_weight": 0.5, "router": "linear", "router_init_std": 0.02, "balance_coefficient": 0.01,
    "balance_loss": "cv", "dense_dtype": "float32",
}  # fmt: skip
STACK = "model.layers.0.mlp.experts.up_proj"
TENSOR = {
    "layer": 0, "matrix": "up", "dense": "model.layers.0.mlp.up_proj.weight",
    "shared": "model.layers.0.mlp.shared_expert.up_proj.weight", "stacked": STACK, "rows": [0, 4],
    "transposed": False, "shape": [4, 2],
}  # fmt: skip
LAYOUT_SEED = {
    "class_name": "Moe", "moe": {STACK: [3, 4, 2], "score.weight": [1, 2]}, "tied": [],
    "dense": [TENSOR["dense"], "score.weight"], "experts": [TENSOR], "dense_config": CONFIG,
}  # fmt: skip
MANIFEST = {
    "schema": 1, "stage": "merge", "options": {}, "inputs": {}, "results": {}, "files": {}, "versions": {},
}  # fmt: skip


def _checkpoint(folder: Path, draw: random.Random) -> None:
    tensors = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4), "c": torch.ones(2, 2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if draw.random() < 0.5:
        shard(folder)
        index = folder / "model.safetensors.index.json"
        if draw.random() < 0.5:
            index.write_text(json.dumps(changed(json.loads(index.read_text()), draw)))
            return
        _damage(draw.choice(sorted(folder.glob("*.safetensors"))), draw)
        return
    _damage(folder / "model.safetensors", draw)


def _read_checkpoint(folder: Path) -> None:
    checkpoint = ModelFolder(folder).weights
    for name in checkpoint.names:
        checkpoint.shape(name)
        checkpoint.dtype(name)
        checkpoint.tensor(name)
    checkpoint.refuse_quantised(checkpoint.names)


def _coefficients(folder: Path, draw: random.Random) -> None:
    made = Coefficients.of_layers([0, 1], torch.full((2, 4), 0.25).double(), torch.full((2,), 0.5).double())
    path = made.save(folder)
    if draw.random() < 0.5:
        blocks = json.dumps(changed(made.blocks, draw))
        save_file(
            {"alpha_LN": made.alpha_LN, "shared_L": made.shared_L},
            path,
            metadata={"format": FORMAT, "blocks": mutated(blocks.encode(), draw).decode("utf-8", "replace")},
        )
    else:
        _damage(path, draw)


def _read_coefficients(folder: Path) -> None:
    found = Coefficients.load(folder)
    assert all(BLOCK_NAME.fullmatch(block) for block in found.blocks)
    assert bool(found.alpha_LN.isfinite().all()) and list(found.table())


def _routing(folder: Path, draw: random.Random) -> None:
    statistics = RoutingStatistics([0, 1], 3, 2)
    with statistics.observe(dict.fromkeys([0, 1], _Idle()), [("", "chosen")]):  # type: ignore[arg-type]
        pass
    path = statistics.save(folder)
    if draw.random() < 0.5:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        key = draw.choice(list(header["__metadata__"]))
        text = draw.choice(
            [json.dumps(draw.choice(VALUES)), "[" * 3000, "1000000", "-1", "[0, 1, 2]", '[["", 1]]']
        )
        header["__metadata__"][key] = text
        new = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])
    else:
        _damage(path, draw)


class _Idle:
    """Stands for a layer that nothing passes through."""

    observer = None


def _layout(folder: Path, draw: random.Random) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    values = changed(LAYOUT_SEED, draw)
    values = {**values, "for": _key(folder)} if isinstance(values, dict) else values
    data = json.dumps(values).encode()
    (folder / LAYOUT).write_bytes(mutated(data, draw) if draw.random() < 0.3 else data)


def _read_layout(folder: Path) -> None:
    layout = read_layout(folder)
    if layout is None:
        raise CheckpointError("no layout", given="", expected="", fix="")
    assert all(tensor.stacked in layout.moe for tensor in layout.experts)


def _settings(folder: Path, draw: random.Random) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "moemerge": changed(SETTINGS, draw)}))


def _read_settings(folder: Path) -> None:
    values = read_config(folder)["moemerge"]
    if isinstance(values, dict):
        MoeSettings.read(values).to_dict()


def _read_recipe(folder: Path) -> None:
    faults = check_recipe(folder / "recipe.yml")
    assert all(isinstance(fault, MoemergeError) for fault in faults)
    if faults:
        raise faults[0]


FULL = (Path(__file__).parent.parent.parent / "merge_configs" / "quickstart.yml").read_text(encoding="utf-8")
LINES = "".join(json.dumps(pair) + "\n" for pair in pairs(4))
CHAT = {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
CHAT["rejected"] = [CHAT["chosen"][0], {"role": "assistant", "content": "c"}]
PLAIN = TextFormat(bad_rows="skip")
TARGETS: dict[str, Target] = {
    "recipes": Target(_text("recipe.yml", RECIPE, FULL), _read_recipe),
    "pairs": Target(
        _rows("data.jsonl", PAIR, {**PAIR, "margin": 1.0, "subset": "s"}, CHAT),
        lambda folder: read_pairs(str(folder / "data.jsonl"), PLAIN),
    ),
    "pairs_gz": Target(
        _text("data.jsonl.gz", LINES), lambda folder: read_pairs(str(folder / "data.jsonl.gz"), PLAIN)
    ),
    "json": Target(
        _text("data.json", json.dumps(pairs(3))), lambda folder: read_pairs(str(folder / "data.json"), PLAIN)
    ),
    "candidates": Target(
        _rows("data.jsonl", CANDIDATES), lambda folder: read_candidates(str(folder / "data.jsonl"), PLAIN)
    ),
    "checkpoints": Target(_checkpoint, _read_checkpoint),
    "coefficients": Target(_coefficients, _read_coefficients),
    "routing": Target(_routing, RoutingStatistics.load),
    "layouts": Target(_layout, _read_layout),
    "moe_settings": Target(_settings, _read_settings),
    "manifests": Target(_text("manifest.json", json.dumps(MANIFEST)), read_manifest),
}


class TooSlow(BaseException):
    """An input took longer than SECONDS; no `except Exception` takes it for a fault of the input."""


@contextmanager
def limits() -> Iterator[None]:
    """Time for one input."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file in `folder` and what it holds."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one(name: str, number: int, seed: int, report: Report) -> None:
    """Make and read input `number` of a target; equal arguments give equal texts."""
    target, draw = TARGETS[name], random.Random(f"{seed} {name} {number}")
    with tempfile.TemporaryDirectory(prefix="moemerge-fuzz-") as place:
        folder = Path(place)
        target.make(folder, draw)
        before = files_of(folder)
        try:
            with limits():
                target.read(folder)
            report.read[name] += 1
        except MoemergeError:
            report.refused[name] += 1
        except (Exception, TooSlow) as error:
            last = "".join(traceback.format_exception(error)[-3:])
            report.failures.append(f"{name} {number}: {type(error).__name__}: {error}\n{last}"[:3000])
        if files_of(folder) != before:
            report.failures.append(f"{name} {number}: files were changed")


def fuzz(count: int, seed: int = 0) -> Report:
    """Read `count` broken inputs, shared evenly by all targets."""
    report = Report()
    with suppress(KeyboardInterrupt):  # an interrupt ends early, with the counts so far
        for number in range(count):
            name = list(TARGETS)[number % len(TARGETS)]
            one(name, number // len(TARGETS), seed, report)
    return report


def limit_memory() -> None:
    """Keep the process from taking more than MEMORY on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    """Fuzz, print the counts and every failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    limit_memory()
    clock = time.perf_counter()
    report = fuzz(given.count, given.seed)
    print(*report.failures, report.table(), f"{time.perf_counter() - clock:.0f} s", sep="\n")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())

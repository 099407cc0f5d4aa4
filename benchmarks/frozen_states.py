"""Passes of fit over pairs with the layers below the first merged one run once per batch, and without that.

python benchmarks/frozen_states.py [--size 135M --upper 4 --pairs 32 --tokens 64 --repeats 5] [--memory 0]

A pass is what each step of L-BFGS takes: loss and gradient on the fitting pairs, then the held-out pairs. Two
kinds of members: a MoE with experts in its upper layers, and a base with two models trained in these. Both
ways in turn in one process on one thread; CPU time, which other work beside it moves least. With --memory 0
all states go into the file. That the numbers are equal is checked.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fit import SIZES, make_dense, make_pairs, objective_of, write_tokenizer

from moemerge.fitting.pair_objective import PairObjective
from moemerge.fitting.problem import Measured
from moemerge.merging.merged_model import MergedModel, MergeGradient
from moemerge.merging.sources.base import MergeSource
from moemerge.merging.sources.models import ModelList
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.state_store import StateStore
from moemerge.stages.upcycle import upcycle

WAYS = ("anew", "once")
Pass = Callable[[torch.Tensor], tuple[MergeGradient, Measured]]


def make_models(folder: Path, size: str, upper: int) -> list[str]:
    """A base and two models that differ from it in head and upper layers."""
    model = make_dense(size)
    names = [str(folder / name) for name in ("base", "a", "b")]
    for number, name in enumerate(names):
        if number:
            trained = [*model.model.layers[-upper:].parameters(), *model.score.parameters()]
            with torch.no_grad():
                for tensor in trained:
                    tensor += 0.3 * tensor.std() * torch.randn(tensor.shape)
        model.save_pretrained(name)
        write_tokenizer(Path(name))
    return names


def objective(
    source: MergeSource, pairs: int, tokens: int, size: str, store: StateStore | None
) -> PairObjective:
    """As fit makes it of the source; held-out pairs are a third as many."""
    blocks, members = len(source.blocks()), source.num_members
    start_LN = torch.full((blocks, members), 1 / members, dtype=torch.float64)
    shared_L = torch.full((blocks,), 0.5, dtype=torch.float64)
    merged = MergedModel(source, start_LN, shared_L)
    made = objective_of(merged, make_pairs(pairs, tokens, SIZES[size]["vocab_size"]), 8)
    if store is not None:
        merged.run_lower_layers_once(made.pairs[0], store)
    object.__setattr__(made, "held_out", made.train[: len(made.train) // 3])
    return made


def passes(made: PairObjective) -> Pass:
    """What an accepted step takes at given logits."""
    shared_L = made.merged.shared_L.clone()

    def run(logits_LN: torch.Tensor) -> tuple[MergeGradient, Measured]:
        alpha_LN = logits_LN.softmax(1)
        gradient = made.gradient(alpha_LN, shared_L, range(made.num_train))
        return gradient, made.measure(alpha_LN, shared_L, "held_out")

    return run


def measure(what: str, source: MergeSource, a: argparse.Namespace, folder: Path) -> None:
    """CPU seconds per pass, in turn, and their medians' ratio; the first pass of each way apart."""
    with StateStore(folder, a.memory * 1e9) as store:
        stores = {"anew": None, "once": store}
        ways = {way: passes(objective(source, a.pairs, a.tokens, a.size, stores[way])) for way in WAYS}
        generator = torch.Generator().manual_seed(0)
        rows: list[dict[str, float]] = []
        for _ in range(a.repeats + 1):
            shape = (len(source.blocks()), source.num_members)
            logits_LN = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
            row, found = {}, {}
            for way, run in ways.items():
                begin = time.process_time()
                found[way] = run(logits_LN)
                row[way] = time.process_time() - begin
            (anew, held), (once, same) = found["anew"], found["once"]
            assert anew.loss == once.loss and torch.equal(anew.alpha_LN, once.alpha_LN)
            assert torch.equal(held.margins_P, same.margins_P)
            rows.append(row)
    first, *rows = rows
    middle = {way: statistics.median(row[way] for row in rows) for way in WAYS}
    layers, ratio = SIZES[a.size]["num_hidden_layers"], middle["anew"] / middle["once"]
    print(
        f"| a pass of fit, {what}, upper {a.upper} of {layers} layers merged, {a.size} | {a.pairs} pairs of "
        f"2 x {a.tokens} tokens, a third as many held out, memory {a.memory} GB, float32, 1 thread, "
        f"CPU time, {a.repeats} repeats | anew {middle['anew']:.2f} s, once {middle['once']:.2f} s "
        f"({ratio:.2f}x faster; first pass {first['anew']:.2f} and {first['once']:.2f} s) |",
        flush=True,
    )


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="135M", choices=SIZES)
    parser.add_argument("--upper", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=float, default=1.0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, *models = make_models(folder, a.size, a.upper)
        moe = upcycle(model=base, output=folder / "moe", layers=f"last:{a.upper}", expert_noise=0.5)
        measure("MoE", MoeCheckpoint(moe), a, folder)
        measure("base and two models", ModelList(models, base), a, folder)


if __name__ == "__main__":
    main()

"""One optimiser step of fit against the way XFT takes it; evaluations to convergence of the optimisers.

python benchmarks/fit.py [--size 17M --repeats 5] [--memory] [--optimisers]

XFT's way: every routed and shared expert resident in float32, the merge inside every forward pass, autograd
through it. Ours: one merge per step, gradients reduced to scalars in hooks; experts resident, or mapped
from their mmapped checkpoint. Both compute the same gradient, which is checked. Times are taken in turn in
one process; --memory runs each way in a process of its own and prints its peak of anonymous memory above what
the dense model took. --optimisers counts passes over 256 pairs until 90 and 99 % of the best loss drop.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, LlamaForSequenceClassification

from moemerge.data.pairs import Pair
from moemerge.data.tokenise import Encoded, EncodedPair
from moemerge.fitting.initial import initial_coefficients
from moemerge.fitting.objectives.base import mixture
from moemerge.fitting.pair_objective import PairObjective
from moemerge.fitting.problem import FitProblem
from moemerge.fitting.targets import Targets
from moemerge.fitting.trajectory import Trajectory
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.scoring import collate
from moemerge.options.fit import FitSettings
from moemerge.stages.upcycle import upcycle

SIZES: dict[str, dict[str, int]] = {
    "toy": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 256},
    "17M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 8192},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
}
HEADS = {"toy": (4, 4), "17M": (6, 6), "135M": (9, 3)}
# Micro-batches, pairs in each, tokens per text.
STEPS = ((1, 1, 16), (4, 1, 16), (16, 1, 16), (4, 4, 32), (4, 4, 128))
WAYS = ("xft", "resident", "mapped")


def make_dense(size: str, seed: int = 0) -> LlamaForSequenceClassification:
    """A random Llama reward model in float32."""
    torch.manual_seed(seed)
    heads, groups = HEADS[size]
    config = AutoConfig.for_model(
        "llama",
        **SIZES[size],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_labels=1,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config).float()


def make_moe(folder: Path, size: str, seed: int = 0) -> Path:
    """A MoE of 7 routed experts, 5 per token, with noise on the copies."""
    model = make_dense(size, seed)
    with torch.no_grad():
        model.score.weight.mul_(100)
    model.save_pretrained(folder / "dense")
    write_tokenizer(folder / "dense")
    return upcycle(model=str(folder / "dense"), output=folder / "moe", expert_noise=0.5, seed=seed)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of one word; token ids are drawn here, not made of text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "w": 1}, unk_token="w"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>").save_pretrained(folder)


def make_pairs(count: int, tokens: int, vocabulary: int, seed: int = 0) -> list[EncodedPair]:
    """Pairs of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (count, 2, tokens), generator=generator).tolist()
    return [
        EncodedPair(Encoded(chosen, 0), Encoded(rejected, 0), Pair(str(n), "c", "r", row=n))
        for n, (chosen, rejected) in enumerate(ids)
    ]


class Xft:
    """All copies in memory; a step merges in each forward pass and lets autograd go through the merge.

    One matrix product per tensor, of its flattened copies and the weights, as in XFT's published code
    (ise-uiuc/xft, LlamaWeightedMLP).
    """

    def __init__(self, source: MoeCheckpoint, merged: MergedModel) -> None:
        self.source, self.model, self.rows = source, merged.model, merged.rows
        self.copies = {
            t.dense: torch.stack([m.float().flatten() for m in source.matrices(t)]) for t in source.tensors
        }
        self.shapes = {t.dense: t.shape for t in source.tensors}

    def step(self, logits_LN: Tensor, shared_L: Tensor, pairs: list[EncodedPair], size: int) -> Tensor:
        """Gradient of the mean loss with respect to the logits."""
        logits_LN = logits_LN.clone().requires_grad_()
        for begin in range(0, len(pairs), size):
            part = pairs[begin : begin + size]
            alpha_LN = logits_LN.softmax(1)
            weights = {}
            for name, copies in self.copies.items():
                row = self.rows[name]
                w_M = torch.cat([shared_L[row : row + 1], (1 - shared_L[row]) * alpha_LN[row]]).float()
                weights[name] = torch.mm(copies.t(), w_M[:, None]).view(self.shapes[name])
            texts = [p.chosen for p in part] + [p.rejected for p in part]
            inputs = collate(texts, 0, False, torch.device("cpu"))
            scores = functional_call(self.model, weights, (), inputs).logits[:, 0].double()
            (-logsigmoid(scores[: len(part)] - scores[len(part) :]).sum() / len(pairs)).backward()
        assert logits_LN.grad is not None
        return logits_LN.grad


def our_step(merged: MergedModel, objective: PairObjective, logits_LN: Tensor, shared_L: Tensor) -> Tensor:
    """The same by moemerge; merging is part of the step."""
    logits_LN = logits_LN.clone().requires_grad_()
    alpha_LN = logits_LN.softmax(1)
    at = objective.gradient(alpha_LN.detach(), shared_L, range(objective.num_train))
    return torch.autograd.grad((alpha_LN * at.alpha_LN).sum(), logits_LN)[0]


def objective_of(merged: MergedModel, pairs: list[EncodedPair], size: int) -> PairObjective:
    """Bradley-Terry on all pairs, `size` of them per forward pass."""
    tokenizer, numbers = merged.source.tokenizer(), list(range(len(pairs)))
    term = mixture({"bradley_terry": 1.0}, Targets(merged, tokenizer, pairs, FitSettings()))
    return PairObjective(merged, tokenizer, pairs, numbers, numbers, term, size)


def logits(layers: int) -> Iterator[Tensor]:
    """Ever new logits, so that every step has to merge."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield 0.1 * torch.randn(layers, 7, generator=generator, dtype=torch.float64)


def steps(moe: Path, way: str, pairs: list[EncodedPair], size: int) -> Callable[[Tensor], Tensor]:
    """A function that takes one step of `way` at given logits."""
    source = MoeCheckpoint(moe)
    count = len(source.blocks())
    alpha_LN = torch.full((count, 7), 1 / 7, dtype=torch.float64)
    shared_L = torch.full((count,), 0.5, dtype=torch.float64)
    merged = MergedModel(source, alpha_LN, shared_L, keep=way == "resident")
    if way == "xft":
        xft = Xft(source, merged)
        for module in merged.model.requires_grad_(False).modules():
            vars(module).pop("forward", None)  # ours
        return lambda at: xft.step(at, shared_L, pairs, size)
    objective = objective_of(merged, pairs, size)
    return lambda at: our_step(merged, objective, at, shared_L)


def measure_times(moe: Path, size: str, repeats: int) -> None:
    """Seconds per step, in turn; ratios per repeat."""
    layers, vocabulary = SIZES[size]["num_hidden_layers"], SIZES[size]["vocab_size"]
    for micro, per, tokens in STEPS:
        pairs = make_pairs(micro * per, tokens, vocabulary)
        ways = {way: steps(moe, way, pairs, per) for way in WAYS}
        draws = logits(layers)
        rows = []
        for _ in range(repeats + 1):
            at, row, gradients = next(draws), {}, {}
            for way, step in ways.items():
                begin = time.perf_counter()
                gradients[way] = step(at)
                row[way] = time.perf_counter() - begin
            for way in WAYS[1:]:
                assert float((gradients[way] - gradients["xft"]).norm() / gradients["xft"].norm()) < 0.01
            rows.append(row)
        rows = rows[1:]
        middle = {way: statistics.median(row[way] for row in rows) for way in WAYS}
        ratio = {way: statistics.median(row["xft"] / row[way] for row in rows) for way in WAYS[1:]}
        print(
            f"| one step of fit against XFT's, {size} "
            f"| {micro} micro-batches of {2 * per} x {tokens} tokens, "
            f"float32, 1 thread, {repeats} repeats | XFT {middle['xft']:.2f} s, resident "
            f"{middle['resident']:.2f} s ({ratio['resident']:.2f}x faster), mapped "
            f"{middle['mapped']:.2f} s ({ratio['mapped']:.2f}x) |",
            flush=True,
        )


def anonymous() -> int:
    """Anonymous resident memory of this process, bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_of(moe: Path, way: str, size: str, micro: int, queue: Any) -> None:
    """Peak of anonymous memory above the dense model's, over two steps."""
    torch.set_num_threads(1)
    source = MoeCheckpoint(moe)
    count = len(source.blocks())
    uniform_LN = torch.full((count, 7), 1 / 7, dtype=torch.float64)
    dense = MergedModel(source, uniform_LN, torch.full((count,), 0.5, dtype=torch.float64), keep=False)
    before = anonymous()
    del dense
    highest, over = [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            highest[0] = max(highest[0], anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step = steps(moe, way, make_pairs(micro, 16, SIZES[size]["vocab_size"]), 1)
    draws = logits(SIZES[size]["num_hidden_layers"])
    for _ in range(2):
        step(next(draws))
    over.set()
    watcher.join()
    queue.put(highest[0] - before)


def measure_memory(moe: Path, size: str) -> None:
    """Each way in a process of its own."""
    context = multiprocessing.get_context("spawn")
    for micro in (1, 4, 16):
        peaks = {}
        for way in WAYS:
            queue = context.Queue()
            process = context.Process(target=peak_of, args=(moe, way, size, micro, queue))
            process.start()
            peaks[way] = queue.get() / 2**20
            process.join()
        ratio = {way: peaks["xft"] / peaks[way] for way in WAYS[1:]}
        print(
            f"| peak memory of a step above the dense model, {size} "
            f"| {micro} micro-batches of 2 x 16 tokens | "
            f"XFT {peaks['xft']:.0f} MiB, resident {peaks['resident']:.0f} ({ratio['resident']:.1f}x less), "
            f"mapped {peaks['mapped']:.0f} ({ratio['mapped']:.1f}x less) |",
            flush=True,
        )


def measure_optimisers(folder: Path, seeds: int) -> None:
    """Passes over the pairs until 90 and 99 % of the largest loss drop that any optimiser reaches."""
    ways: dict[str, dict[str, Any]] = {
        "lbfgs": {"optimizer": "lbfgs", "max_epochs": 100},
        "adam 0.1": {"optimizer": "adam", "learning_rate": 0.1, "max_epochs": 100},
        "adam 0.3": {"optimizer": "adam", "learning_rate": 0.3, "max_epochs": 100},
        "cma": {"optimizer": "cma", "max_epochs": 40},
    }
    reached: dict[str, list[str]] = {way: [] for way in ways}
    for seed in range(seeds):
        moe = make_moe(folder / str(seed), "toy", seed)
        source = MoeCheckpoint(moe)
        blocks, count = source.blocks(), len(source.blocks())
        generator = torch.Generator().manual_seed(seed)
        planted_LN = (2 * torch.randn(count, 7, generator=generator, dtype=torch.float64)).softmax(1)
        half_L = torch.full((count,), 0.5, dtype=torch.float64)
        merged = MergedModel(source, planted_LN, half_L)
        pairs = labelled_pairs(merged, make_pairs(256, 12, 256, seed), half_L)
        objective = objective_of(merged, pairs, 128)
        curves = {}
        for way, options in ways.items():
            settings = FitSettings(**options, batch_size=256, evals_per_epoch=1, patience=10_000)

            def ready(made: PairObjective = objective) -> PairObjective:
                return made

            problem = FitProblem(blocks, 7, True, settings, seed, objective=ready)
            trajectory = Trajectory(problem, objective, initial_coefficients(problem)).run()
            # Training and held-out pairs are the same here.
            curves[way] = [(point["passes"], point["held_out_loss"]) for point in trajectory.history]
        first = curves["lbfgs"][0][1]
        best = min(loss for curve in curves.values() for _, loss in curve)
        for way, curve in curves.items():
            goals = [first - share * (first - best) for share in (0.9, 0.99)]
            hits = [next((f"{n:.0f}" for n, loss in curve if loss <= goal), "-") for goal in goals]
            reached[way].append("/".join(hits))
    for way, hits in reached.items():
        print(f"| {way}: passes to 90/99 % of the loss drop | 28 parameters, 256 pairs | {', '.join(hits)} |")


def labelled_pairs(merged: MergedModel, pairs: list[EncodedPair], shared_L: Tensor) -> list[EncodedPair]:
    """The pairs in the order that the model as merged gives them."""
    objective = objective_of(merged, pairs, 64)
    margins_P = objective.measure(merged.alpha_LN, shared_L, "train").margins_P.tolist()
    swapped = [EncodedPair(p.rejected, p.chosen, p.pair) for p in pairs]
    return [p if m > 0 else s for p, s, m in zip(pairs, swapped, margins_P, strict=True)]


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="17M", choices=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--optimisers", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if a.optimisers:
            measure_optimisers(Path(folder), a.seeds)
            return
        moe = make_moe(Path(folder), a.size)
        (measure_memory(moe, a.size) if a.memory else measure_times(moe, a.size, a.repeats))


if __name__ == "__main__":
    main()

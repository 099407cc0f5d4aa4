"""SmolLM2-135M on helpful and harmless pairs, upcycled or trained apart, and merged, over seeds.

python studies/helpful_harmless.py MODELS DATA --seeds 1 2 3 --output runs/hh [--label_noise 0.3 --short]

A form for a CPU: the last two of 30 layers train, the others are computed once per text (frozen_layers.py);
texts of at most 700 characters, 256 tokens. MODELS: folder written by fetch_models.py. DATA: folder with
hh_rlhf, tulu_human_eval, arena_bench_v1 and summ_human_bon (rows as moemerge reads them). The seed draws
pairs and holds out prompts. Training ends after its epoch, and its last weights are kept. What exists under
the output folder is not made again. One thread; half an hour per seed, and 25 minutes once for the frozen
layers.

    base              trained on 150 helpful and 150 harmless pairs
    control           base, trained on 850 helpful pairs
    moe               mixture made of base, trained as the control is
    moe: METHOD       its merge
    tuned             control, trained on the pairs that the merge's coefficients are fitted on
    A, B, joint       base, trained on 400 helpful pairs, on 400 harmless ones, on both
    A+B: METHOD       average of A and B, equal or by coefficients fitted on 60 + 60 other pairs of both kinds
    specialists       mean of A's and B's scores

label_noise flips so many of the base's and the training labels, never those of fitting and held-out pairs;
--short leaves out A, B and joint, harmless test pairs and best of n.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from common import Row, flipped, once, read, write_sets
from frozen_layers import LowerLayers, install, upper_layers
from real_data import Dealt, Files, Options, halves, longest, mixed, shuffled

from moemerge.stages.compare import compare
from moemerge.stages.evaluate import evaluate
from moemerge.stages.fit import fit, fit_models
from moemerge.stages.merge import merge, merge_models
from moemerge.stages.route import route
from moemerge.stages.train import train
from moemerge.stages.upcycle import upcycle

UPPER = 2
MIXTURE: Options = {"num_routed_experts": 4, "num_experts_per_tok": 2, "layers": f"last:{UPPER}"}
LEARNED: Options = {"max_epochs": 4, "sensitivity": False}
REST: Options = {"sensitivity": False}
MERGES: dict[str, Options] = {"uniform": REST, "least_squares": REST, "learned": LEARNED}


def deal(data: Path, draw: random.Random, label_noise: float) -> Dealt:
    """What seed and data give; no first turn stands on two sides."""
    train, test = (read(data / f"hh_rlhf/{name}.jsonl.gz") for name in ("train", "test"))
    train += read(data / "hh_rlhf/val.jsonl.gz")
    turns = sorted({first_turn(row) for row in train})
    held = set(draw.sample(turns, len(turns) // 7))
    (helpful, harmless), (held_a, held_b) = (
        halves((row for row in train if (first_turn(row) in held) is side), draw) for side in (False, True)
    )
    pairs = {
        "base": mixed(helpful[:150], harmless[:150]),
        "train": helpful[150:1000],
        "a": helpful[150:550],
        "b": harmless[150:550],
    }
    pairs = {name: flipped(rows, label_noise, draw) for name, rows in pairs.items()}
    pairs |= {
        "joint": mixed(pairs["a"], pairs["b"]),
        "held": held_a[:100],
        "joint-held": mixed(held_a[:60], held_b[:60]),
        "fit": held_a[100:200],
        "joint-fit": mixed(held_a[100:160], held_b[60:120]),
    }
    return Dealt(pairs, *tests(data, test))


def deal_short(data: Path, draw: random.Random, label_noise: float) -> Dealt:
    """The same for upcycling alone: helpful pairs, and the tests that are about them."""
    drawn = deal(data, draw, label_noise)
    pairs = {name: drawn.pairs[name] for name in ("base", "train", "held", "fit")}
    return Dealt(pairs, {name: drawn.tests[name] for name in ("helpful", "tulu")}, {})


def tests(data: Path, test: list[Row]) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Pairs and candidates that every seed has."""
    helpful, harmless = halves(test, random.Random(0))
    pairs = {"helpful": helpful[:190], "harmless": harmless[:190]}
    pairs["tulu"] = tulu_pairs(data)
    topical = read(data / "summ_human_bon/topical_chat_candidates.jsonl.gz")
    arena = [shorter(row) for row in read(data / "arena_bench_v1/candidates.jsonl.gz")]
    candidates = {
        "topical_chat": sorted(topical, key=lambda row: len(row["prompt"]))[:24],
        "arena": [row for row in arena if len(row["candidates"]) >= 4],
    }
    return pairs, candidates


def tulu_pairs(data: Path) -> list[Row]:
    """150 of tulu_human_eval's shorter pairs, the same ones for every seed."""
    short = [row for row in read(data / "tulu_human_eval/pairs.jsonl.gz") if longest(row) < 700]
    return shuffled(short, random.Random(0))[:150]


def first_turn(row: Row) -> str:
    """What the person says first."""
    return str(row["prompt"].split("\n\nAssistant:")[0])


def shorter(row: Row, characters: int = 900) -> Row:
    """The row with its shorter candidates."""
    room = characters - len(row["prompt"])
    return {**row, "candidates": [some for some in row["candidates"] if len(some["text"]) < room]}


def mixture(home: Path, base: str, pairs: Files, training: Options) -> Iterator[tuple[str, str]]:
    """The mixture trained as the control is, and its merges."""
    seed, text = {"seed": training["seed"]}, text_options(training)
    start = once(home / "upcycle", upcycle, model=base, **seed, **MIXTURE)
    moe = once(home / "moe", train, model=start, pairs=pairs["train"], **training)
    yield "moe", moe
    routing = once(home / "routing", route, model=moe, pairs=pairs["train"], max_pairs=200, **text)
    data = {"pairs": pairs["fit"], "validation": pairs["held"], **text}
    for method, options in MERGES.items():
        coefficients = once(
            home / f"fit-{method}", fit, model=moe, method=method, routing=routing, **options, **data
        )
        yield f"moe: {method}", once(home / f"merge-{method}", merge, model=moe, coefficients=coefficients)


def specialists(home: Path, base: str, pairs: Files, training: Options) -> Iterator[tuple[str, str]]:
    """A, B and the model trained on both kinds, and the averages of A and B."""
    dealt = {"A": "a", "B": "b", "joint": "joint"}
    trained = {
        name: once(home / part, train, model=base, pairs=pairs[part], **training)
        for name, part in dealt.items()
    }
    yield from trained.items()
    both = [trained["A"], trained["B"]]
    yield "A+B: uniform", once(home / "both-uniform", merge_models, models=both)
    data = {"pairs": pairs["joint-fit"], "validation": pairs["joint-held"], **text_options(training)}
    coefficients = once(home / "both-fit", fit_models, models=both, **LEARNED, **data)
    yield "A+B: learned", once(home / "both-learned", merge_models, models=both, coefficients=coefficients)


def text_options(training: Options) -> Options:
    """Those of `training` that tell how texts are read, and the seed."""
    return {name: training[name] for name in ("max_length", "bad_rows", "seed")}


def evaluated(home: Path, arguments: argparse.Namespace, dealt: Dealt, start: Path, seed: int) -> str:
    """Make every model of this seed and evaluate them; the evaluation's folder."""
    sets = {"pairs": dealt.pairs, "tests": dealt.tests, "candidates": dealt.candidates}
    files = write_sets(home, sets)
    training: Options = {"batch_size": 16, "group_by_length": True, "learning_rate": arguments.learning_rate}
    training |= {"max_length": arguments.max_length, "bad_rows": "skip", "seed": seed}
    pairs = files["pairs"]
    base = once(home / "base", train, model=str(start), pairs=pairs["base"], **training)
    control = once(home / "control", train, model=base, pairs=pairs["train"], **training)
    models = {"base": base, "control": control, **dict(mixture(home, base, pairs, training))}
    models["tuned"] = once(home / "tuned", train, model=control, pairs=pairs["fit"], **training)
    measured: Options = {"pairs": files["tests"], "baseline": "control"}
    if not arguments.short:
        models |= dict(specialists(home, base, pairs, training))
        measured |= {"ensembles": {"specialists": ["A", "B"]}, "ensemble_by": ["mean"]}
        measured["candidates"] = files["candidates"]
    return once(home / "evaluation", evaluate, models=models, **text_options(training), **measured)


def options(description: str, output: Path) -> argparse.ArgumentParser:
    """What studies of upper layers are told."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--label_noise", type=float, default=0.0)
    parser.add_argument("--confidence", type=float, default=0.95, help="coverage of the intervals")
    return parser


def run(arguments: argparse.Namespace, deal: Callable[[Path, random.Random, float], Dealt]) -> None:
    """Run every seed and print a table; `arguments` has also max_length and short."""
    model, start = arguments.models / "smollm2", arguments.output / "upper"
    if not start.exists():
        upper_layers(model, UPPER, start)
    lower, states = LowerLayers(model, UPPER), arguments.output / "states"
    if states.exists():
        lower.load(states)
    with install(lower):
        runs = []
        for seed in arguments.seeds:
            dealt = deal(arguments.data, random.Random(seed), arguments.label_noise)
            runs.append(evaluated(arguments.output / f"seed-{seed}", arguments, dealt, start, seed))
    if not states.exists():
        lower.save(states)
    comparison = arguments.output / "comparison"
    compare(output=comparison, runs=runs, baseline="control", confidence=arguments.confidence, overwrite=True)
    print((comparison / "compare.md").read_text(encoding="utf-8"))


def main() -> None:
    """Read the options and run."""
    parser = options(__doc__, Path("runs/hh"))
    parser.add_argument("--short", action="store_true", help="upcycling alone")
    arguments = parser.parse_args(namespace=argparse.Namespace(max_length=256))
    run(arguments, deal_short if arguments.short else deal)


if __name__ == "__main__":
    main()

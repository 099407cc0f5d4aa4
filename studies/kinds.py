"""Members that are good at different kinds of pairs, merged on one scale, against rivals without their data.

python studies/kinds.py MODELS DATA --seeds 1 2 3 --output runs/kinds [--settings apart unlike]

MODELS: folder written by fetch_models.py; DATA: folder with ukp_convarg, hh_rlhf and summ_human_bon. Every
model is MiniLM whose last two of six layers train, the others are computed once per text (frozen_layers.py).
Members are trained apart, a kind each (kinds_data.py); the user has a few labelled pairs of the target's
kinds. Measured: accuracy on each of these kinds and their mean. What exists under the output folder is not
made again, nor what is on record in rows/kinds.jsonl; a setting's models are removed once it is measured. One
thread.

    KIND                        a member; argued-flipped: 30 % of its labels swapped
    best member (tuned)         the most accurate on the own pairs (once tuned: on the half not tuned on)
    uniform, simplex            average; average with weights fitted to the own pairs, as `fit` without base
    sum, fitted                 changes added, 2/M each, heads on one scale; fitted to the own pairs
    ... tuned                   trained on the own pairs for an epoch
    ensemble-mean               mean of the members' scores on one scale: M times the cost
    joint                       one model trained on all members' pairs, which the user does not have
    router                      each pair judged by the member of its kind: needs kinds, and all models
    best member tuned, oracle   the best of the tuned members, chosen by the test pairs
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from common import Measures, accuracy, ends, flipped, interval, once, options_of, recorded, write_sets
from frozen_layers import LowerLayers, install, upper_layers
from kinds_data import KINDS, MAX_LENGTH, candidate_sets, deal, sources
from safetensors.numpy import load_file

from moemerge.reports.plotting import dots
from moemerge.stages.calibrate import calibrate
from moemerge.stages.evaluate import evaluate
from moemerge.stages.fit import fit_models
from moemerge.stages.merge import merge_models
from moemerge.stages.train import train

ROWS = Path(__file__).parent / "rows" / "kinds.jsonl"
UPPER = 2
SIZES = {"train": 400, "own": 500, "test": 200}
FLIPPED = "argued-flipped"
READ: dict[str, Any] = {"max_length": MAX_LENGTH, "bad_rows": "skip"}
TRAINING: dict[str, Any] = {
    "batch_size": 16, "group_by_length": True, "patience": None, "learning_rate": 3e-4, **READ,
}  # fmt: skip
SHOWN = {
    "best member": "best model, as it is",
    "uniform": "average",
    "sum": "sum of changes",
    "uniform tuned": "average, tuned",
    "sum tuned": "sum, tuned",
    "fitted tuned": "fitted sum, tuned",
    "ensemble-mean": "mean score (3 x cost)",
    "joint": "trained on all models' data",
}
HEADS_APART = 1000
GAP = "gap area"
EPOCHS, TUNING_RATE = 3, 1e-4
RIVALS = ("best member", "best member tuned", "uniform", "uniform tuned", "simplex", "simplex tuned")
OURS = ("uniform", "uniform tuned", "sum", "sum tuned", "fitted", "fitted tuned", "ensemble-mean", "joint")


class Setting(NamedTuple):
    """Kinds of the target, the members, and how many own pairs of each kind the user has.

    own_heads: each member's fresh head is drawn by a seed of its own, as where people train apart; else all
    begin with the same head. best_of_n: whether best of n is measured on the summaries' texts too. simplex:
    whether weights that sum to one are fitted too.
    """

    target: tuple[str, ...]
    members: tuple[str, ...]
    own: int = 50
    own_heads: bool = False
    best_of_n: bool = False
    simplex: bool = True


APART = ("argued", "foreign", "shuffled")
JUDGED = ("summaries", "helpful", "foreign", "shuffled")
CONFLICT = ("helpful", "harmless", "argued")
SETTINGS = {
    "apart": Setting(APART, APART),
    "own-heads": Setting(APART, APART, own_heads=True),
    "unlike": Setting(APART, (FLIPPED, "foreign", "shuffled", "helpful", "harmless", "summaries")),
    "judged": Setting(JUDGED, JUDGED, best_of_n=True),
    "conflict": Setting(CONFLICT, CONFLICT),
    **{f"apart-{own}": Setting(APART, APART, own, simplex=own < 500) for own in (20, 150, 500)},
    **{f"members-{m}": Setting(tuple(KINDS)[:m], tuple(KINDS)[:m], simplex=m < 4) for m in (2, 4, 6, 8)},
}


class Seed:
    """A seed's pairs, and the models trained on them, which all settings share."""

    def __init__(
        self, home: Path, arguments: argparse.Namespace, base: str, seed: int, whole: str = "minilm"
    ) -> None:
        self.home, self.base, self.seed = home, base, seed
        draw = random.Random(seed)
        dealt = deal(sources(arguments.data, arguments.models / whole), SIZES, draw)
        dealt["train"][FLIPPED] = flipped(dealt["train"]["argued"], 0.3, draw)
        self.pairs = dealt
        tests = dealt["test"]["summaries"]
        self.candidates = candidate_sets(arguments.data, arguments.models / whole, tests)

    def members(self, setting: Setting) -> dict[str, str]:
        """The setting's members by the name of their kind."""
        numbers = {name: number for number, name in enumerate((*KINDS, FLIPPED), 1)}
        return {
            name: self.trained(name, [name], HEADS_APART * numbers[name] if setting.own_heads else 0)
            for name in setting.members
        }

    def trained(self, name: str, kinds: Sequence[str], more: int = 0) -> str:
        """The base trained on the members' pairs of `kinds`, its seed so much more than that of the data."""
        home = self.home / (f"{name}-own-head" if more else name)
        return self._train(
            home, self.base, self.training_pairs(name, kinds), epochs=EPOCHS, seed=self.seed + more
        )

    def training_pairs(self, name: str, kinds: Sequence[str]) -> str:
        """The file `name` of the members' pairs of `kinds`, in the seed's order."""
        rows = [row for kind in kinds for row in self.pairs["train"][kind]]
        random.Random(self.seed).shuffle(rows)
        return write_sets(self.home / "data", {"train": {name: rows}})["train"][name]

    def tuned(self, home: Path, model: str, pairs: str) -> str:
        """`model` trained for one epoch on own pairs."""
        return self._train(home, model, pairs, epochs=1, learning_rate=TUNING_RATE)

    def _train(self, home: Path, model: str, pairs: str, **options: Any) -> str:
        return once(home, train, model=model, pairs=pairs, **TRAINING | {"seed": self.seed} | options)

    def files(self, home: Path, setting: Setting) -> dict[str, dict[str, str]]:
        """The setting's files of pairs: `test` by kind; `own`: all, and two halves."""
        own = [row for kind in setting.target for row in self.pairs["own"][kind][: setting.own]]
        random.Random(self.seed).shuffle(own)
        test = {kind: self.pairs["test"][kind] for kind in setting.target}
        candidates = {"summaries": self.candidates} if setting.best_of_n else {}
        halves = {"half-0": own[0::2], "half-1": own[1::2]}
        return write_sets(home, {"test": test, "own": {"all": own, **halves}, "candidates": candidates})


def merges(
    home: Path, base: str, models: Sequence[str], own: str, seed: int, with_simplex: bool
) -> Iterator[tuple[str, str]]:
    """Every merge of the models."""
    named = {str(number): model for number, model in enumerate(models)}
    scales = once(home / "scales", calibrate, models=named, pairs=own, seed=seed, **READ)
    added = {"base": base, "coordinates": "sum", "calibration": scales}
    fitting = {"pairs": own, "granularity": "global", "sensitivity": False, "seed": seed, "max_epochs": 10}
    fitting |= READ
    yield "uniform", once(home / "uniform", merge_models, models=models)
    yield "sum", once(home / "sum", merge_models, models=models, **added)
    if with_simplex:
        simplex = once(home / "fit-simplex", fit_models, models=models, judge="preferences", **fitting)
        yield "simplex", once(home / "simplex", merge_models, models=models, coefficients=simplex)
    fitted = once(home / "fit-fitted", fit_models, models=models, l2=0.03, level=1.0, **added, **fitting)
    yield "fitted", once(home / "fitted", merge_models, models=models, base=base, coefficients=fitted)


def accuracies(folder: Path, kinds: Sequence[str], names: Sequence[str]) -> dict[str, Measures]:
    """Accuracy on each kind and their mean, of every model of an evaluation."""
    tensors = load_file(folder / "scores.safetensors")
    found = {}
    for name in names:
        by_kind = {kind: accuracy(tensors[f"pairs/{kind}/model/{name}"]) for kind in kinds}
        found[name] = {**by_kind, "mean": fmean(by_kind.values())}
    return found


def gap_areas(folder: Path, sets: Iterable[str]) -> dict[str, float]:
    """Over-optimisation by best of n, of every model of an evaluation: between promise and gold, over KL."""
    if not sets:
        return {}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (name,) = sets
    models = report["probes"]["best_of_n"]["sets"][name]["models"]
    return {model: curves["gap_area"] for model, curves in models.items()}


def measured(seed: Seed, setting: Setting, home: Path) -> dict[str, Measures]:
    """Make every model of this setting, and measure them."""
    files = seed.files(home, setting)
    members = seed.members(setting)
    joint = seed.trained("joint-" + "-".join(setting.members), setting.members)
    given = list(members.values()), files["own"]["all"], seed.seed, setting.simplex
    single = members | dict(merges(home, seed.base, *given))
    tuned = {
        f"{name} tuned": seed.tuned(home / f"{name}-tuned", model, files["own"]["all"])
        for name, model in single.items()
    }
    models = single | tuned | {"joint": joint}
    once(
        home / "evaluation", evaluate, models=models, ensembles={"ensemble": list(members)},
        pairs=files["test"], candidates=files["candidates"], ensemble_by=["mean"],
        calibration=str(home / "scales"), seed=seed.seed, resamples=100, **READ,
    )  # fmt: skip
    found = accuracies(home / "evaluation", setting.target, [*models, "ensemble-mean"])
    for name, gap in gap_areas(home / "evaluation", files["candidates"]).items():
        found[name][GAP] = gap
    plain, after = best_members(home, seed, members, files["own"])
    oracle = max((f"{name} tuned" for name in members), key=lambda name: found[name]["mean"])
    judges = {name.removesuffix("-flipped"): name for name in members}
    routed = {kind: found[judges[kind]][kind] for kind in setting.target}
    return found | {
        "best member": found[plain],
        "best member tuned": found[f"{after} tuned"],
        "best member tuned, oracle": found[oracle],
        "router": {**routed, "mean": fmean(routed.values())},
    }


def best_members(
    home: Path, seed: Seed, members: Mapping[str, str], own: Mapping[str, str]
) -> tuple[str, str]:
    """What a user with the own pairs alone would take: the best member, and the one best after tuning."""
    halves = {
        f"{name}-{half}": seed.tuned(home / f"{name}-half-{half}", model, own[f"half-{half}"])
        for name, model in members.items()
        for half in (0, 1)
    }
    pairs = {f"half-{half}": own[f"half-{half}"] for half in (0, 1)}
    folder, models = home / "own-evaluation", {**members, **halves}
    once(folder, evaluate, models=models, pairs=pairs, seed=seed.seed, resamples=100, **READ)
    scores = load_file(folder / "scores.safetensors")

    def right(model: str, half: int) -> float:
        return accuracy(scores[f"pairs/half-{half}/model/{model}"])

    plain = {name: right(name, 0) + right(name, 1) for name in members}
    after = {name: right(f"{name}-0", 1) + right(f"{name}-1", 0) for name in members}
    return max(plain, key=plain.__getitem__), max(after, key=after.__getitem__)


def table(name: str, seeds: Mapping[int, Mapping[str, Measures]], confidence: float) -> str:
    """Means over seeds, and paired differences of sum and fitted, tuned or not, to the rivals."""
    first = next(iter(seeds.values()))
    columns, rivals = list(first["joint"]), [rival for rival in RIVALS if rival in first]
    nowhere = {GAP: float("nan")}  # a router that is told each pair's kind ranks no candidates
    lines = [f"### {name}: seeds {', '.join(map(str, seeds))}", "", "| model | " + " | ".join(columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for model in first:
        means = [fmean((nowhere | of[model])[column] for of in seeds.values()) for column in columns]
        lines.append(f"| {model} | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    for column in [column for column in columns if column in ("mean", GAP)]:
        lines += ["", f"{column}, minus; t-intervals of {confidence:.1%} over seeds", ""]
        lines += ["| | " + " | ".join(rivals) + " |", "| --- |" + " ---: |" * len(rivals)]
        for ours in OURS:
            gains = [[of[ours][column] - of[rival][column] for of in seeds.values()] for rival in rivals]
            lines.append(f"| {ours} | " + " | ".join(interval(gain, confidence) for gain in gains) + " |")
    return "\n".join([*lines, ""])


def draw(seeds: Mapping[int, Mapping[str, Measures]], confidence: float, path: Path) -> None:
    """Each model's mean over kinds minus that of the best rival that is no merge, with t-intervals."""
    groups = {}
    for model, words in SHOWN.items():
        gains = [of[model]["mean"] - of["best member tuned"]["mean"] for of in seeds.values()]
        groups[words] = ends(gains, confidence)
    path.parent.mkdir(parents=True, exist_ok=True)
    label = "accuracy, minus that of the best model, tuned"
    dots({f"{len(seeds)} seeds": groups}, path, label)


def remove_models(home: Path) -> None:
    """Free the disk: of a measured setting stay its files of pairs and its evaluations."""
    for weights in list(home.rglob("model.safetensors")):
        shutil.rmtree(weights.parent)


def main() -> None:
    """Run every setting of every seed, and print a table per setting."""
    parser = options_of(__doc__.splitlines()[0], Path("runs/kinds"), SETTINGS, "models", "data")
    parser.add_argument("--picture", type=Path, help="folder to draw the differences into")
    arguments = parser.parse_args()
    start = arguments.output / "upper"
    if not start.exists():
        upper_layers(arguments.models / "minilm", UPPER, start)
    for name in arguments.settings:
        results = {seed: of_seed(name, seed, arguments, start) for seed in arguments.seeds}
        print(table(name, results, arguments.confidence), flush=True)
        if arguments.picture:
            draw(results, arguments.confidence, arguments.picture / f"kinds-{name}.png")


def of_seed(name: str, seed: int, arguments: argparse.Namespace, start: Path) -> dict[str, Measures]:
    """The measures of a setting and seed: those on record, or new ones."""

    def measure() -> dict[str, Measures]:
        home = arguments.output / f"seed-{seed}"
        with install(LowerLayers(arguments.models / "minilm", UPPER), pooled_only=True):
            found = measured(Seed(home, arguments, str(start), seed), SETTINGS[name], home / name)
        remove_models(home / name)
        return found

    return recorded(ROWS, name, seed, measure)


if __name__ == "__main__":
    main()

"""Does training on what an attack found help against new edits, and what does it cost?

python studies/patching.py MODELS DATA --seeds 1 2 3 --output runs/patching [--settings ukp]

A reward model is made of a setting's pairs as noisy_labels.py deals them, no label flipped, and trained as
"plain" is there; then `patch` does all the rest, on the same training pairs, and measures on test pairs. What
is on record in rows/patching.jsonl is not made again. One thread.

    before          the model
    patched         trained on for an epoch, of which a share are answers that the attack found
    control         trained on as long on the ordinary pairs
    random-edits    trained on as long with as many pairs whose edits are random
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from common import Measures, interval, options_of, print_tables, recorded
from noisy_labels import SETTINGS as DATA
from noisy_labels import Seed, opened_seed

from moemerge.run.patch import patch
from moemerge.run.patch_plan import SEEN, UNSEEN

ROWS = Path(__file__).parent / "rows" / "patching.jsonl"
MEASURES = ("accuracy", "overturned", "robust_accuracy")


@dataclass(frozen=True)
class Setting:
    """Whose pairs (noisy_labels.SETTINGS), the share of the patch, pairs that an attack takes."""

    data: str
    share: float
    max_pairs: int = 120


SETTINGS = {
    "ukp": Setting("ukp-0", 0.05),
    "ukp-20": Setting("ukp-0", 0.2),
    "hh": Setting("hh-0", 0.05),
    "hh-20": Setting("hh-0", 0.2),
}


def measured(seed: Seed, setting: Setting) -> dict[str, Measures]:
    """Each arm's accuracy and what attacks do to it, by the patch's kinds of edits and by others."""
    model, folder = seed.trained("model", seed.files["train"]), seed.home / "patch"
    patch(
        model, seed.files["train"], test=seed.files["test"], output=folder, share=setting.share,
        learning_rate=1e-4, batch_size=16, max_pairs=setting.max_pairs, steps=4, proposals=8, resamples=200,
        seed=seed.seed, threads=1, device="cpu", **seed.text,
    )  # fmt: skip
    found: dict[str, Measures] = {}
    for edits in (SEEN, UNSEEN):
        compared = json.loads((folder / edits / "compared/robustness.json").read_text(encoding="utf-8"))
        for arm, numbers in compared["models"].items():
            found.setdefault(arm, {}).update({f"{edits} {m}": numbers[m]["value"] for m in MEASURES})
    evaluation = json.loads((folder / "evaluation/report.json").read_text(encoding="utf-8"))
    for arm, numbers in evaluation["probes"]["accuracy"]["sets"]["test"]["all"]["models"].items():
        found[arm]["test accuracy"] = numbers["accuracy"]
    return found


def of_seed(name: str, number: int, arguments: argparse.Namespace) -> dict[str, Measures]:
    """The measures of a setting and seed: those on record, or new ones."""

    def measure() -> dict[str, Measures]:
        setting = SETTINGS[name]
        data, home = DATA[setting.data], arguments.output / name / f"seed-{number}"
        dealt = data.deal(arguments.data, random.Random(number))
        with opened_seed(arguments, home, data, dealt, number) as seed:
            return measured(seed, setting)

    return recorded(ROWS, name, number, measure)


def table(name: str, seeds: Mapping[int, Mapping[str, Measures]], confidence: float) -> str:
    """Means over seeds, and paired differences of the patched model to the others."""
    first = next(iter(seeds.values()))
    columns = list(first["patched"])
    lines = [f"### {name}: seeds {', '.join(map(str, seeds))}", "", "| model | " + " | ".join(columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for arm in first:
        means = (fmean(of[arm][column] for of in seeds.values()) for column in columns)
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    for rival in (arm for arm in first if arm != "patched"):
        gains = ([of["patched"][c] - of[rival][c] for of in seeds.values()] for c in columns)
        cells = (interval(gain, confidence) for gain in gains)
        lines.append(f"| patched minus {rival} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run every setting of every seed, and print a table per setting."""
    options = options_of(__doc__.splitlines()[0], Path("runs/patching"), SETTINGS, "models", "data")
    print_tables(options, of_seed, table)


if __name__ == "__main__":
    main()

"""Run the recipes on real models and data, end to end, and print a row for each.

python studies/recipes.py MODELS DATA [RECIPE ...]

MODELS: folder written by fetch_models.py. DATA: folder with ukp_convarg/pairs.jsonl.gz, and with
hh_rlhf/train.jsonl.gz, val.jsonl.gz and test.jsonl.gz (rows of prompt, chosen, rejected, subset).
Runs go to runs/NAME; finished steps are not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

from moemerge.run.pipeline import run_recipe

CONFIGS = Path(__file__).parent.parent / "merge_configs"


def overrides(models: Path, data: Path) -> dict[str, list[str]]:
    """Local paths in place of the published names, per recipe."""
    hh = data / "hh_rlhf"
    splits = [f"data.train={hh}/train.jsonl.gz", f"data.validation={hh}/val.jsonl.gz"]
    splits += [f"data.tests={{test: {hh}/test.jsonl.gz}}", f"model={models}/smollm2"]
    return {
        "minilm_ukp": [f"model={models}/minilm", f"data.train={data}/ukp_convarg/pairs.jsonl.gz"],
        "smollm2_hh_cpu": splits,
        "smollm2_hh": splits,
    }


def row(name: str, settings: list[str]) -> str:
    """Run one recipe; a row of its accuracies with intervals."""
    start = time.perf_counter()
    done = run_recipe(CONFIGS / f"{name}.yml", settings, Path("runs") / name)
    seconds = time.perf_counter() - start
    trained = {step.name: step.seconds for step in done.steps}
    slowest = ", ".join(f"{n} {s:.0f} s" for n, s in sorted(trained.items(), key=lambda i: -i[1])[:4])
    fitted = json.loads((done.output / "fit-learned" / "report.json").read_text())
    title = f"### {name}: {seconds / 60:.1f} min ({slowest})"
    return "\n\n".join([title, done.overview, done.verdict, fitted["verdict"], ""])


def main() -> None:
    """Run the recipes named on the command line, or the two that need no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("recipes", nargs="*", default=["minilm_ukp", "smollm2_hh_cpu"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    known = overrides(arguments.models.resolve(), arguments.data.resolve())
    for name in arguments.recipes:
        print(row(name, known[name]), flush=True)


if __name__ == "__main__":
    main()

"""What the fuzzer breaks and reads: an open table. A new kind of input is a row of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fuzz_artifacts as artifacts
import fuzz_models as models
import fuzz_weights as weights
import pyarrow
from fuzz_models import DENSE, model_with
from fuzz_tools import AWKWARD, Dice, Target, mutated, rows, text
from hostile_files import CANDIDATES, PAIR, RECIPE, pairs
from pyarrow import parquet

from moemerge.artifacts.scorer_file import read_scorer
from moemerge.data.reading import read_candidates, read_pairs
from moemerge.models.routing import RoutingStatistics
from moemerge.options.base import TextFormat

FULL = (Path(__file__).parent.parent.parent / "merge_configs" / "quickstart.yml").read_text(encoding="utf-8")
LINES = "".join(json.dumps(pair) + "\n" for pair in pairs(4))
CHAT = {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
CHAT["rejected"] = [CHAT["chosen"][0], {"role": "assistant", "content": "c"}]
SCORER = {"kind": "implicit", "policy": "policy", "reference": "reference", "beta": 0.1, "per_token": True}
PLAIN = TextFormat(bad_rows="skip")
SHARDS = ("train-00000-of-00002", "train-00001-of-00002")
SAVED = {
    "dataset_info.json": {
        "features": {"prompt": {"dtype": "string"}},
        "splits": {"train": {"num_examples": 4}},
    },
    "state.json": {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"},
    "dataset_dict.json": {"splits": ["train"]},
}


def _pairs(name: str) -> Callable[[Path], object]:
    return lambda folder: read_pairs(str(folder / name), PLAIN)


def _parquet(folder: Path, draw: Dice) -> None:
    """Pairs in columns, of which one may hold something else, and broken bytes."""
    columns = {name: [pair[name] for pair in pairs(6)] for name in PAIR}
    if draw.random() < 0.3:
        columns[draw.choice(list(PAIR))] = draw.choice(
            [[1] * 6, [None] * 6, [[{"role": "a"}]] * 6, [b"\xff"] * 6]
        )
    parquet.write_table(pyarrow.table(columns), folder / "data.parquet")
    if draw.random() < 0.8:
        (folder / "data.parquet").write_bytes(mutated((folder / "data.parquet").read_bytes(), draw))


def _shards(folder: Path, draw: Dice) -> None:
    """A folder of shards, with names or bytes that are broken, and perhaps what save_to_disk leaves."""
    (folder / "data").mkdir()
    for name in SHARDS:
        if draw.random() < 0.4:
            name = mutated(name.encode(), draw).decode("utf-8", "replace").replace("/", "").replace("\0", "")
        data = mutated(LINES.encode(), draw) if draw.random() < 0.4 else LINES.encode()
        kind = draw.choice([".jsonl", ".jsonl", ".jsonl", ".JSONL", ".json", ".jsonl.gz"])
        (folder / "data" / f"{name[:80]}{kind}").write_bytes(data)
    for name in SAVED if draw.random() < 0.3 else ():
        if draw.random() < 0.5:
            (folder / "data" / name).write_bytes(mutated(json.dumps(SAVED[name]).encode(), draw))
            (folder / "data" / "data-00000-of-00001.arrow").write_bytes(draw.choice(AWKWARD))


TARGETS: dict[str, Target] = {
    "recipes": Target(text("recipe.yml", RECIPE, FULL), models.read_recipe),
    "pairs": Target(
        rows("data.jsonl", PAIR, {**PAIR, "margin": 1.0, "subset": "s"}, CHAT), _pairs("data.jsonl")
    ),
    "pairs_gz": Target(text("data.jsonl.gz", LINES), _pairs("data.jsonl.gz")),
    "json": Target(text("data.json", json.dumps(pairs(3))), _pairs("data.json")),
    "parquet": Target(_parquet, _pairs("data.parquet")),
    "shards": Target(_shards, _pairs("data")),
    "candidates": Target(
        rows("data.jsonl", CANDIDATES), lambda folder: read_candidates(str(folder / "data.jsonl"), PLAIN)
    ),
    "checkpoints": Target(weights.make_checkpoint, weights.read_checkpoint),
    "coefficients": Target(weights.make_coefficients, weights.read_coefficients),
    "calibrations": Target(weights.make_calibration, weights.read_calibration),
    "routing": Target(weights.make_routing, RoutingStatistics.load),
    "layouts": Target(weights.make_layout, weights.read_layout_file),
    "moe_settings": Target(weights.make_settings, weights.read_settings),
    "checks": Target(models.make_checked, models.read_recipe),
    "dense_configs": Target(model_with("config.json", *DENSE), models.read_dense),
    "moe_configs": Target(model_with("config.json", "moe"), models.read_moe),
    "native_configs": Target(model_with("config.json", "native"), models.read_moe),
    "reward_models": Target(model_with("config.json", *DENSE, "moe"), models.read_whole, turns=2),
    "policies": Target(model_with("config.json", "policy"), models.read_policy, turns=1),
    "generation": Target(model_with("generation_config.json", "policy"), models.read_policy, turns=1),
    "tokenizers": Target(models.make_tokenizer, models.read_tokenizer),
    "templates": Target(models.make_template, models.read_template),
    "scorers": Target(
        text("a.scorer.json", json.dumps(SCORER)), lambda folder: read_scorer(folder / "a.scorer.json")
    ),
    "heads": Target(weights.make_heads, weights.read_heads_file),
    "manifests": Target(artifacts.make_manifest, artifacts.read_manifests),
    "verified": Target(artifacts.make_manifest, artifacts.read_verified),
    "licences": Target(text("README.md", artifacts.CARD), artifacts.read_licence),
    "evaluations": Target(artifacts.make_evaluation, artifacts.read_evaluation),
    "votes": Target(artifacts.make_votes, artifacts.read_old_votes),
    "comparisons": Target(artifacts.make_comparison, artifacts.read_comparison),
    "runs": Target(artifacts.make_run, artifacts.read_run, turns=1),
}

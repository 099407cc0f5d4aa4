"""Targets of the fuzzer that stages write, or others in their name: manifests, reports, cards, runs."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from fuzz_library import library, recipe
from fuzz_models import all_of
from fuzz_tools import VALUES, Dice, changed, linked, spoil_json
from huggingface_hub import ModelCardData

from moemerge.artifacts.checksums import MANIFEST, fingerprint
from moemerge.artifacts.manifest import chain_of, own_digest, read_manifest, stated_licence
from moemerge.artifacts.staleness import other_versions, why_stale
from moemerge.artifacts.verify import verify
from moemerge.errors import ArtifactError
from moemerge.evaluation.model_card import make_card
from moemerge.options.compare import Compare
from moemerge.options.merge import Merge
from moemerge.options.publish import Publish
from moemerge.options.strength import Strength
from moemerge.run.cli import fault_table
from moemerge.run.headlines import headline
from moemerge.run.pipeline import finish
from moemerge.run.plan import plan
from moemerge.run.steps import StepReport
from moemerge.stages import OPTIONS
from moemerge.stages.compare import compared
from moemerge.stages.strength import VOTES, read_votes

MERGED, EVALUATION = "merge-uniform", "evaluate"
SHOWN = ("manifest.json", "*.plot.json", "report.json", "strength.json")  # on the page of a run
CARD = """---
license: other
license_name: own-terms
license_link: https://example.org/terms
base_model: org/base
tags:
- reward-model
model-index:
- name: x
  results: []
---

# A model

## Made from

| stage | from |
"""


def spoil_manifest(folder: Path, draw: Dice) -> None:
    """Break a manifest; half of them then state their own checksum again, as who means harm would do."""
    path = folder / MANIFEST
    if draw.random() < 0.4:
        spoil_json(path, draw, bytes_too=0.5)
        return
    manifest = json.loads(path.read_text())
    part = draw.choice([*manifest, "inputs", "results", "files", "chain", "options"])
    manifest[part] = changed(manifest.get(part), draw)
    if draw.random() < 0.3:
        manifest = changed(manifest, draw)
    if isinstance(manifest, dict):
        manifest["sha256"] = own_digest(manifest)
    path.unlink()
    path.write_text(json.dumps(manifest))


def make_manifest(folder: Path, draw: Dice) -> None:
    """A merged model with a broken manifest."""
    spoil_manifest(linked(library() / "run" / MERGED, folder / "out"), draw)


def read_manifests(folder: Path) -> None:
    """What stages, runs and cards take from the manifest of an input, of an earlier output, of a model."""
    out = folder / "out"
    run = library() / "run"
    options = Merge(model=str(run / "train"), coefficients=str(run / "fit-uniform"), output=out)
    all_of(
        lambda: chain_of([fingerprint(out)]),
        lambda: why_stale("merge", options),
        lambda: (other_versions(read_manifest(out)), headline(read_manifest(out))),
        lambda: make_card(Publish(model=str(out), output=folder / "card"), OPTIONS),
    )


def read_verified(folder: Path) -> None:
    """`moemerge verify --inputs`, and the table that it prints."""
    verification = verify(folder / "out", inputs=True)
    if verification.faults:
        fault_table(verification.faults)
        raise ArtifactError("faults", given="", expected="", fix="")


def read_licence(folder: Path) -> None:
    """The licence that a card states, and a card that states it again."""
    stated = stated_licence(folder)
    if not stated:
        raise ArtifactError("no licence", given="", expected="", fix="")
    again = yaml.safe_load(ModelCardData(**stated).to_yaml())  # type: ignore[arg-type]
    assert {key: str(again[key]) for key in stated} == stated


def make_evaluation(folder: Path, draw: Dice) -> None:
    """An evaluation with a broken report or manifest."""
    out = linked(library() / "run" / EVALUATION, folder / EVALUATION)
    if draw.random() < 0.3:
        spoil_manifest(out, draw)
    else:
        spoil_json(out / "report.json", draw, [*VALUES, *_names()], bytes_too=0.1)


def _names() -> list[Any]:
    """What a report may well hold, elsewhere."""
    return ["control", "dense", MERGED, "../evaluate/report.json", "accuracy.png", [0.1, 0.2], [], 0.25]


def read_evaluation(folder: Path) -> None:
    """The card of a model with this evaluation."""
    options = Publish(
        model=str(library() / "run" / MERGED), evaluation=str(folder / EVALUATION), output=folder / "card"
    )
    make_card(options, OPTIONS)


def make_votes(folder: Path, draw: Dice) -> None:
    """Votes of which the manifest or a row is broken."""
    out = linked(library() / "run" / "strength", folder / "out")
    if draw.random() < 0.3:
        spoil_manifest(out, draw)
        return
    file = out / VOTES
    rows = gzip.decompress(file.read_bytes()).decode().splitlines()
    place = draw.randrange(len(rows))
    rows[place] = json.dumps(changed(json.loads(rows[place]), draw))
    file.unlink()
    file.write_bytes(gzip.compress("\n".join(rows).encode(errors="replace"), mtime=0))


def read_old_votes(folder: Path) -> None:
    """What strength makes of votes that are to be used again."""
    pairs = str(library() / "run" / "data" / "train.jsonl.gz")
    votes = str(folder / "out")
    options = Strength(pairs=pairs, votes=votes, noise=0.2, treat="auto", output=folder / "treated")
    poll, _ = read_votes(options, votes)
    json.dumps(poll.numbers())


def make_comparison(folder: Path, draw: Dice) -> None:
    """Two runs with other seeds; recipe, report or manifest of one of them is broken."""
    for seed, name in enumerate("ab"):
        (folder / name).mkdir()
        out = linked(library() / "run" / EVALUATION, folder / name / EVALUATION)
        manifest = json.loads((out / MANIFEST).read_text())
        (out / MANIFEST).unlink()
        manifest["options"]["seed"] = seed
        (out / MANIFEST).write_text(json.dumps(manifest | {"sha256": own_digest(manifest)}))
        (folder / name / "recipe.json").write_bytes((library() / "run" / "recipe.json").read_bytes())
    broken = draw.choice(["recipe.json", "evaluate/report.json", "evaluate/manifest.json"])
    if broken.endswith(MANIFEST):
        spoil_manifest(folder / "a" / EVALUATION, draw)
    else:
        spoil_json(folder / "a" / broken, draw, [*VALUES, *_names()], bytes_too=0.1)


def read_comparison(folder: Path) -> None:
    """What compare makes of them, its plots aside."""
    compared(Compare(runs=[str(folder / "a"), str(folder / "b")], output=folder / "out"))


def make_run(folder: Path, draw: Dice) -> None:
    """A finished run in which one file that its page is made from is broken."""
    run = linked(library() / "run", folder / "run")
    for name in ("report.html", "report.md", "summary.md"):
        (run / name).unlink()
    files = sorted(file for name in SHOWN for file in run.glob(f"*/{name}"))
    broken = draw.choice(files)
    if broken.name == MANIFEST:
        spoil_manifest(broken.parent, draw)
    else:
        spoil_json(broken, draw, [*VALUES, *_names()], bytes_too=0.1)


def read_run(folder: Path) -> None:
    """What a run says of its steps in the end, and its page, made in a copy."""
    out = linked(folder / "run", folder.with_name(f"{folder.name}-out"))
    try:
        made = recipe(library(), out)
        steps = [StepReport(s.name, s.stage, None, 0.0, read_manifest(s.options.output)) for s in plan(made)]
        for step in steps:
            headline(step.manifest)
        finish(made, steps)
    finally:
        shutil.rmtree(out)

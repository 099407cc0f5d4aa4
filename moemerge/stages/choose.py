"""Stage choose: which of several candidate models is taken, by scores of pairs they were not made from.

Shapes: M models (candidates first, then models that are only shown), P pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from moemerge.artifacts.checksums import fingerprint
from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.manifest import expect_stage
from moemerge.artifacts.stage import Draft, stage
from moemerge.data.pairs import Pair, numbered, prompt_key
from moemerge.data.reading import read_pairs
from moemerge.errors import ArtifactError, DataError, unknown
from moemerge.fitting import choice as rule
from moemerge.fitting.choice import Judged
from moemerge.fitting.choice_report import (
    PICTURE,
    Shown,
    candidate_rows,
    draw,
    in_parts_sentence,
    sentence,
    tables,
)
from moemerge.options.choose import Choose
from moemerge.reports.figures import Figure
from moemerge.reports.html import Section, write_report
from moemerge.reports.statistics import Floats

log = logging.getLogger(__name__)
Scores = dict[str, dict[int, float]]  # by model: score differences by the pair's row


@stage("choose", Choose, rows=candidate_rows)
def choose(options: Choose, draft: Draft) -> None:
    """Write which candidate is taken: choice.json, report.html, report.md and accuracy.png.

    The simplest candidate is taken, of several the best, unless a costlier one is better beyond chance and no
    less accurate. Pairs that one of the models has no score of are left out for all. Raises ArtifactError for
    an evaluation that was not made on these pairs, OptionError for a candidate that none of them has,
    DataError if no pair is left.
    """
    models, margins_MP, pairs, parts = _read(options)
    ranks = np.array([options.ranks.get(name, max(options.ranks.values()) + 1) for name in models])
    prompts = np.array(numbered(map(prompt_key, pairs)))
    judged = Judged(models, ranks, margins_MP, np.array(parts), prompts)
    count = len(options.ranks)
    chosen = rule.choose(judged.first(count), options.level, options.seed)
    numbers = Shown(judged, count, chosen, [pair.subset for pair in pairs], options).numbers()
    write_json(draft.folder / "choice.json", numbers)
    draw(numbers, draft.folder)
    words = list(filter(None, [in_parts_sentence(numbers)]))
    figures = [Figure.load(draft.folder / PICTURE)]
    first, *rest = tables(numbers, options.confidence)
    section = Section("Choice", words, [first, *rest], figures, lead=sentence(numbers))
    write_report(draft.folder, "Which model to take", [section])
    log.debug("choose: %s", sentence(numbers))
    draft.results |= {"taken": numbers["taken"], "sentence": sentence(numbers), "pairs": len(pairs)}


def _read(options: Choose) -> tuple[list[str], Floats, list[Pair], list[int]]:
    """Names of all models, candidates first; margins; the pairs; the number of each pair's part."""
    columns: list[Floats] = []
    kept: list[Pair] = []
    parts: list[int] = []
    models: list[str] = []
    for number, (part, source) in enumerate(options.pairs.items()):
        pairs, _ = read_pairs(source, options)
        scores = _scores(options, part, Path(source))
        models = models or _ordered(options, scores)
        shared = [pair for pair in pairs if all(pair.row in scores.get(name, {}) for name in models)]
        columns += [np.array([scores[name][pair.row] for name in models]) for pair in shared]
        kept += shared
        parts += [number] * len(shared)
    if not kept:
        raise DataError(
            "no pair has a score of every model",
            given=f"{len(models)} models on {', '.join(options.pairs)}",
            expected="evaluations of every candidate on every part",
            fix="evaluate each candidate on the part that it was not made from",
        )
    return models, np.stack(columns, 1), kept, parts


def _ordered(options: Choose, scores: Mapping[str, Any]) -> list[str]:
    for name in options.ranks:
        if name not in scores:
            raise unknown("candidate", name, scores)
    return [*options.ranks, *(name for name in scores if name not in options.ranks)]


def _scores(options: Choose, part: str, source: Path) -> Scores:
    """Score differences of all models that an evaluation has on this part."""
    scores: Scores = {}
    digest = fingerprint(source)["sha256"]
    for folder in options.evaluations:
        manifest = expect_stage(folder, "evaluate")
        record = manifest["inputs"].get("pairs", {}).get(part)
        if record is None:
            continue
        if record["sha256"] != digest:
            raise _other_pairs(folder, part, source)
        tensors = load_file(Path(folder) / "scores.safetensors")
        rows = tensors[f"pairs/{part}/rows"][0::2].tolist()
        prefix = f"pairs/{part}/model/"
        for key in (key for key in tensors if key.startswith(prefix)):
            differences = tensors[key][0::2].astype(np.float64) - tensors[key][1::2]
            scores[key.removeprefix(prefix)] = dict(zip(rows, differences.tolist(), strict=True))
    return scores


def _other_pairs(folder: str, part: str, source: Path) -> ArtifactError:
    return ArtifactError(
        "an evaluation was made on other pairs",
        given=f"{folder}: its {part} is not {source}",
        expected="the very file that was evaluated",
        fix="give the file that evaluate read under this name, or evaluate again",
    )

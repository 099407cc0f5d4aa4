"""Stage robustness: attacks on several models, compared pair by pair."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moemerge.artifacts.json_file import read_object, write_json
from moemerge.artifacts.manifest import Manifest, expect_stage, written_by_stages
from moemerge.artifacts.stage import Draft, stage
from moemerge.data.pairs import Pair, numbered, prompt_key
from moemerge.data.rows import BadRow, Row, read_rows
from moemerge.errors import ArtifactError, DataError
from moemerge.evaluation.robustness import Attacked, rows_of, sentence, tables
from moemerge.options.decode import DecodeSettings
from moemerge.options.robustness import Robustness
from moemerge.reports import plotting
from moemerge.reports.figures import Figure
from moemerge.reports.html import Section, write_report

log = logging.getLogger(__name__)
FILE, PICTURE = "robustness.json", "robustness.png"
# What makes attacks comparable: how they search, and for how long.
SEARCH = ("search", "edits", "words", "steps", "proposals", "beam")
ALIKE = (*SEARCH, "max_pairs", "seed", "fields", "gold_function", "gold_model")


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    return rows_of(read_object(folder / FILE))


@stage("robustness", Robustness, rows=_rows)
def robustness(options: Robustness, draft: Draft) -> None:
    """Write whose right verdicts hold: robustness.json, report.html, report.md and robustness.png.

    Pairs that one of the models could not be attacked on, because they are too long for it or gold does not
    share their label, are left out for all. Raises ArtifactError for attacks that are not alike, DataError if
    no pair is left.
    """
    manifests = {name: expect_stage(folder, "attack") for name, folder in options.attacks.items()}
    _require_alike(manifests)
    with written_by_stages("the attacks cannot be compared", "attack the models again"):
        attacked = _attacked({name: _verdicts(Path(folder)) for name, folder in options.attacks.items()})
    baseline = options.baseline or attacked.names[0]
    numbers = attacked.numbers(baseline, options.resamples, options.confidence, options.seed)
    write_json(draft.folder / FILE, numbers)
    _draw(numbers, draft.folder)
    figures = [Figure.load(draft.folder / PICTURE)]
    section = Section("Attacks compared", [], tables(numbers), figures, lead=sentence(numbers))
    write_report(draft.folder, "Whose verdicts hold", [section])
    draft.results |= {"sentence": sentence(numbers), "pairs": numbers["pairs"]}


def _require_alike(manifests: Mapping[str, Manifest]) -> None:
    """Raise ArtifactError unless all were made on the same pairs, and searched alike."""
    first, *others = manifests
    for other in others:
        a, b = manifests[first], manifests[other]
        names = (*ALIKE, *DecodeSettings.model_fields) if a["options"].get("search") == "decode" else ALIKE
        differing = [name for name in names if a["options"].get(name) != b["options"].get(name)]
        if a["inputs"]["pairs"]["sha256"] != b["inputs"]["pairs"]["sha256"]:
            differing = ["pairs", *differing]
        if differing:
            of_both = (f"{name}: {a['options'].get(name)} and {b['options'].get(name)}" for name in differing)
            raise ArtifactError(
                "the attacks are not alike",
                given="; ".join(of_both)[:300],
                expected=f"the same pairs and the same search for {first} and {other}",
                fix=f"attack {other} again with the options of {first}",
            )


def _verdicts(folder: Path) -> dict[int, Row]:
    """What came of each pair that the attack looked at, by its row."""
    rows = (row for _, row in read_rows(str(folder / "attacks.jsonl.gz")) if not isinstance(row, BadRow))
    return {row["row"]: row for row in rows}


def _attacked(verdicts: Mapping[str, Mapping[int, Row]]) -> Attacked:
    shared = sorted(set.intersection(*({*rows} for rows in verdicts.values())))
    if not shared:
        raise DataError(
            "no pair was looked at in all attacks",
            given=", ".join(f"{name}: {len(rows)} pairs" for name, rows in verdicts.items()),
            expected="pairs that every model can take, and whose label gold shares",
            fix="give shorter pairs, or a larger max_length",
        )
    right_MP = np.array([[rows[n]["right"] for n in shared] for rows in verdicts.values()])
    fell_MP = np.array([[rows[n]["succeeded"] for n in shared] for rows in verdicts.values()])
    of_first = next(iter(verdicts.values()))
    pairs = [Pair(*(of_first[n][name] for name in ("prompt", "chosen", "rejected"))) for n in shared]
    prompts_P = np.array(numbered(map(prompt_key, pairs)))
    return Attacked([*verdicts], right_MP, right_MP & ~fell_MP, prompts_P)


def _draw(numbers: Mapping[str, Any], folder: Path) -> None:
    groups = {
        title: {
            name: (model[measure]["value"], model[measure]["low"], model[measure]["high"])
            for name, model in numbers["models"].items()
        }
        for title, measure in (("before the attack", "accuracy"), ("after it", "robust_accuracy"))
    }
    plotting.dots(groups, folder / PICTURE, "share of pairs ranked correctly", numbers["baseline"])

"""Scorers that are no classifiers, wherever stages take a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import save_policy, write_prompts
from small_training import rows, write

from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.manifest import read_manifest
from moemerge.data.reading import read_pairs
from moemerge.data.rows import read_rows
from moemerge.data.tokenise import encode_all
from moemerge.errors import OptionError, UnsupportedError
from moemerge.evaluation.credit import token_credit
from moemerge.evaluation.gold import load_gold
from moemerge.models.scorers import open_scorer
from moemerge.options.base import TextFormat
from moemerge.options.gold import GoldSource
from moemerge.run import cli
from moemerge.stages.attack import attack
from moemerge.stages.data import prepare
from moemerge.stages.optimise import optimise
from moemerge.stages.strength import strength, vote_rows

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "implicit", "policy": "policy", "reference": "reference"},
    "judge": {"kind": "judge", "model": "policy", "yes": "w1", "no": "w2"},
    "ranked": {"kind": "judge", "model": "lettered", "form": "ranked"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Language models, scorers of all kinds and pairs; read only."""
    folder = tmp_path_factory.mktemp("home")
    for number, name in enumerate(("policy", "reference", "lettered")):
        save_policy(folder / name, seed=number, max_position_embeddings=512)
    tokenizer = folder / "lettered" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w59"', '"A"').replace('"w60"', '"B"'))
    for name, fields in KINDS.items():
        write_json(folder / f"{name}.scorer.json", fields)
    write(folder / "pairs.jsonl", rows(24, 1))
    return folder


def by_hand(home: Path, name: str, items: list[Any]) -> list[float]:
    """Scores of prompts and answers, one at a time."""
    scorer = open_scorer(home / f"{name}.scorer.json")
    reader, loaded = scorer.reader(), scorer.load(CPU)
    return [float(loaded.score(encode_all(reader, [item]), 512)[0]) for item in items]


def test_attacks_go_by_a_scorers_scores(home: Path, tmp_path: Path) -> None:
    name, pairs = "judge", str(home / "pairs.jsonl")
    scorer = str(home / f"{name}.scorer.json")
    out = attack(scorer, pairs, output=tmp_path / "a", steps=2, proposals=4, resamples=100)
    done = [row for _, row in read_rows(str(out / "attacks.jsonl.gz")) if isinstance(row, dict)]
    attempts = [row for row in done if row.get("right", True)]
    shown = [(row["prompt"], row["edited"]) for row in attempts[:4]]
    assert [row["score_edited"] for row in attempts[:4]] == pytest.approx(
        by_hand(home, name, shown), abs=1e-4
    )
    assert "Token rewards" not in (out / "report.md").read_text()


def test_a_ranked_judge_cannot_be_attacked(home: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="compares two answers"):
        attack(str(home / "ranked.scorer.json"), str(home / "pairs.jsonl"), output=tmp_path / "a")


def test_scorers_vote_on_labels(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moemerge.stages.strength.write_page", lambda *_: None)  # drawing takes seconds
    voters = [str(home / f"{name}.scorer.json") for name in KINDS]
    out = strength(str(home / "pairs.jsonl"), voters=voters, planted=0.0, output=tmp_path / "s")
    pairs = read_pairs(str(home / "pairs.jsonl"), TextFormat())[0]
    items = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    said_VP = np.array([row["differences"] for row in vote_rows(out)]).T
    for number, name in enumerate(("dpo", "judge")):
        scores_P2 = np.array(by_hand(home, name, items)).reshape(-1, 2)
        differences_P = scores_P2[:, 0] - scores_P2[:, 1]
        scale = np.sqrt((differences_P**2).mean())
        np.testing.assert_allclose(said_VP[number], differences_P / scale, atol=1e-3)
    assert read_manifest(out)["results"]["flops"] > 0


def test_a_judges_scores_are_gold(home: Path) -> None:
    judge = str(home / "judge.scorer.json")
    gold = load_gold(GoldSource(gold_model=judge), CPU, TextFormat())
    items = [("w0 ", "w3"), ("w1 ", "w4 w5"), ("", "w6")]
    assert gold is not None and gold(items).tolist() == pytest.approx(by_hand(home, "judge", items), abs=1e-5)


@pytest.mark.slow
def test_a_policy_is_optimised_against_a_scorer(home: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"steps": 2, "batch_size": 4, "answers_per_prompt": 2, "max_new_tokens": 2}
    given |= {"measure_prompts": 2, "measure_steps": 2, "measure_answers": 1, "resamples": 100}
    given |= {"gold_model": str(home / "judge.scorer.json"), "models": {"dpo": str(home / "dpo.scorer.json")}}
    prompts = write_prompts(tmp_path / "prompts.jsonl", 8)
    out = optimise(str(home / "policy"), prompts=prompts, output=tmp_path / "o", **given)
    done = [row for _, row in read_rows(str(out / "samples.jsonl.gz")) if isinstance(row, dict)]
    items = [(row["prompt"], row["answer"]) for row in done]
    assert [row["proxy"] for row in done] == pytest.approx(by_hand(home, "dpo", items), abs=1e-4)
    assert [row["gold"] for row in done] == pytest.approx(by_hand(home, "judge", items), abs=1e-4)


def test_a_scorers_score_is_not_had_by_token(home: Path) -> None:
    with pytest.raises(UnsupportedError, match="credit token needs a classifier"):
        token_credit(open_scorer(home / "dpo.scorer.json"), CPU, 64)


def test_the_lengths_of_a_judges_questions_count(home: Path, tmp_path: Path) -> None:
    """The stage data reads rows as the scorer does that is named as tokenizer."""
    given = {"train": str(home / "pairs.jsonl"), "bad_rows": "skip", "max_length": 28, "validation_share": 0}
    sizes = {
        name: read_manifest(prepare(output=tmp_path / name, tokenizer=str(home / tokenizer), **given))[
            "results"
        ]["sizes"]["train"]
        for name, tokenizer in (("plain", "policy"), ("judge", "judge.scorer.json"))
    }
    assert sizes["plain"] == 24 and 0 < sizes["judge"] < 24


@pytest.mark.slow
def test_an_audit_of_scorers(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(home / f"{name}.scorer.json") for name in ("dpo", "judge")]
    quick = ["--steps", "1", "--proposals", "2", "--resamples", "100", "--output", str(tmp_path / "a")]
    with pytest.raises(SystemExit) as end:
        cli.main(["audit", *models, "--pairs", str(home / "pairs.jsonl"), *quick])
    assert end.value.code == 0
    assert "Report:" in capsys.readouterr().out
    assert "judge" in (tmp_path / "a" / "report.md").read_text()

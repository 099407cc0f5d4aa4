"""What trainings cost: against torch's own count, by hand, and trainings that cost as much as others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_moe import write_rows
from tiny_models import save_dense
from torch.utils.flop_counter import FlopCounterMode

from moemerge.artifacts.checksums import MANIFEST
from moemerge.artifacts.manifest import own_digest, read_manifest
from moemerge.artifacts.stage import Draft
from moemerge.errors import ArtifactError
from moemerge.models.cost import cost_of
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model
from moemerge.options.parse import parse_options
from moemerge.options.train import Train
from moemerge.stages.strength import strength
from moemerge.stages.train import train
from moemerge.training.bench import Bench, open_bench
from moemerge.training.flops import training_flops
from moemerge.training.losses import LOSSES, THROUGH_LANGUAGE_HEAD

PAIRS, TOKENS, ANSWERS = 12, 12 * 2 * 8, 12 * 2 * 6  # prompts of two words, answers of five and EOS
NORMS = 2 * 7 * 32  # of the tiny llama, which our count of weights has and torch's of products has not
COMMON: dict[str, Any] = {"max_length": 40, "threads": 1, "device": "cpu", "batch_size": 4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs of equal lengths: no padding."""
    words = [[f"w{(7 * row + 3 * place) % 60}" for place in range(12)] for row in range(PAIRS)]
    pairs = [
        {"prompt": " ".join(w[:2]), "chosen": " " + " ".join(w[2:7]), "rejected": " " + " ".join(w[7:])}
        for w in words
    ]
    return str(write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pairs))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_dense(tmp_path_factory.mktemp("model") / "a", seed=0))


def bench_of(model: str, rows: str, tmp_path: Path, **options: Any) -> tuple[Bench, Train]:
    given = parse_options(
        Train, {"model": model, "pairs": rows, "output": tmp_path / "out", **COMMON, **options}
    )
    return open_bench(given, Draft(tmp_path, tmp_path / "out")), given


def test_a_plain_pass_costs_what_torch_counts(model: str, rows: str, tmp_path: Path) -> None:
    bench, options = bench_of(model, rows, tmp_path)
    loaded = load_reward_model(ModelFolder(model), "cpu").train()
    ids = torch.tensor([text.ids for pair in bench.pairs for text in (pair.chosen, pair.rejected)])
    with FlopCounterMode(display=False) as counter:
        loaded(ids).logits.sum().backward()
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm")
    )
    assert ids.numel() == TOKENS
    ours = training_flops(bench, options) - 3 * NORMS * TOKENS
    # The head answers every token, and its gradient comes from the pooled one alone: torch counts both.
    assert ours == pytest.approx(counted, rel=1e-3)
    assert training_flops(bench, options, steps=6) == 2 * training_flops(bench, options)


def test_what_objectives_and_frozen_layers_cost_by_hand(model: str, rows: str, tmp_path: Path) -> None:
    f, head = cost_of(ModelFolder(model)).flops_per_token, 2 * 32 * 64
    expected = {
        "bradley_terry": 3 * f * TOKENS,
        "language": 3 * f * TOKENS + 3 * head * ANSWERS / 2,
        "policy": 4 * f * TOKENS + 4 * head * ANSWERS,
        "contrast": 3 * f * TOKENS,
    }
    assert set(expected) == set(LOSSES)
    assert set(THROUGH_LANGUAGE_HEAD) < set(LOSSES)
    for name, flops in expected.items():
        bench, options = bench_of(model, rows, tmp_path, objectives={name: 1.0})
        assert training_flops(bench, options) == pytest.approx(flops, rel=1e-12), name
    bench, options = bench_of(model, rows, tmp_path, train_layers="last:1")
    assert training_flops(bench, options) == pytest.approx((1 + 2 / 3) * f * TOKENS)


def test_a_lookahead_costs_its_sets(model: str, rows: str, tmp_path: Path) -> None:
    texts = [{"text": f" w{n} w{n + 1} w{n + 2}"} for n in range(3)]
    sets = write_rows(tmp_path / "sets.jsonl", [{"prompt": f"w{n}", "candidates": texts} for n in range(5)])
    f = cost_of(ModelFolder(model)).flops_per_token
    bench, options = bench_of(model, rows, tmp_path, lookahead=str(sets), lookahead_sets=2)
    assert training_flops(bench, options) == pytest.approx(3 * f * TOKENS + 3 * 3 * f * 2 * 3 * 5)


def test_training_for_what_a_vote_and_a_training_took(model: str, rows: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": model, "pairs": rows, **COMMON, "patience": None}
    vote = strength(output=tmp_path / "vote", folds=3, orders=1, planted=0.0, fold_by="prompt", **given)
    control = train(output=tmp_path / "control", max_steps=6, **given)
    again = strength(output=tmp_path / "again", votes=str(vote), treat="flip", pairs=rows, max_length=40)
    costs = [read_manifest(folder)["results"]["flops"] for folder in (vote, control, again)]
    f = cost_of(ModelFolder(model)).flops_per_token
    # Three voters on two thirds of the pairs in batches of four, and all pairs scored once.
    assert costs[0] == pytest.approx(3 * 3 * f * TOKENS * 2 / 3 + f * TOKENS)
    assert costs[1] == pytest.approx(2 * 3 * f * TOKENS) and costs[2] == costs[0]
    rival = train(output=tmp_path / "rival", flops_of=[str(vote), str(control)], max_steps=3, **given)
    found = read_manifest(rival)["results"]
    assert found["flops_ratio"] == pytest.approx((costs[0] + costs[1]) / (3 * f * TOKENS))
    assert found["flops"] == pytest.approx(costs[0] + costs[1], abs=3 * f * TOKENS / 6)  # half a step


def test_a_search_costs_all_its_trials(model: str, rows: str, tmp_path: Path) -> None:
    found = train(
        model=model, pairs=rows, validation=rows, output=tmp_path / "out", max_steps=3, patience=None,
        search={"learning_rate": [1e-4, 1e-3]}, **COMMON,
    )  # fmt: skip
    results = read_manifest(found)["results"]
    assert results["flops"] == 2 * 3 * cost_of(ModelFolder(model)).flops_per_token * TOKENS
    assert [trial["flops"] for trial in results["trials"]] == [results["flops"] / 2] * 2


def test_an_output_that_does_not_say_what_it_took(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = train(model=model, pairs=rows, output=tmp_path / "old", max_steps=1, **COMMON)
    path = Path(old) / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["results"]["flops"]
    path.write_text(json.dumps(manifest | {"sha256": own_digest(manifest)}))
    with pytest.raises(ArtifactError, match="does not say how many FLOPs"):
        train(model=model, pairs=rows, output=tmp_path / "new", flops_of=[str(old)], **COMMON)
    assert not (tmp_path / "new").exists()

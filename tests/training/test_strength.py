"""The stage strength: wrong labels are found by voters that have not seen them, and treated as asked."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_training import brute_force, raiser, rows, run, words, write
from tiny_models import save_dense

from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import ArtifactError, CheckpointError, DataError, OptionError
from moemerge.stages.strength import strength
from moemerge.training import voters

QUICK = {"folds": 2, "orders": 2, "planted": 0.1, "max_steps": 40, "batch_size": 8, "learning_rate": 5e-3}
ONE_STEP = {"folds": 3, "orders": 1, "max_steps": 1, "batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def no_pictures(no_figures: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes longer than voting; one test draws."""
    if "page" not in request.node.name:
        monkeypatch.setattr("moemerge.stages.strength.write_page", lambda *_: None)


def easy(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs whose better answer has the word w50, the other one w51, among any others; `id` counts them."""
    made, draw = rows(count, seed), random.Random(seed)
    for number, row in enumerate(made):
        row |= {"id": number, "subset": "rare" if number % 20 == 1 else "most"}
        row["chosen"], row["rejected"] = (f"{best} {words(draw, 0, 40, 3)}" for best in ("w50", "w51"))
    return made


def wrong_labels(count: int, every: int) -> list[dict[str, Any]]:
    """Such pairs of which each `every`-th has the wrong label."""
    made = easy(count, 7)
    for row in made[::every]:
        row |= {"chosen": row["rejected"], "rejected": row["chosen"]}
    return made


def vote(world: Path, output: Path, pairs: str, **options: Any) -> dict[str, Any]:
    """Vote with voters trained from the tiny dense model; what the manifest has of it."""
    if not {"voters", "votes"} & options.keys():
        options["model"] = str(world / "dense")
    strength(pairs=pairs, output=output, device="cpu", **options)
    return dict(read_manifest(output)["results"])


def read(folder: Path, name: str = "pairs") -> list[dict[str, Any]]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def voted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, every fifth with a wrong label, and a vote on them; read only."""
    folder = tmp_path_factory.mktemp("voted")
    pairs = write(folder / "pairs.jsonl", wrong_labels(200, 5))
    trusted = write(folder / "trusted.jsonl", easy(160, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moemerge.stages.strength.write_page", lambda *_: None)
        patch.setattr("moemerge.training.report.panels", lambda *_: None)
        vote(world, folder / "none", pairs, trusted=trusted, **QUICK)
    return folder


def test_wrong_labels_and_planted_flips_are_found(voted: Path) -> None:
    numbers, found = json.loads((voted / "none" / "strength.json").read_text()), read(voted / "none")
    right = [row["id"] % 5 != 0 for row in found]
    assert sum((row["strength"] > 0) == good for row, good in zip(found, right, strict=True)) > 0.95 * 200
    planted = [row["planted"] for row in read(voted / "none", "votes")]
    weak, others = ([row["strength"] for row, is_in in zip(found, planted, strict=True) if is_in == wanted]
                    for wanted in (True, False))  # fmt: skip
    wins = [[(-w < o) + (-w == o) / 2 for o in others] for w in weak]
    flips = numbers["flips"]
    assert flips["planted"] == len(weak) == 20 and 0 <= flips["low"] < flips["auc"] < flips["high"] <= 1
    assert flips["auc"] == pytest.approx(sum(map(sum, wins)) / 20 / len(others))
    assert flips["auc_of_wrong_labels"] > 0.9 and flips["p_leak"] > 0.01
    assert numbers["evidence"]["errors"] < 0.1 and 0.15 < numbers["evidence"]["noise"] < 0.25
    for row in numbers["precision"]:
        mine = [not good for good, r in zip(right, found, strict=True) if r["strength"] < -row["threshold"]]
        assert row["pairs"] == len(mine) and row["low"] <= sum(mine) / len(mine)


def test_treat_none_keeps_the_rows_but_for_columns(voted: Path) -> None:
    before = [json.loads(line) for line in (voted / "pairs.jsonl").read_text().splitlines()]
    found = read(voted / "none")
    added = {"strength", "spread", "margin"}
    assert [{k: v for k, v in row.items() if k not in added} for row in found] == before
    for row, said in zip(found, read(voted / "none", "votes"), strict=True):
        mean = sum(said["differences"]) / 2
        assert row["strength"] == row["margin"] == said["strength"] == pytest.approx(mean)
        assert row["spread"] == pytest.approx(abs(said["differences"][0] - mean))


@pytest.mark.parametrize("treat", ["auto", "flip", "drop", "soft"])
def test_votes_are_treated_again_without_voting(voted: Path, world: Path, tmp_path: Path, treat: str) -> None:
    share = {"share": 0.1} if treat in ("flip", "drop") else {}
    pairs = str(voted / "pairs.jsonl")
    results = vote(world, tmp_path / "out", pairs, votes=str(voted / "none"), treat=treat, **share)
    before, after = read(voted / "none"), read(tmp_path / "out")
    assert read(tmp_path / "out", "trusted") == read(voted / "none", "trusted")
    changed = [row["treatment"] != "kept" for row in read(tmp_path / "out", "votes")]
    kept = [row for row, was in zip(before, changed, strict=True) if not was]
    if treat == "soft":
        doubts = [row.pop("doubt") for row in after]
        assert after == before and sum(doubts) / 200 == pytest.approx(results["doubt"])
        by_strength = sorted(zip(before, doubts, strict=True), key=lambda both: both[0]["strength"])
        assert [doubt for _, doubt in by_strength] == sorted(doubts, reverse=True)
        assert sum(doubts[::5]) > 0.8 * 40 and sum(doubts) < 1.3 * 40
    elif treat == "drop":
        assert sum(changed) == 20 and after == kept
        assert max(r["strength"] for r, was in zip(before, changed, strict=True) if was) <= min(
            row["strength"] for row in kept
        )
    else:
        assert results["treated"]["flipped"] == sum(changed) > 4 and (treat == "auto" or sum(changed) == 20)
        for row, now, was in zip(before, after, changed, strict=True):
            turned = {"chosen": row["rejected"], "rejected": row["chosen"]} if was else {}
            sign = -1 if was else 1
            assert now == row | turned | {n: sign * row[n] for n in ("strength", "margin")}
        right = [row["id"] % 5 == 0 for row, was in zip(before, changed, strict=True) if was]
        assert sum(right) > 0.9 * len(right)


def test_the_same_is_written_whether_votes_are_new_or_old(voted: Path, world: Path, tmp_path: Path) -> None:
    options = {"noise": 0.2, "treat": "auto", "auto_by": "drop"}
    pairs = str(voted / "pairs.jsonl")
    vote(world, tmp_path / "old", pairs, votes=str(voted / "none"), **options)
    numbers = json.loads((tmp_path / "old" / "strength.json").read_text())
    assert numbers["evidence"] == {"kind": "noise", "noise": 0.2} and numbers["treated"]["dropped"] > 4
    vote(world, tmp_path / "new", pairs, **QUICK, **options)
    for name in ("pairs.jsonl.gz", "votes.jsonl.gz", "strength.json"):
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


@pytest.mark.parametrize("fold_by", ["text", "prompt", "subset"])
def test_no_voter_trains_on_what_it_scores(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fold_by: str
) -> None:
    """A recount of prompts and texts; answers come up again, and trusted pairs are among the pairs."""
    made = [row | {"subset": f"s{n // 2 % 5}"} for n, row in enumerate(rows(40, 3))]
    for number in range(0, 40, 4):
        made[number + 1]["prompt"] = made[number]["prompt"]
        made[number + 2]["chosen"] = made[number]["rejected"]
    pairs, trusted = write(tmp_path / "p.jsonl", made), write(tmp_path / "t.jsonl", made[3:9])
    trained: list[list[Any]] = []
    best_model = voters.best_model

    def spy(bench: Any, trials: Any, folder: Path) -> Any:
        trained.append([pair.pair for pair in bench.pairs])
        return best_model(bench, trials, folder)

    monkeypatch.setattr(voters, "best_model", spy)
    vote(world, tmp_path / "out", pairs, trusted=trusted, fold_by=fold_by, planted=0.2, **ONE_STEP)
    said = read(tmp_path / "out", "votes")
    assert len(trained) == 3 and sum(row["planted"] for row in said) == 8
    for fold, seen in enumerate(trained):
        scored = [made[row["row"] - 1] for row in said if row["fold"] == fold]
        assert len(seen) + len(scored) == 40 and len(scored) > 5
        assert not {row["prompt"] for row in scored} & {pair.prompt for pair in seen}
        texts = {text for pair in seen for text in (pair.chosen, pair.rejected)}
        assert (
            fold_by != "text" or not {row[side] for row in scored for side in ("chosen", "rejected")} & texts
        )
        assert fold_by != "subset" or not {row["subset"] for row in scored} & {pair.subset for pair in seen}
        for pair in seen:
            turned = pair.chosen != made[pair.row - 1]["chosen"]
            assert turned == said[pair.row - 1]["planted"]
    # A trusted pair that is among the pairs was scored by the voters that scored that one.
    by_prompt = {(r["prompt"], r["chosen"]): s["differences"] for r, s in zip(made, said, strict=True)}
    for row in read(tmp_path / "out", "trusted"):
        assert row["differences"] == pytest.approx(by_prompt[row["prompt"], row["chosen"]], abs=1e-5)


def test_a_killed_vote_goes_on_and_ends_with_the_same_bytes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, options = str(world / "train.jsonl"), {"eval_steps": 1, **ONE_STEP, "max_steps": 3}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    vote(world, whole, pairs, **options)
    best_model, score, calls = voters.best_model, voters.score_pairs, []

    def counted(*given: Any) -> Any:
        calls.append(given)
        return best_model(*given)

    def second(*given: Any) -> Any:
        return score(*given) if len(calls) < 2 else raiser("killed")()

    monkeypatch.setattr(voters, "best_model", counted)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(voters, "score_pairs", second)
        vote(world, killed, pairs, **options)
    (work,) = tmp_path.glob(".killed.*.work")
    assert (work / "fold-0-order-0.json").exists() and (work / "fold-1-order-0" / "trial-0").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr("moemerge.training.trials._fit", raiser("trained again"))
        patch.setattr(voters, "score_pairs", raiser("killed"))
        with pytest.raises(RuntimeError, match="killed"):
            vote(world, killed, pairs, **options)
    vote(world, killed, pairs, **options)
    assert len(calls) == 5, "the first voter was not asked again"
    names = sorted(path.name for path in whole.iterdir() if path.name != "manifest.json")
    assert names == ["pairs.jsonl.gz", "strength.json", "votes.jsonl.gz"]
    for name in names:
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_models_that_are_given_vote_with_one_weight_each(world: Path, tmp_path: Path) -> None:
    """By transformers alone; a model whose head is twenty times as large says no more than another."""
    other = save_dense(tmp_path / "other", seed=5)
    loud = save_dense(tmp_path / "loud", seed=6)
    scale_head(loud, 20.0)
    models = [str(other), str(loud)]
    pairs = str(world / "held.jsonl")
    vote(world, tmp_path / "out", pairs, voters=models, planted=0.0, trusted=str(world / "train.jsonl"))
    said = read(tmp_path / "out", "votes")
    assert {row["fold"] for row in said} == {None}
    for number, model in enumerate(models):
        mine = [row["differences"][number] for row in said]
        assert sum(d * d for d in mine) / len(mine) == pytest.approx(1)
        assert sum(d > 0 for d in mine) / len(mine) == brute_force(Path(model), world / "held.jsonl")[1]
    assert len(read(tmp_path / "out", "trusted")) == 48


def test_a_voter_that_was_trained_on_the_pairs_is_told(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(world, tmp_path / "trained", "dense", max_steps=1)
    voters_ = [str(world / "moe"), str(tmp_path / "trained")]
    vote(world, tmp_path / "held", str(world / "held.jsonl"), voters=voters_)
    assert "was trained on" not in caplog.text
    vote(world, tmp_path / "seen", str(world / "train.jsonl"), voters=voters_)
    told = [line for line in caplog.messages if "was trained on" in line]
    assert len(told) == 1 and told[0].startswith(voters_[1])


def scale_head(model: Path, factor: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["score.weight"] *= factor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_train_takes_margins_and_doubts(voted: Path, world: Path, tmp_path: Path) -> None:
    pairs = str(voted / "pairs.jsonl")
    vote(world, tmp_path / "soft", pairs, votes=str(voted / "none"), treat="soft")
    treated = str(tmp_path / "soft" / "pairs.jsonl.gz")
    options = {"max_steps": 1, "learning_rate": 1e-3, "pairs": treated}
    losses = {}
    for margin in ("none", "column"):
        for smoothing in (0.0, "column"):
            output = tmp_path / f"{margin}-{smoothing}"
            chosen = {"margin": margin, "label_smoothing": smoothing}
            losses[margin, smoothing] = run(world, output, "dense", **chosen, **options)["train_loss"]
    assert len({round(loss, 6) for loss in losses.values()}) == 4


def test_its_page_shows_pictures_tables_and_the_pairs_to_read(
    voted: Path, world: Path, tmp_path: Path
) -> None:
    pairs = str(voted / "pairs.jsonl")
    results = vote(world, tmp_path / "out", pairs, votes=str(voted / "none"), treat="auto")
    text = (tmp_path / "out" / "report.md").read_text()
    assert results["sentence"] in text and "flipped" in results["sentence"]
    assert "trusted labels the vote is against" in text and "### Subsets" in text
    assert text.split("### The 20 weakest pairs")[1].count("\n| ") == 22
    assert {"strength.png", "precision.png", "report.html"} <= {p.name for p in (tmp_path / "out").iterdir()}
    vote(world, tmp_path / "blind", pairs, voters=[str(world / "dense")])
    text = (tmp_path / "blind" / "report.md").read_text()
    assert "Nothing tells wrong labels from errors of the vote" in text and "if 20% of all are" in text


def test_faults_name_the_remedy(world: Path, voted: Path, tmp_path: Path) -> None:
    pairs = str(voted / "pairs.jsonl")
    dense, votes = str(world / "dense"), str(voted / "none")
    for options, text in (
        ({"treat": "auto"}, "treat auto needs trusted or noise"),
        ({"treat": "soft"}, "treat soft needs trusted or noise"),
        ({"treat": "flip", "share": 1.5}, "share"),
        ({"share": 0.1}, "share goes with treat flip or drop"),
        ({"auto_by": "drop"}, "auto_by goes with treat auto"),
        ({"noise": 0.1, "trusted": pairs}, "give trusted or noise"),
        ({"noise": 0.5}, "noise"),
        ({"planted": 0.3}, "planted"),
        ({"folds": 1}, "folds"),
        ({"search": {"learning_rate": [1e-3]}}, "search needs validation"),
        ({"voters": [dense], "model": dense}, "give one of these"),
        ({"voters": [dense], "epochs": 2}, "epochs does not go with voters"),
        ({"voters": [dense], "orders": 2}, "orders does not go with voters"),
        ({"votes": votes, "planted": 0.1}, "planted does not go with votes"),
        ({"objectives": {"bradley_tery": 1}}, "did you mean 'bradley_terry'"),
    ):
        with pytest.raises(OptionError, match=text):
            vote(world, tmp_path / "out", pairs, **options)
    with pytest.raises(OptionError, match="give one of these"):
        strength(pairs=pairs, output=tmp_path / "out")
    few = write(tmp_path / "few.jsonl", rows(3, 1))
    with pytest.raises(DataError, match="cannot be dealt to 5 folds"):
        vote(world, tmp_path / "out", few)
    with pytest.raises(DataError, match="no margin"):
        vote(world, tmp_path / "out", pairs, margin="column", **ONE_STEP)
    with pytest.raises(ArtifactError, match="given on other pairs"):
        vote(world, tmp_path / "out", few, votes=votes)
    with pytest.raises(ArtifactError, match="comes from another stage"):
        vote(world, tmp_path / "out", pairs, votes=str(world / "moe"))
    vote(world, tmp_path / "blind", pairs, voters=[dense])
    with pytest.raises(OptionError, match="nothing tells how often the votes"):
        vote(world, tmp_path / "out", pairs, votes=str(tmp_path / "blind"), treat="auto")
    silent = save_dense(tmp_path / "silent")
    scale_head(silent, 0.0)
    with pytest.raises(CheckpointError, match="has no vote"):
        vote(world, tmp_path / "out", pairs, voters=[str(silent)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("differences", [["x"], [None, 1.0], [[1.0]], [1e999], 3, "gone"])
def test_votes_that_no_stage_wrote_are_refused(
    voted: Path, world: Path, tmp_path: Path, differences: Any
) -> None:
    shutil.copytree(voted / "none", tmp_path / "none")
    row = {"row": 1, "subset": "", "differences": differences, "planted": False, "fold": 0}
    if differences == "gone":
        row = {"row": 999, "differences": [1.0, 1.0]}
    (tmp_path / "none" / "trusted.jsonl.gz").unlink()
    with gzip.open(tmp_path / "none" / "votes.jsonl.gz", "wt") as lines:
        lines.write(json.dumps(row) + "\n")
    with pytest.raises(ArtifactError, match="votes cannot be read"):
        vote(world, tmp_path / "out", str(voted / "pairs.jsonl"), votes=str(tmp_path / "none"))

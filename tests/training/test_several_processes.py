"""Training by two processes: what one makes, exact resume after a kill, one message."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ranks, torchrun
from safetensors.torch import load_file
from small_moe import make_moe, random_pairs, write_rows
from small_training import history, weights

from moemerge.errors import OptionError
from moemerge.run.cli import cli
from moemerge.stages.strength import strength, vote_rows
from moemerge.stages.train import train

pytestmark = pytest.mark.usefixtures("no_figures")
FEW = ["--batch-size", "8", "--epochs", "2", "--learning-rate", "3e-3", "--eval-steps", "1", "--threads", "1"]
# AdamW's steps are in proportion to gradients then: by default they blow up the rounding of small ones.
FEW += ["--trainer", "adam_epsilon=0.01"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoE without a balance loss, which is of each process's part; one with; their dense models."""
    home = tmp_path_factory.mktemp("together")
    make_moe(home / "moe", balance_coefficient=0.0)
    make_moe(home / "balanced")
    write_rows(home / "pairs.jsonl", random_pairs(24, subsets=("a", "b")))
    write_rows(home / "held.jsonl", random_pairs(9, seed=1))
    return home


def command(home: Path, model: str, output: Path, *more: str) -> list[str]:
    given = ["--pairs", str(home / "pairs.jsonl"), "--validation", str(home / "held.jsonl")]
    return ["train", "--model", str(home / model), *given, *FEW, *more, "--output", str(output)]


def well(done: list[Any]) -> None:
    assert {ended.code for ended in done} == {0}, [ended.err[-3000:] for ended in done]
    assert done[0].out and not done[1].out, "the first one tells"


CHECKPOINTING = "--gradient-checkpointing"
WAYS = {
    "dense": ("dense-moe", []),
    "moe": ("moe", ["--assign", "subset", "--assign-share", "0.5", "--shared-dropout", "0.3"]),
    "mixture": (
        "moe",
        [*"--label-smoothing 0.1 --center 0.01 --gradient-accumulation 2".split(), CHECKPOINTING],
    ),
}


SHARDED = ["--sharded"]


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("dense", []),
        pytest.param("dense", SHARDED, marks=pytest.mark.slow),
        ("moe", SHARDED),
        pytest.param("moe", [], marks=pytest.mark.slow),
        pytest.param("mixture", [], marks=pytest.mark.slow),
        pytest.param("mixture", SHARDED, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_what_one_does(way: str, how: list[str], home: Path, tmp_path: Path) -> None:
    """batch_size counts the pairs of all; each step is one of the same pairs."""
    model, options = WAYS[way]
    well(ranks(command(home, model, tmp_path / "two", *options, *how)))
    cli.main(command(home, model, tmp_path / "one", *options), standalone_mode=False)
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    start = weights(home / model)
    assert any(not torch.equal(one[name], start[name]) for name in one)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    beside = {path.name for path in (tmp_path / "one").glob("[!mh]*")} | {"config.json"}
    for name in beside - {"recipe.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    ours, theirs = history(tmp_path / "one"), history(tmp_path / "two")
    assert len(ours) == len(theirs) > 3
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine.keys() & {"loss", "eval_loss", "eval_accuracy", "step", "learning_rate", "accuracy"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_two_processes_vote_as_one_does(home: Path, tmp_path: Path) -> None:
    """They train each voter together, up to rounding, and score for it, as for models that are given."""
    pairs, voters = str(home / "pairs.jsonl"), [str(home / model) for model in ("dense-moe", "moe")]
    asked = ["strength", "--pairs", pairs, "--batch-tokens", "60", "--planted", "0.2", "--model", voters[0]]
    # One step: filling up the last batch of a pass would make another training of it.
    asked += "--folds 2 --orders 1 --batch-size 8 --max-steps 1 --learning-rate 3e-3 --threads 1".split()
    asked += ["--trainer", "adam_epsilon=0.01"]

    def given(output: Path) -> Path:
        return strength(pairs=pairs, voters=voters, batch_tokens=60, planted=0.2, output=output)

    well(ranks([*asked, "--output", str(tmp_path / "two")], lambda rank: given(tmp_path / "given-two")))
    cli.main([*asked, "--output", str(tmp_path / "one")], standalone_mode=False)
    kept = [folder / "votes.jsonl.gz" for folder in (given(tmp_path / "given-one"), tmp_path / "given-two")]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    one, two = (vote_rows(tmp_path / name) for name in ("one", "two"))
    assert [row["planted"] for row in one] == [row["planted"] for row in two]
    for mine, theirs in zip(one, two, strict=True):
        assert mine["differences"] == pytest.approx(theirs["differences"], rel=1e-3, abs=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "given-one", "given-two"}


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--sharded"]], ids=["ddp", "fsdp2"])
def test_two_processes_train_bfloat16_weights(how: list[str], home: Path, tmp_path: Path) -> None:
    """Close to one process: gradients are rounded in another order; and exact after a kill."""
    options = ["--weights", "bfloat16", *how]
    well(ranks(command(home, "dense-moe", tmp_path / "two", *options)))
    cli.main(command(home, "dense-moe", tmp_path / "one", *options[:2]), standalone_mode=False)
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    assert {weight.dtype for weight in two.values()} == {torch.bfloat16}
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0.02, atol=0.01)
    broken = command(home, "dense-moe", tmp_path / "out", *options)
    ranks(broken, dies_at(3, 1))
    well(ranks(broken))
    out = weights(tmp_path / "out")
    assert all(torch.equal(two[name], out[name]) for name in two)


def dies_at(step: int, rank: int) -> Callable[[int], None]:
    """What ends a process in this training step."""

    def first(number: int) -> None:
        from moemerge.training.trainer import PairTrainer

        before = PairTrainer.training_step

        def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if number == rank and self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(self, *args, **kwargs)

        PairTrainer.training_step = training_step  # type: ignore[method-assign]

    return first


@pytest.mark.parametrize(
    ("rank", "how"),
    [(0, []), pytest.param(1, [], marks=pytest.mark.slow), pytest.param(1, SHARDED, marks=pytest.mark.slow)],
)
def test_a_killed_training_goes_on_as_if_it_had_not_been(
    rank: int, how: list[str], home: Path, tmp_path: Path
) -> None:
    """By as many processes; one process alone begins anew, and leaves the others' work where it is."""
    well(ranks(command(home, "balanced", tmp_path / "whole", *how)))
    broken = [*command(home, "balanced", tmp_path / "out"), *how]
    done = ranks(broken, dies_at(3, rank))
    assert done[rank].code == -signal.SIGKILL and done[1 - rank].code == 2, done[1 - rank].err[-3000:]
    assert "another of the processes" in done[1 - rank].err and "Traceback" not in done[1 - rank].err
    left = [path for path in tmp_path.iterdir() if path.name.endswith(".work")]
    assert len(left) == 1 and not (tmp_path / "out").exists()
    cli.main(command(home, "balanced", tmp_path / "plain"), standalone_mode=False)
    well(ranks(broken))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain", "whole"]
    whole, out = (weights(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_each_process_keeps_its_part_of_weights_and_moments(home: Path, tmp_path: Path) -> None:
    """Halves of each tensor in either one's files; the head's one row is the first one's."""
    done = ranks(command(home, "dense-moe", tmp_path / "out", "--sharded"), dies_at(3, 0))
    assert done[0].code == -signal.SIGKILL
    (work,) = (path for path in tmp_path.iterdir() if path.name.endswith(".work"))
    checkpoint = max((work / "trial-0").glob("checkpoint-*"))
    parts = [load_file(checkpoint / f"model-0000{n}-of-00002.safetensors") for n in (1, 2)]
    whole = weights(home / "dense-moe")
    assert parts[0].keys() == whole.keys()
    for name, weight in whole.items():
        sizes = [len(part[name]) for part in parts]
        assert sizes == ([1, 0] if len(weight) == 1 else [len(weight) // 2] * 2), name
    for number in (1, 2):
        kept = torch.load(checkpoint / f"optimizer-0000{number}-of-00002.pt", weights_only=True)
        held = sum(len(moments["exp_avg"].flatten()) for moments in kept["state"].values())
        assert held == sum(part.numel() for part in parts[number - 1].values())


def test_parts_of_weights_need_several_processes_and_no_other_use(home: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": home / "moe", "pairs": home / "pairs.jsonl", "output": tmp_path / "out"}
    with pytest.raises(OptionError, match="sharded needs several processes"):
        train(**given, sharded=True)
    for whole in ({"trainable": "lora"}, {"objectives": {"bradley_terry": 1.0, "policy": 0.1}}):
        with pytest.raises(OptionError, match="needs whole weights"):
            train(**given, sharded=True, **whole)


def test_accelerates_own_wrapping_is_refused_with_what_is_here_instead(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    done = ranks(command(home, "moe", tmp_path / "out"))
    assert [ended.code for ended in done] == [2, 2]
    assert "give train --sharded" in "".join(ended.err for ended in done)


def test_a_batch_that_cannot_be_shared_is_refused_once(home: Path, tmp_path: Path) -> None:
    flags = command(home, "moe", tmp_path / "out", "--batch-size", "7")
    done = ranks(flags)
    assert [ended.code for ended in done] == [2, 2]
    assert sum(ended.err.count("batch_size 7, 2 processes") for ended in done) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_torchrun_trains(home: Path, tmp_path: Path) -> None:
    done = torchrun(command(home, "moe", tmp_path / "out"))
    assert done[0].code == 0, done[0].err[-3000:]
    assert weights(tmp_path / "out").keys() == weights(home / "moe").keys()

"""Fitting coefficients: gradient against autograd and finite differences, what moves, what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Ended
from processes import ranks, torchrun
from small_moe import (
    ALPHA,
    SHARED,
    N,
    encode,
    gradient_of,
    make_moe,
    objective_of,
    random_pairs,
    rewrite,
    widen_norms,
    write_rows,
)  # fmt: skip
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import logsigmoid

from moemerge.artifacts.checksums import fingerprint
from moemerge.artifacts.manifest import read_manifest
from moemerge.data.pairs import Pair
from moemerge.data.tokenise import Encoded, EncodedPair
from moemerge.errors import CheckpointError, DataError, OptionError
from moemerge.fitting.splits import hold_out
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.parted_model import PartedModel
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.loading import load_tokenizer
from moemerge.models.processes import own_device
from moemerge.models.routing import RoutingStatistics
from moemerge.models.scoring import score_pairs
from moemerge.run.cli import cli
from moemerge.stages.fit import fit
from moemerge.stages.route import route

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("fit") / "moe")


@pytest.fixture(scope="module")
def planted(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that the model with nothing but expert 1 in every layer ranks without an error."""
    folder = tmp_path_factory.mktemp("planted")
    one_hot_LN = torch.eye(N, dtype=torch.float64)[1].repeat(3, 1)
    expert = MergedModel(MoeCheckpoint(moe), one_hot_LN, torch.zeros(3, dtype=torch.float64))
    rows = random_pairs(240, seed=3)
    tokenizer = load_tokenizer(str(moe))
    scores_P2 = score_pairs(expert.model, tokenizer, encode(moe, rows, folder), 10_000)
    for row, (chosen, rejected) in zip(rows, scores_P2.tolist(), strict=True):
        if chosen < rejected:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return write_rows(folder / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def routing(moe: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return route(model=str(moe), pairs=str(planted), output=tmp_path_factory.mktemp("r") / "r", max_pairs=10)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def merged_by_autograd(source: MoeCheckpoint, alpha_LN: Tensor, shared_L: Tensor) -> dict[str, Tensor]:
    """The MLP tensors as a plain differentiable sum."""
    found = {}
    for tensor in source.tensors:
        row = source.settings.layers.index(tensor.layer)
        matrices = list(source.matrices(tensor))
        shared = matrices.pop(0) if source.settings.shared_expert else torch.zeros_like(matrices[0])
        routed = sum(a * w for a, w in zip(alpha_LN[row], matrices, strict=True))
        found[tensor.dense] = shared_L[row] * shared + (1 - shared_L[row]) * routed
    return found


def brute_loss(merged: MergedModel, pairs: Sequence[EncodedPair], weights: dict[str, Tensor]) -> Tensor:
    """Mean Bradley-Terry loss, one unpadded text at a time."""

    def one(text: Encoded) -> Tensor:
        inputs = {"input_ids": torch.tensor([text.ids])}
        return functional_call(merged.model, weights, (), inputs).logits[0, 0]

    return -sum(logsigmoid(one(pair.chosen) - one(pair.rejected)) for pair in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("family", "shared_expert", "layers"),
    [("llama", True, "all"), ("llama", False, "1-2"), ("bert", True, "all"), ("qwen2", True, "all")],
)
def test_gradient_equals_autograd_and_finite_differences(
    family: str, shared_expert: bool, layers: str, tmp_path: Path
) -> None:
    moe = make_moe(tmp_path / "moe", family, torch.float64, shared_expert=shared_expert, layers=layers)
    source, pairs = MoeCheckpoint(moe), encode(moe, random_pairs(7, seed=5), tmp_path)
    count = len(source.settings.layers)
    logits_LN = ALPHA[:count].log().requires_grad_()
    shared_logit_L = SHARED[:count].logit().requires_grad_()
    scale = 1.0 if shared_expert else 0.0

    def point() -> tuple[Tensor, Tensor]:
        return logits_LN.softmax(1), scale * shared_logit_L.sigmoid()

    alpha_LN, shared_L = point()
    merged = MergedModel(source, alpha_LN.detach(), shared_L.detach(), dtype=torch.float64)
    widen_norms(merged.model)
    loss = brute_loss(merged, pairs, merged_by_autograd(source, alpha_LN, shared_L))
    expected = torch.autograd.grad(loss, [logits_LN, shared_logit_L])

    ours = gradient_of(merged, pairs, 3)
    assert ours.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    alpha_LN, shared_L = point()
    linear = (alpha_LN * ours.alpha_LN).sum() + (shared_L * ours.shared_L).sum()
    found = torch.autograd.grad(linear, [logits_LN, shared_logit_L])
    assert expected[0].abs().max() > 1e-5
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)

    with torch.no_grad():
        for parameter, gradient in ((logits_LN, found[0]), (shared_logit_L, found[1])):
            along = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
            sides, step = [], 1e-5
            for sign in (1, -1):
                parameter += sign * step * along
                merged.merge(*point())
                sides.append(gradient_of(merged, pairs, 4).loss)
                parameter -= sign * step * along
            slope = (sides[0] - sides[1]) / (2 * step)
            assert slope == pytest.approx(float((gradient * along).sum()), rel=1e-5)


def test_micro_batches_do_not_change_the_gradient(moe: Path, tmp_path: Path) -> None:
    pairs = encode(moe, random_pairs(8, seed=6), tmp_path)
    merged = MergedModel(MoeCheckpoint(moe), ALPHA, SHARED)
    whole, *others = (gradient_of(merged, pairs, size) for size in (8, 1, 3, 100))
    for other in others:
        assert other.loss == pytest.approx(whole.loss, rel=1e-5)
        torch.testing.assert_close(other.alpha_LN, whole.alpha_LN, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.shared_L, whole.shared_L, rtol=1e-4, atol=1e-5)


def test_no_gradient_outlives_its_hook_and_only_mlps_ask_for_one(moe: Path, tmp_path: Path) -> None:
    merged = MergedModel(MoeCheckpoint(moe), ALPHA, SHARED)
    mlps = {tensor.dense for tensor in merged.source.tensors}
    asking = {name for name, parameter in merged.model.named_parameters() if parameter.requires_grad}
    assert not asking & merged.put_off.keys() and asking | merged.put_off.keys() == mlps
    before = {name: value.clone() for name, value in merged.model.state_dict().items()}
    gradient_of(merged, encode(moe, random_pairs(4), tmp_path), 2)
    assert all(parameter.grad is None for parameter in merged.model.parameters())
    assert not any(gradient.held for gradient in merged.put_off.values())
    assert all(torch.equal(value, before[name]) for name, value in merged.model.state_dict().items())


def test_merging_there_and_back_restores_every_weight(moe: Path) -> None:
    merged = MergedModel(MoeCheckpoint(moe), ALPHA, SHARED)
    before = {name: value.clone() for name, value in merged.model.state_dict().items()}
    mlps = {tensor.dense for tensor in merged.source.tensors}
    merged.merge(ALPHA.flip(1), SHARED.flip(0))
    moved = {
        name for name, value in merged.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == mlps
    merged.merge(ALPHA, SHARED)
    assert all(torch.equal(value, before[name]) for name, value in merged.model.state_dict().items())


def test_a_planted_expert_is_found(moe: Path, planted: Path, tmp_path: Path) -> None:
    before = fingerprint(moe)["sha256"]
    folder = fit(
        model=str(moe), pairs=str(planted), output=tmp_path / "fit", initial="uniform", shared_weight=0.0,
        folds=3, micro_batch_size=80,
    )  # fmt: skip
    alpha_LN, report = Coefficients.load(folder).alpha_LN, report_of(folder)
    assert alpha_LN.argmax(1).tolist() == [1, 1, 1] and bool((alpha_LN[:, 1] > 0.45).all())
    for split in ("train", "held_out"):
        assert report[split]["after"]["loss"] < 0.7 * report[split]["before"]["loss"]
        assert report[split]["after"]["accuracy"] > report[split]["before"]["accuracy"]
    assert report["pairs"]["held_out"] == 240, "every pair is held out once"
    assert report["held_out"]["p"] < 0.01 and report["held_out"]["change"]["loss"]["high"] < 0
    brought = {row["layer"]: row["loss"] for row in report["sensitivity"]}
    assert brought.keys() == {"layers.0", "layers.1", "layers.2"} and max(brought.values()) > 0
    assert not report["kept_initial"] and report["verdict"] in (folder / "fit.md").read_text()
    assert read_manifest(folder)["results"]["held_out"] == report["held_out"]
    assert (folder / "alpha.png").read_bytes().startswith(b"\x89PNG")
    assert fingerprint(moe)["sha256"] == before, "fitting reads the MoE, and changes nothing"


@pytest.mark.parametrize("learning_rate", [0.2, 5.0])
def test_the_result_is_what_the_report_says_and_never_worse(
    moe: Path, planted: Path, tmp_path: Path, learning_rate: float
) -> None:
    """A usual rate, and one that throws everything about: the best held-out point is what comes out."""
    rows = [json.loads(line) for line in planted.read_text().splitlines()][:40]
    folder = fit(
        model=str(moe),
        pairs=str(planted),
        validation=str(write_rows(tmp_path / "v.jsonl", rows)),
        output=tmp_path / "fit",
        initial="uniform",
        optimizer="adam",
        learning_rate=learning_rate,
        max_epochs=2,
        shared_weight="learned",
        level=1.0,
    )
    found, report = Coefficients.load(folder), report_of(folder)
    losses = [point["held_out_loss"] for point in report["trajectory"]]
    assert report["held_out"]["after"]["loss"] == min(losses) <= losses[0]
    assert report["kept_initial"] == (min(losses) == losses[0])
    merged = MergedModel(MoeCheckpoint(moe), found.alpha_LN, found.shared_L)
    pairs = encode(moe, rows, tmp_path)
    margins_P = objective_of(merged, pairs).measure(found.alpha_LN, found.shared_L, "held_out").margins_P
    assert float(-logsigmoid(margins_P).mean()) == pytest.approx(min(losses), rel=1e-5)


def test_same_seed_same_result_whatever_the_micro_batch(moe: Path, planted: Path, tmp_path: Path) -> None:
    options = {
        "model": str(moe),
        "pairs": str(planted),
        "initial": "uniform",
        "max_epochs": 1,
        "seed": 4,
        "optimizer": "adam",
    }
    folders = [fit(**options, output=tmp_path / str(n), micro_batch_size=n) for n in (8, 3)]
    again = fit(**options, output=tmp_path / "again", micro_batch_size=8)
    first, second, third = (Coefficients.load(folder).alpha_LN for folder in (*folders, again))
    assert torch.equal(first, third)
    torch.testing.assert_close(first, second, rtol=0.0, atol=1e-4)


def fitting(moe: Path, planted: Path, more: str, output: Path) -> list[str]:
    given = ["--model", str(moe), "--pairs", str(planted), "--initial", "uniform", "--threads", "1"]
    return ["fit", *given, *more.split(), "--output", str(output)]


def well(done: list[Ended], ours: Path, theirs: Path) -> None:
    """Both processes ended well, one told, and they found what one process found."""
    assert {one.code for one in done} == {0}, [one.err[-3000:] for one in done]
    assert [bool(one.out) for one in done] in ([True, False], [True]), "one process tells"
    alphas = [Coefficients.load(folder).alpha_LN for folder in (ours, theirs)]
    assert not torch.equal(alphas[0], torch.full_like(alphas[0], 1 / N))
    torch.testing.assert_close(alphas[0], alphas[1], rtol=0.0, atol=1e-3)
    losses = [report_of(folder)["held_out"]["after"]["loss"] for folder in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("start", [ranks, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_fit_what_one_does(
    start: Callable[[list[str]], list[Ended]], moe: Path, planted: Path, tmp_path: Path
) -> None:
    """Each process has half of the pairs, both get the same sums, one writes."""
    how = "--max-epochs 4 --level 1"
    done = start(fitting(moe, planted, how, tmp_path / "two"))
    cli.main(fitting(moe, planted, how, tmp_path / "one"), standalone_mode=False)
    well(done, tmp_path / "one", tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def at_a_point(kind: type[MergedModel], moe: Path, pairs: list[EncodedPair]) -> list[Tensor]:
    """Loss and gradient of five pairs in batches of two, margins and losses of all, by all objectives."""
    merged = kind.at_average(MoeCheckpoint(moe), "cpu")
    wanted = {"bradley_terry": 1.0, "distillation": 0.5, "alignment": 0.5}
    objective = objective_of(merged, pairs, 2, objectives=wanted)
    gradient = objective.gradient(ALPHA, SHARED, range(5))
    measured = objective.measure(ALPHA, SHARED, "held_out")
    return [torch.tensor(gradient.loss), gradient.alpha_LN, gradient.shared_L, *vars(measured).values()]


def test_a_model_in_parts_fits_what_the_whole_one_does(moe: Path, planted: Path, tmp_path: Path) -> None:
    """Each of two processes has half of each weight; of the five pairs one has two batches, the other one."""
    pairs = encode(moe, random_pairs(7, seed=5), tmp_path)

    def first(rank: int) -> None:
        own_device("cpu")
        torch.save(at_a_point(PartedModel, moe, pairs), tmp_path / f"{rank}.pt")

    how = "--max-epochs 1 --max-pairs 24 --level 1 --no-sensitivity"
    done = ranks(fitting(moe, planted, f"{how} --sharded", tmp_path / "two"), first)
    cli.main(fitting(moe, planted, how, tmp_path / "one"), standalone_mode=False)
    well(done, tmp_path / "one", tmp_path / "two")
    whole = at_a_point(MergedModel, moe, pairs)
    for rank in range(2):
        for ours, theirs in zip(whole, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


def test_one_process_has_no_parts(moe: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="sharded needs several processes"):
        PartedModel.at_average(MoeCheckpoint(moe), "cpu")


def test_max_pairs_draws_fitting_pairs(moe: Path, planted: Path, tmp_path: Path) -> None:
    folder = fit(
        model=str(moe), pairs=str(planted), output=tmp_path / "fit", max_pairs=40, max_epochs=1,
        sensitivity=False,
    )  # fmt: skip
    counts, rows = report_of(folder)["pairs"], read_manifest(folder)["results"]["rows"]["pairs"]
    assert counts["train"] + counts["held_out"] == rows["kept"] == 40 == rows["total"] - rows["not_drawn"]


def test_usage_and_match_take_what_routing_saw(moe: Path, routing: Path, tmp_path: Path) -> None:
    folder = fit(
        model=str(moe), routing=str(routing), output=tmp_path / "f", method="usage", shared_weight="match"
    )
    found, seen = Coefficients.load(folder), RoutingStatistics.load(routing)
    assert torch.equal(found.alpha_LN, seen.gate_mass_LN())
    assert torch.equal(found.shared_L, seen.shared_mass_L())
    assert found.meta["method"] == "usage" and len(found.meta["model"]) == 64


def test_without_a_shared_expert_its_weight_is_zero(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", shared_expert=False)
    found = Coefficients.load(
        fit(model=str(moe), output=tmp_path / "f", method="uniform", shared_weight="match")
    )
    assert found.shared_L.tolist() == [0.0] * 3


def test_faults_are_refused_with_a_remedy(moe: Path, routing: Path, planted: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], word: str, **options: Any) -> None:
        with pytest.raises(kind, match=word):
            fit(model=str(moe), output=tmp_path / "f", **options)
        assert list(tmp_path.iterdir()) == files, "a refused stage leaves nothing behind"

    files = list(tmp_path.iterdir())
    refused(OptionError, "did you mean 'uniform'", method="uniforn")
    refused(OptionError, "routing statistics are needed", method="usage")
    refused(OptionError, "routing statistics are needed", initial="usage", pairs=str(planted))
    refused(OptionError, "routing statistics are needed", method="uniform", shared_weight="match")
    refused(OptionError, "preference pairs", method="learned", routing=str(routing))
    refused(OptionError, "shared_weight learned", method="uniform", shared_weight="learned")
    refused(OptionError, "outside", method="uniform", shared_weight=1.5)
    refused(CheckpointError, "cannot be read", method="usage", routing=str(moe))
    with pytest.raises(CheckpointError, match="not a MoE"):
        fit(model=str(moe.parent / "dense-moe"), output=tmp_path / "f", method="uniform")


def test_statistics_of_another_model_are_refused(moe: Path, routing: Path, tmp_path: Path) -> None:
    for change in ({"layers": "1-2"}, {}):
        other = make_moe(tmp_path / f"moe{len(change)}", **change)
        rewrite(other, lambda name, tensor: tensor + 1 if "score" in name else tensor)
        with pytest.raises(CheckpointError, match="another model"):
            fit(model=str(other), routing=str(routing), output=tmp_path / "f", method="usage")


def test_held_out_prompts_are_nowhere_else() -> None:
    def pair(prompt: str, row: int) -> EncodedPair:
        return EncodedPair(Encoded([1], 0), Encoded([2], 0), Pair(prompt, f"c{row}", "r", row=row))

    pairs = [pair(f"p{row % 10}", row) for row in range(40)]
    for seed in range(5):
        train, held_out = ([pairs[n] for n in side] for side in hold_out(pairs, 0.3, seed))
        assert len(held_out) == 12 and sorted(p.pair.row for p in train + held_out) == list(range(40))
        assert not {p.pair.prompt for p in train} & {p.pair.prompt for p in held_out}
    assert hold_out(pairs, 0.3, 1) == hold_out(pairs, 0.3, 1) != hold_out(pairs, 0.3, 2)
    few = [pair("", 0), pair("", 1)]
    assert [len(side) for side in hold_out(few, 0.99, 0)] == [1, 1], "without a prompt each row stands alone"
    with pytest.raises(DataError, match="held out"):
        hold_out(pairs[:1], 0.3, 0)

"""Coefficients and the ways to find them: searches whose answer is known, values by hand, files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_moe import ALPHA, SHARED, K, N
from torch import Tensor
from torch.nn.functional import logsigmoid

from moemerge.errors import CheckpointError
from moemerge.fitting.initial import initial_coefficients
from moemerge.fitting.methods import METHODS
from moemerge.fitting.problem import FitOutcome, FitProblem, Measured, mean_of
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import MergeGradient
from moemerge.models.routing import RoutingStatistics, Sums
from moemerge.options.fit import FitSettings


@dataclass
class Bowl:
    """Margins that fall with the squared distance from `best_LN`: a known optimum, equal on both splits."""

    best_LN: Tensor
    height: float = 3.0
    num_train: int = 20
    seen: list[list[int]] = field(default_factory=list)

    def margins(self, alpha_LN: Tensor, shared_L: Tensor, split: str) -> Tensor:
        return (self.height - 10 * ((alpha_LN - self.best_LN) ** 2).sum()).expand(self.num_train)

    def measure(self, alpha_LN: Tensor, shared_L: Tensor, split: str) -> Measured:
        margins_P = self.margins(alpha_LN, shared_L, split)
        return Measured(margins_P, -logsigmoid(margins_P))

    def prompts(self, split: str) -> list[int]:
        return list(range(self.num_train))

    def gradient(
        self, alpha_LN: Tensor, shared_L: Tensor, rows: Sequence[int], weights: Tensor | None = None
    ) -> MergeGradient:
        self.seen.append(list(rows))
        alpha_LN = alpha_LN.clone().requires_grad_()
        loss = -logsigmoid(self.margins(alpha_LN, shared_L, "train")).mean()
        loss.backward()
        return MergeGradient(loss.item(), alpha_LN.grad, torch.zeros_like(shared_L))

    def folds(self, number: int, seed: int) -> list[Bowl]:
        return [self] * number

    def hardened(self, alpha_LN: Tensor, shared_L: Tensor) -> Bowl:
        return self


def problem(objective: Bowl | None = None, seed: int = 0, **settings: Any) -> FitProblem:
    # The bowl's scores grow as its loss falls: all that is learned of it is louder, so the plain loss judges.
    wanted = FitSettings(
        **{
            "initial": "uniform",
            "judge": "preferences",
            "optimizer": "adam",
            "batch_size": 8,
            "max_epochs": 40,
            **settings,
        }
    )
    make = None if objective is None else lambda: objective
    return FitProblem(["layers.0", "layers.1", "layers.2"], N, True, wanted, seed, objective=make)


def test_learned_finds_the_optimum() -> None:
    found = METHODS.get("learned")(problem(Bowl(ALPHA), learning_rate=0.1, patience=20))
    torch.testing.assert_close(found.alpha_LN, ALPHA, rtol=0.0, atol=0.02)
    torch.testing.assert_close(found.alpha_LN.sum(1), torch.ones(3, dtype=torch.float64))
    assert not found.report["kept_initial"]
    assert found.shared_L.tolist() == [0.5] * 3
    moved = found.report["moved"][1]
    assert moved["l1"] == pytest.approx(float((found.alpha_LN[1] - 1 / 3).abs().sum()))
    assert moved["total_variation"] == moved["l1"] / 2


def test_the_start_is_kept_when_nothing_beats_it() -> None:
    uniform_LN = torch.full((3, N), 1 / N, dtype=torch.float64)
    bowl = Bowl(uniform_LN)
    bowl.gradient = lambda alpha_LN, shared_L, rows, weights: MergeGradient(1.0, ALPHA - 0.3, torch.zeros(3))
    found = METHODS.get("learned")(problem(bowl, patience=2, evals_per_epoch=1))
    assert torch.equal(found.alpha_LN, uniform_LN)
    assert found.report["kept_initial"] and "kept" in found.report["verdict"]
    assert found.report["passes"] == 2, "two evaluations without progress, then stop"
    assert found.report["held_out"]["before"] == found.report["held_out"]["after"]


def test_each_epoch_sees_every_pair_once_and_the_seed_decides_the_order() -> None:
    runs = [Bowl(ALPHA), Bowl(ALPHA), Bowl(ALPHA)]
    outcomes = [
        METHODS.get("learned")(problem(b, s, max_epochs=2)) for b, s in zip(runs, (0, 0, 1), strict=True)
    ]
    epoch = [row for rows in runs[0].seen[:3] for row in rows]
    assert sorted(epoch) == list(range(20)) and [len(rows) for rows in runs[0].seen[:3]] == [8, 8, 4]
    assert runs[0].seen == runs[1].seen != runs[2].seen
    assert torch.equal(outcomes[0].alpha_LN, outcomes[1].alpha_LN)


def test_kl_pulls_towards_the_start() -> None:
    free, tied, fast = (METHODS.get("learned")(problem(Bowl(ALPHA), kl=kl)) for kl in (0.0, 0.5, 50.0))
    moved = [sum(one["l1"] for one in found.report["moved"]) for found in (free, tied, fast)]
    assert moved[0] > moved[1] > moved[2]


def test_a_learned_shared_weight_moves_and_others_do_not() -> None:
    def towards_shared(
        alpha_LN: Tensor, shared_L: Tensor, rows: Sequence[int], weights: Tensor | None
    ) -> MergeGradient:
        return MergeGradient(1.0, torch.zeros_like(alpha_LN), -torch.ones_like(shared_L))

    for setting, moves in (("learned", True), (0.25, False)):
        bowl = Bowl(ALPHA)
        bowl.gradient = towards_shared
        bowl.margins = lambda alpha_LN, shared_L, split: shared_L.mean().expand(20)
        found = METHODS.get("learned")(problem(bowl, shared_weight=setting, max_epochs=5))
        assert bool((found.shared_L > 0.6).all()) if moves else found.shared_L.tolist() == [0.25] * 3
        assert torch.equal(found.alpha_LN, torch.full_like(ALPHA, 1 / N))


def hand_made_statistics() -> RoutingStatistics:
    sums = Sums.zeros(3, N)
    sums.gate_LN += torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    sums.shared_L += torch.tensor([1.0, 2.0, 3.0])
    sums.tokens_L += 4
    return RoutingStatistics([0, 1, 2], N, K, {("", "chosen"): sums})


def test_uniform_usage_and_match_by_hand() -> None:
    base = problem(shared_weight="match")
    base = FitProblem(base.blocks, N, True, base.settings, statistics=hand_made_statistics())
    assert METHODS.get("uniform")(base).alpha_LN.tolist() == [[1 / 3] * 3] * 3
    found = METHODS.get("usage")(base)
    torch.testing.assert_close(
        found.alpha_LN,
        torch.tensor([[0.75, 0.25, 0.0], [0.25, 0.25, 0.5], [1 / 3] * 3], dtype=torch.float64),
    )
    assert found.shared_L.tolist() == [0.25, 0.5, 0.75]
    alone = FitProblem(base.blocks, N, False, base.settings)
    assert METHODS.get("uniform")(alone).shared_L.tolist() == [0.0] * 3


def fragile_row(copies: int) -> Tensor:
    """A row of alpha of which the mean of so many copies is another row, in the last bit."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        row_N = torch.rand(N, generator=generator, dtype=torch.float64).softmax(0)
        if not torch.equal(row_N.expand(copies, N).mean(0), row_N):
            return row_N
    pytest.fail("the mean of equal rows is each of them here, always")


def test_equal_rows_stay_as_they_are_where_all_blocks_share_one() -> None:
    row_N = fragile_row(3)
    base = problem(granularity="global", shared_weight="learned")
    given = FitOutcome(row_N.expand(3, N), row_N[:1].expand(3))
    found = initial_coefficients(replace(base, start=given))
    assert torch.equal(found.alpha_LN, given.alpha_LN) and torch.equal(found.shared_L, given.shared_L)
    bowl = Bowl(ALPHA)
    asked = {"granularity": "global", "method": "grid", "grid": [0.5]}
    chosen = METHODS.get("grid")(replace(problem(bowl, **asked), start=given))
    assert torch.equal(chosen.alpha_LN, given.alpha_LN)


def test_the_mean_of_unequal_rows_is_their_mean() -> None:
    values_LN = torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.5, 0.5]], dtype=torch.float64)
    assert mean_of(values_LN).tolist() == [0.5, 0.5]
    assert mean_of(torch.tensor([0.25, 0.5])).item() == 0.375


def test_what_is_learned_is_the_best_point_itself_also_if_all_folds_agree() -> None:
    """The coefficients whose held-out loss decided, not ones that were normalised or averaged again."""
    measured: list[Tensor] = []

    class Noting(Bowl):
        def measure(self, alpha_LN: Tensor, shared_L: Tensor, split: str) -> Measured:
            measured.append(alpha_LN.clone())
            return super().measure(alpha_LN, shared_L, split)

        def folds(self, number: int, seed: int) -> list[Bowl]:
            return [Bowl(self.best_LN)] * number

    for seed in range(20):
        measured.clear()
        best_LN = torch.randn(3, N, generator=torch.Generator().manual_seed(seed)).double().softmax(1)
        settings = {"learning_rate": 0.1, "max_epochs": 5, "sensitivity": False}
        alone = METHODS.get("learned")(problem(Noting(best_LN), seed, **settings))
        assert not alone.report["kept_initial"]
        on_the_way = measured[:-2]  # the last two are the report's
        assert any(torch.equal(alpha_LN, alone.alpha_LN) for alpha_LN in on_the_way)
        together = METHODS.get("learned")(problem(Noting(best_LN), seed, folds=3, **settings))
        assert torch.equal(together.alpha_LN, alone.alpha_LN)


def test_an_unused_expert_can_come_back() -> None:
    """Expert 2 of layer 0 has no gate mass, but the optimum gives it some."""
    best_LN = torch.tensor([[0.3, 0.1, 0.6], [0.25, 0.25, 0.5], [1 / 3] * 3], dtype=torch.float64)
    base = problem(Bowl(best_LN), initial="usage", learning_rate=0.3, patience=50)
    base = FitProblem(base.blocks, N, True, base.settings, 0, hand_made_statistics(), base.objective)
    assert METHODS.get("learned")(base).alpha_LN[0, 2] > 0.5


def test_coefficients_save_and_load_exactly(tmp_path: Path) -> None:
    path = Coefficients.of_layers([0, 2, 5], ALPHA, SHARED, {"method": "learned", "model": "abc"}).save(
        tmp_path / "c"
    )
    for source in (path, path.parent, str(path.parent)):
        again = Coefficients.load(source)
        assert (
            again.blocks == ["layers.0", "layers.2", "layers.5"]
            and again.meta.items() >= {"method": "learned", "model": "abc"}.items()
        )
        assert torch.equal(again.alpha_LN, ALPHA) and torch.equal(again.shared_L, SHARED)
    table = json.loads((path.parent / "coefficients.json").read_text())
    assert table["blocks"][1] == {"block": "layers.2", "shared": 0.5, "alpha": [0.6, 0.1, 0.3]}
    header = path.read_bytes()[:600].decode(errors="replace")
    assert '"blocks":"[\\"layers.0\\"' in header and '"method":"learned"' in header


@pytest.mark.parametrize(
    ("layers", "alpha_LN", "shared_L"),
    [
        ([0, 1, 2], ALPHA * 1.01, SHARED),
        ([0, 1, 2], ALPHA - torch.tensor([0.15, 0.0, -0.15]), SHARED),
        ([0, 1, 2], ALPHA.where(ALPHA < 0.6, math.nan), SHARED),
        ([0, 1, 2], ALPHA, SHARED + 0.5),
        ([0, 1, 2], ALPHA, SHARED[:2]),
        ([0, 1, 2], ALPHA[0], SHARED),
        ([0, 1, 2], ALPHA.float(), SHARED),
        ([0, 1], ALPHA, SHARED),
        ([0, 1, 1], ALPHA, SHARED),
        ([], ALPHA[:0], SHARED[:0]),
    ],
)
def test_unusable_coefficients_are_refused(layers: list[int], alpha_LN: Tensor, shared_L: Tensor) -> None:
    with pytest.raises(CheckpointError, match="cannot be used"):
        Coefficients.of_layers(layers, alpha_LN, shared_L)


def test_damaged_coefficient_files_are_refused(tmp_path: Path) -> None:
    path = Coefficients.of_layers([0, 1, 2], ALPHA, SHARED).save(tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-8], whole.replace(b"coefficients 2", b"coefficients 9")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be read"):
            Coefficients.load(tmp_path)
    path.write_bytes(whole[:-8] + b"\x00" * 6 + b"\xf8\x7f")
    with pytest.raises(CheckpointError, match="not finite"):
        Coefficients.load(tmp_path)

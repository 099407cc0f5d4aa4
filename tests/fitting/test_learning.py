"""Learning coefficients, against answers known beforehand: gradients, planted optima, noise, over-fitting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
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
from tiny_models import save_dense
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import linear, logsigmoid

from moemerge.data.pairs import CandidateSet
from moemerge.data.tokenise import Encoded, EncodedCandidates, EncodedPair
from moemerge.errors import CheckpointError, DataError, OptionError
from moemerge.fitting.gram import output_grams
from moemerge.fitting.methods import METHODS
from moemerge.fitting.methods.least_squares import on_simplex
from moemerge.fitting.objectives.base import Term
from moemerge.fitting.pair_objective import PairObjective, overrated
from moemerge.fitting.problem import FitOutcome, FitProblem, Measured
from moemerge.fitting.significance import chance, paired
from moemerge.fitting.space import space_of
from moemerge.fitting.splits import fold
from moemerge.fitting.targets import Targets, pair_gate_mass
from moemerge.fitting.trajectory import BACK
from moemerge.merging import merged_model
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import Answers, MergedModel, MergeGradient
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.modelling import load_moe
from moemerge.options.fit import FitSettings
from moemerge.stages.fit import fit

L = 3


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoE in float64."""
    return make_moe(tmp_path_factory.mktemp("learn") / "moe", dtype=torch.float64)


def double(source: MoeCheckpoint, per_matrix: bool = False, **options: Any) -> MergedModel:
    """The source merged in float64 at uneven coefficients."""
    blocks = source.blocks(per_matrix)
    generator = torch.Generator().manual_seed(0)
    alpha_LN = torch.rand(len(blocks), N, generator=generator, dtype=torch.float64).softmax(1)
    shared_L = torch.rand(len(blocks), generator=generator, dtype=torch.float64)
    merged = MergedModel(source, alpha_LN, shared_L, dtype=torch.float64, blocks=blocks, **options)
    widen_norms(merged.model)
    return merged


def with_margins(pairs: list[EncodedPair]) -> list[EncodedPair]:
    """The pairs with a column margin."""
    for number, pair in enumerate(pairs):
        object.__setattr__(pair.pair, "margin", 0.1 * number - 0.2)
    return pairs


def averaged(merged: MergedModel, alpha_LN: Tensor, shared_L: Tensor) -> dict[str, Tensor]:
    """The merged tensors as a plain differentiable sum."""
    found = {}
    for tensor in merged.source.tensors:
        row, (shared, *members) = merged.rows[tensor.dense], merged.source.matrices(tensor)
        routed = sum(a * w for a, w in zip(alpha_LN[row], members, strict=True))
        found[tensor.dense] = shared_L[row] * shared + (1 - shared_L[row]) * routed
    return found


def brute_answers(merged: MergedModel, pairs: Sequence[EncodedPair], weights: dict[str, Tensor]) -> Answers:
    """One unpadded text at a time; states by the base model's own output."""

    def one(text: Encoded) -> tuple[Tensor, Tensor]:
        out = functional_call(
            merged.model, weights, (), {"input_ids": torch.tensor([text.ids]), "output_hidden_states": True}
        )
        return out.logits[0, 0], out.hidden_states[-1][0, -1]

    found = [(one(pair.chosen), one(pair.rejected)) for pair in pairs]
    margins_P = torch.stack([chosen[0] - rejected[0] for chosen, rejected in found])
    states = [torch.stack([pair[side][1] for pair in found]) for side in (0, 1)]
    return Answers(margins_P, torch.stack(states))


def brute_loss(targets: Targets, answers: Answers) -> Tensor:
    """The mean loss of the objectives, written out."""
    s, d_P, total = targets.settings, answers.margins_P, torch.zeros(())
    if "bradley_terry" in s.objectives:
        column_P = torch.tensor([p.pair.margin or 0.0 for p in targets.pairs])
        m_P = {"none": 0, "column": column_P, "strength": targets.teacher_P}[s.margin]
        e, x_P = s.label_smoothing, d_P - m_P
        bt_P = (1 - e) * torch.log1p(torch.exp(-x_P)) + e * torch.log1p(torch.exp(x_P))
        total = total + s.objectives["bradley_terry"] * bt_P.mean()
    if "distillation" in s.objectives:
        total = total + s.objectives["distillation"] * ((d_P - targets.teacher_P) ** 2).mean()
    if "alignment" in s.objectives:
        own = targets.of_owners
        states = ((answers.states_2PD - own.states_2PD) ** 2).mean() / (own.states_2PD**2).mean()
        scores = ((d_P - own.margins_P) ** 2).mean() / (own.margins_P**2).mean()
        total = total + s.objectives["alignment"] * (states + scores)
    return total


OBJECTIVES_TO_TRY = [
    {"label_smoothing": 0.2},
    {"margin": "column"},
    {"margin": "strength"},
    {"objectives": {"distillation": 1.0}},
    {"objectives": {"alignment": 0.5}},
    {"objectives": {"bradley_terry": 1.0, "distillation": 0.3, "alignment": 0.2}, "label_smoothing": 0.1},
]


@pytest.mark.parametrize(
    ("settings", "granularity"),
    [
        *((settings, "layer") for settings in OBJECTIVES_TO_TRY),
        *((OBJECTIVES_TO_TRY[-1], granularity) for granularity in ("matrix", "group", "global")),
        *(
            pytest.param(settings, granularity, marks=pytest.mark.slow)
            for settings in OBJECTIVES_TO_TRY[:-1]
            for granularity in ("matrix", "group", "global")
        ),
    ],
    ids=str,
)
def test_gradients_of_every_objective_and_granularity(
    moe: Path, tmp_path: Path, settings: dict[str, Any], granularity: str
) -> None:
    """Against autograd through the merge, and against finite differences of the loss."""
    source = MoeCheckpoint(moe)
    per_matrix = granularity in ("matrix", "group")
    merged = double(source, per_matrix)
    pairs = with_margins(encode(moe, random_pairs(5, seed=5), tmp_path))
    wanted = FitSettings(granularity=granularity, shared_weight="learned", kl=0.01, l2=0.02, **settings)
    blocks = source.blocks(per_matrix)
    problem = FitProblem(blocks, N, True, wanted, kinds=source.kinds(blocks))
    space = space_of(problem, FitOutcome(merged.alpha_LN[:1].expand_as(merged.alpha_LN), merged.shared_L))
    generator = torch.Generator().manual_seed(1)
    v_V = space.start_V + 0.3 * torch.randn(space.start_V.shape, generator=generator, dtype=torch.float64)
    assert len(v_V) == {"layer": L, "matrix": 3 * L, "group": 1, "global": 1}[granularity] * (N + 1)

    objective = objective_of(merged, pairs, 2, **settings)

    def at(v_V: Tensor) -> tuple[float, Tensor]:
        alpha_LN, shared_L = (part.clone() for part in space.point(v_V))
        return space.gradient(v_V, objective.gradient(alpha_LN, shared_L, range(5)))

    loss, gradient_V = at(v_V)
    targets = Targets(merged, source.tokenizer(), pairs, wanted)
    free_V = v_V.clone().requires_grad_()
    brute = brute_loss(targets, brute_answers(merged, pairs, averaged(merged, *space.point(free_V))))
    brute = brute + space.pull(free_V)
    assert loss == pytest.approx(float(brute.detach()), rel=1e-9)
    expected_V = torch.autograd.grad(brute, free_V)[0]
    torch.testing.assert_close(gradient_V, expected_V, rtol=1e-7, atol=1e-9)
    along_V = torch.randn(v_V.shape, generator=generator, dtype=torch.float64)
    slope = (at(v_V + 1e-5 * along_V)[0] - at(v_V - 1e-5 * along_V)[0]) / 2e-5
    assert slope == pytest.approx(float(gradient_V @ along_V), rel=1e-4)


def test_losses_measured_are_those_whose_gradient_is_taken(moe: Path, tmp_path: Path) -> None:
    merged = double(MoeCheckpoint(moe))
    pairs = with_margins(encode(moe, random_pairs(6), tmp_path))
    weights = torch.tensor([0.5, 2.0, 1.0, 1.0, 0.0, 1.5], dtype=torch.float64)
    for settings in OBJECTIVES_TO_TRY:
        objective = objective_of(merged, pairs, 4, **settings)
        alpha_LN, shared_L = merged.alpha_LN, merged.shared_L
        losses_P = objective.measure(alpha_LN, shared_L, "train").losses_P
        assert float(losses_P.mean()) == pytest.approx(
            gradient_of(merged, pairs, 3, **settings).loss, rel=1e-5
        )
        weighted = objective.gradient(alpha_LN, shared_L, range(6), weights).loss
        assert weighted == pytest.approx(float((losses_P * weights).mean()), rel=1e-5)


def soft_labels(merged: MergedModel, pairs: list[EncodedPair]) -> Term:
    """Bradley-Terry over labels drawn from the model as it is: their expectation, with no draw."""
    target_P = torch.sigmoid(torch.cat([merged.answers([pair]).margins_P for pair in pairs]).detach())

    def loss(answers: Answers, rows: Tensor) -> Tensor:
        d_B, t_B = answers.margins_P, target_P[rows]
        return -t_B * logsigmoid(d_B) - (1 - t_B) * logsigmoid(-d_B)

    return Term(loss)


def closer(name: str, tensor: Tensor) -> Tensor:
    """Routed experts nearer to their mean, so that the loss has one valley."""
    middle = tensor.mean(0, keepdim=True)
    return middle + 0.3 * (tensor - middle) if ".experts." in name else tensor


@pytest.mark.parametrize(
    ("optimizer", "shared_weight", "tolerance"),
    [
        pytest.param("lbfgs", 0.5, 0.005, marks=pytest.mark.slow),
        pytest.param("adam", 0.5, 0.03, marks=pytest.mark.slow),
        ("lbfgs", "learned_global", 0.03),
    ],
)
def test_planted_coefficients_are_recovered(
    tmp_path: Path, optimizer: str, shared_weight: Any, tolerance: float
) -> None:
    """Labels by a merge at known coefficients: these come out, from a uniform start."""
    source = MoeCheckpoint(rewrite(make_moe(tmp_path / "moe"), closer))
    planted_L = torch.full((L,), 0.4 if shared_weight == "learned_global" else 0.5, dtype=torch.float64)
    merged = MergedModel(source, ALPHA, planted_L)
    pairs = encode(source.folder, random_pairs(60, seed=8), tmp_path)
    numbers, term = list(range(60)), soft_labels(merged, pairs)
    objective = PairObjective(merged, source.tokenizer(), pairs, numbers, numbers, term, 30)
    settings = FitSettings(
        optimizer=optimizer, shared_weight=shared_weight, judge="objective", max_epochs=50, patience=30,
        learning_rate=0.15, evals_per_epoch=1, sensitivity=False,
    )  # fmt: skip
    found = METHODS.get("learned")(
        FitProblem(source.blocks(), N, True, settings, objective=lambda: objective)
    )
    assert not found.report["kept_initial"]
    torch.testing.assert_close(found.alpha_LN, ALPHA, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(found.shared_L, planted_L, rtol=0.0, atol=tolerance)


class Labels:
    """A linear model of margins over coefficients, with labels given: convex, so anything can be known of it.

    margins = signs * (features . alpha); 36 parameters over 4 blocks of 9 members, or as given.
    """

    def __init__(self, features_PLN: Tensor, signs_P: Tensor, held: int) -> None:
        self.x_PLN, self.signs_P, self.held = features_PLN, signs_P, held
        self.rows = torch.arange(len(signs_P))
        self.train, self.out = self.rows[held:], self.rows[:held]
        self.passes = 0

    @property
    def num_train(self) -> int:
        return len(self.train)

    def prompts(self, split: str) -> list[int]:
        return list(range(len(self.train if split == "train" else self.out)))

    def margins(self, alpha_LN: Tensor, rows: Tensor) -> Tensor:
        return self.signs_P[rows] * (self.x_PLN[rows] * alpha_LN).sum((1, 2))

    def measure(self, alpha_LN: Tensor, shared_L: Tensor, split: str) -> Measured:
        margins_P = self.margins(alpha_LN, self.train if split == "train" else self.out)
        return Measured(margins_P, -logsigmoid(margins_P))

    def gradient(
        self, alpha_LN: Tensor, shared_L: Tensor, rows: Sequence[int], weights: Tensor | None = None
    ) -> MergeGradient:
        alpha_LN = alpha_LN.clone().requires_grad_()
        losses_P = -logsigmoid(self.margins(alpha_LN, self.train[list(rows)]))
        loss = (losses_P if weights is None else losses_P * weights).mean()
        return MergeGradient(
            float(loss.detach()), *torch.autograd.grad(loss, alpha_LN), torch.zeros(len(alpha_LN))
        )

    def folds(self, number: int, seed: int) -> list[Labels]:
        found = []
        for part in range(number):
            one = Labels(self.x_PLN, self.signs_P, 0)
            one.out, one.train = self.rows[part::number], self.rows[self.rows % number != part]
            found.append(one)
        return found

    def hardened(self, alpha_LN: Tensor, shared_L: Tensor) -> Labels:
        return self


def labelled(seed: int, alpha_LN: Tensor | None, pairs: int, held: int, members: int = 9) -> Labels:
    """Random features; labels drawn by `alpha_LN`, or by a coin if there is none."""
    generator = torch.Generator().manual_seed(seed)
    x_PLN = 3 * torch.randn(pairs, 4, members, generator=generator, dtype=torch.float64)
    margin_P = torch.zeros(pairs) if alpha_LN is None else (x_PLN * alpha_LN).sum((1, 2))
    signs_P = (torch.rand(pairs, generator=generator) < torch.sigmoid(margin_P)).double() * 2 - 1
    return Labels(x_PLN, signs_P, held)


def fitted(objective: Labels, seed: int = 0, **settings: Any) -> FitOutcome:
    members = objective.x_PLN.shape[2]
    blocks = [f"layers.{number}" for number in range(4)]
    problem = FitProblem(blocks, members, False, FitSettings(**settings), seed, objective=lambda: objective)
    return METHODS.get("learned")(problem)


def test_noise_leaves_the_initial_coefficients(tmp_path: Path) -> None:
    """Coin-flip labels: a start that is moved is an error, whose rate the level bounds."""
    moved = [not fitted(labelled(seed, None, 256, 77), seed).report["kept_initial"] for seed in range(40)]
    assert sum(moved) <= 5, "5 % of 40, and three standard deviations"
    best = [fitted(labelled(seed, None, 256, 77), level=1.0).report["best_point"] > 0 for seed in range(40)]
    assert sum(best) >= 10, "without the test many would move: the best of many points often looks better"


@pytest.mark.parametrize("judge", ["calibrated", "preferences", "accuracy"])
def test_the_verdict_tells_the_loss_that_decides_and_how_that_one_changed(judge: str) -> None:
    """Each by itself: calibrated by scipy; an interval of the loss as it is would tell of another thing."""
    hot_LN = torch.full((4, 9), 1 / 9, dtype=torch.float64)
    hot_LN[:, 0] = 2.0
    data = labelled(3, hot_LN, 256, 77)
    found = fitted(data, judge=judge, level=1.0)
    told, plain = found.report["held_out"]["judged"], found.report["held_out"]["change"]["loss"]
    held = data.out
    starts_LN = torch.full((4, 9), 1 / 9, dtype=torch.float64)
    values = [judged_by_hand(data.margins(at, held), judge) for at in (starts_LN, found.alpha_LN)]
    assert [told["before"], told["after"]] == pytest.approx(values, abs=1e-6)
    assert told["change"] == pytest.approx(values[1] - values[0], abs=1e-6)
    assert told["low"] < told["change"] < told["high"]
    assert (abs(told["change"] - plain["change"]) < 1e-9) == (judge == "preferences")
    said = f"from {values[0]:.4f} to {values[1]:.4f} (change {told['change']:+.4f}, 95 % interval"
    assert said in found.report["verdict"]


def judged_by_hand(margins_P: Tensor, judge: str) -> float:
    margins = margins_P.numpy()
    if judge == "accuracy":
        return float((margins <= 0).mean())

    def loss(slope: float) -> float:
        return float(np.logaddexp(0, -slope * margins).mean())

    return loss(1.0) if judge == "preferences" else float(minimize_scalar(loss, bounds=(0, 100)).fun)


def test_overfitting_36_parameters_to_256_pairs_is_caught() -> None:
    """The truth is the start: an endless walk ends far from it; the default never leaves it for worse."""
    truth_LN = torch.full((4, 9), 1 / 9, dtype=torch.float64)
    fresh = labelled(99, truth_LN, 4000, 0)
    best = -logsigmoid(fresh.margins(truth_LN, fresh.rows)).mean().item()
    rises, harms = [], []
    for seed in range(5):
        data = labelled(seed, truth_LN, 256, 77)
        walk = fitted(data, level=1.0, patience=1000, max_epochs=200).report["trajectory"][: -len(BACK)]
        assert walk[-1]["train_loss"] < walk[1]["train_loss"] - 0.03
        rises.append(walk[-1]["held_out_loss"] - walk[0]["held_out_loss"])
        found = fitted(data)
        harms.append(-logsigmoid(fresh.margins(found.alpha_LN, fresh.rows)).mean().item() - best)
    assert sum(rises) / 5 > 0.1, "this is over-fitting"
    assert max(harms) < 0.01


@pytest.mark.slow
def test_optimisers_agree_on_a_convex_toy() -> None:
    generator = torch.Generator().manual_seed(3)
    truth_LN = torch.randn(4, 3, generator=generator, dtype=torch.float64).softmax(1)
    data = labelled(1, truth_LN, 600, 200, members=3)
    common = {"judge": "objective", "patience": 1000, "sensitivity": False, "level": 1.0, "l2": 0.001}
    data.out = data.train
    found = {
        name: fitted(data, optimizer=name, max_epochs=epochs, **common)
        for name, epochs in (("lbfgs", 100), ("adam", 100), ("cma", 200))
    }
    losses = {name: one.report["held_out"]["after"]["loss"] for name, one in found.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-3
    torch.testing.assert_close(found["lbfgs"].alpha_LN, found["cma"].alpha_LN, rtol=0.0, atol=0.02)
    passes = {name: one.report["passes"] for name, one in found.items()}
    assert passes["lbfgs"] <= passes["adam"] <= passes["cma"]
    runs = [fitted(data, seed, optimizer="cma", max_epochs=15, **common).alpha_LN for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2]), "the seed decides"


def test_global_coefficients_are_one_row_and_folds_average() -> None:
    truth_LN = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64).repeat(4, 1)
    data = labelled(5, truth_LN, 400, 120, members=3)
    found = fitted(data, granularity="global", folds=4)
    assert bool((found.alpha_LN == found.alpha_LN[0]).all()) and found.alpha_LN[0, 2] > 0.6
    assert found.report["pairs"]["held_out"] == 400, "every pair is held out once"
    torch.testing.assert_close(found.alpha_LN.sum(1), torch.ones(4, dtype=torch.float64))


def test_hard_pairs_gain_weight_in_each_round() -> None:
    truth_LN = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).repeat(4, 1)
    data = labelled(6, truth_LN, 300, 100, members=3)
    seen: list[Tensor | None] = []
    plain = data.gradient

    def watched(
        alpha_LN: Tensor, shared_L: Tensor, rows: Sequence[int], weights: Tensor | None = None
    ) -> Any:
        seen.append(weights)
        return plain(alpha_LN, shared_L, rows, weights)

    data.gradient = watched
    fitted(data, robust_rounds=2, robust_temperature=0.5)
    rounds = [w for n, w in enumerate(seen) if w is not None and (n == 0 or seen[n - 1] is not w)]
    weights = [w for w in seen if w is not None]
    assert seen[0] is None and rounds and all(float(w.mean()) == pytest.approx(1) for w in weights)
    assert all(float(w.max()) > 1.5 > float(w.min()) for w in weights)


def test_the_most_overrated_candidate_meets_the_best() -> None:
    answers = [Encoded([n + 1], 0) for n in range(4)]
    candidates = CandidateSet("p", ["a", "b", "c", "d"], [0.0, 1.0, 2.0, 3.0])
    found = overrated(EncodedCandidates(answers, candidates), torch.tensor([9.0, 1.0, 2.0, 3.0]).double())
    assert found is not None and (found.pair.chosen, found.pair.rejected) == ("d", "a")
    assert (found.chosen, found.rejected) == (answers[3], answers[0])
    tied = CandidateSet("p", ["a", "b", "c", "d"], [1.0] * 4)
    assert overrated(EncodedCandidates(answers, tied), torch.arange(4).double()) is None


def test_hardening_adds_pairs_of_prompts_that_are_not_held_out(moe: Path, tmp_path: Path) -> None:
    merged = double(MoeCheckpoint(moe))
    pairs = encode(moe, random_pairs(4), tmp_path)
    held_prompt = pairs[3].pair.prompt
    sets = [
        EncodedCandidates(
            [pairs[0].chosen, pairs[1].rejected, pairs[2].chosen],
            CandidateSet(prompt, ["x", "y", "z"], [0.0, 1.0, 3.0]),
        )
        for prompt in ("another", held_prompt)
    ]
    for gold in ([3.0, 1.0, 0.0], [0.0, 3.0, 1.0]):
        sets.append(EncodedCandidates(sets[0].answers, CandidateSet("more", ["x", "y", "z"], gold)))
    base = objective_of(merged, pairs)
    objective = PairObjective(
        merged, base.tokenizer, pairs, [0, 1], [2, 3], base.term, 4, [s for s in sets if s]
    )
    harder = objective.hardened(merged.alpha_LN, merged.shared_L)
    added = [harder.pairs[number].pair.prompt for number in harder.train[2:]]
    assert added and held_prompt not in added and harder.held_out == [2, 3]
    assert len(harder.measure(merged.alpha_LN, merged.shared_L, "train").losses_P) == 2 + len(added)
    for settings in ({"objectives": {"distillation": 1.0}}, {"objectives": {"alignment": 1.0}}):
        term = objective_of(merged, pairs, 8, **settings).term
        other = PairObjective(merged, base.tokenizer, harder.pairs, harder.train, [2, 3], term, 4)
        losses_P = other.measure(merged.alpha_LN, merged.shared_L, "train").losses_P
        assert losses_P[2:].tolist() == [0.0] * len(added), "terms that need a teacher skip new pairs"


def test_chance_against_all_sign_flips() -> None:
    """Max over points of the studentised sum, over all 2^G signs, by brute force."""
    gains_KP = torch.randn(3, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.4
    gains_KP[0] = 0  # the start, against itself
    prompts = [0, 0, 1, 1, 2, 3, 4, 5, 6, 7]
    sums_KG = torch.zeros(3, 8, dtype=torch.float64).index_add_(1, torch.tensor(prompts), gains_KP)
    unit_KG = sums_KG[1:] / sums_KG[1:].norm(dim=1, keepdim=True)
    signs_RG = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)
    largest_R = (signs_RG @ unit_KG.T).max(1).values.clamp(min=0)
    for best in (1, 2):
        exact = float((largest_R >= unit_KG[best - 1].sum() - 1e-9).double().mean())
        assert chance(gains_KP, best, prompts, 0) == pytest.approx(exact, abs=0.03)
    assert chance(gains_KP, 0, prompts, 0) == 1.0


def test_paired_intervals_hold_the_change() -> None:
    before_P, shift = torch.linspace(-1, 1, 60, dtype=torch.float64), 0.3
    found = paired(before_P, before_P + shift, list(range(60)), 0)
    exact = float(logsigmoid(before_P).mean() - logsigmoid(before_P + shift).mean())
    assert found["loss"]["change"] == pytest.approx(exact)
    assert found["loss"]["low"] < exact < found["loss"]["high"] < 0 < found["accuracy"]["low"]


def test_starts(moe: Path) -> None:
    """one-hot, and coefficients given, at every granularity."""
    blocks = ["layers.0", "layers.1", "layers.2"]
    one_hot = FitSettings(method="one_hot", initial_member=1, shared_weight=0.25)
    found = METHODS.get("one_hot")(FitProblem(blocks, N, True, one_hot))
    assert found.alpha_LN.tolist() == [[0.0, 1.0, 0.0]] * 3 and found.shared_L.tolist() == [0.25] * 3
    with pytest.raises(OptionError, match="no member has this number"):
        METHODS.get("one_hot")(FitProblem(blocks, N, True, FitSettings(initial_member=N)))
    from moemerge.fitting.initial import initial_coefficients

    given = FitOutcome(ALPHA, SHARED)
    for granularity, shared, alpha_LN, shared_L in (
        ("layer", 0.5, ALPHA, [0.5] * 3),
        ("layer", "learned", ALPHA, SHARED.tolist()),
        ("global", "learned_global", ALPHA.mean(0).expand(3, N), [float(SHARED.mean())] * 3),
    ):
        settings = FitSettings(granularity=granularity, shared_weight=shared)
        found = initial_coefficients(FitProblem(blocks, N, True, settings, start=given))
        torch.testing.assert_close(found.alpha_LN, alpha_LN)
        assert found.shared_L.tolist() == pytest.approx(shared_L)


def test_members_mapped_kept_and_read_in_pieces_are_the_same(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, source = encode(moe, random_pairs(5), tmp_path), MoeCheckpoint(moe)
    monkeypatch.setattr(merged_model, "CHUNK", 100)
    mapped, kept = (double(source, keep=keep) for keep in (False, True))
    ours = [gradient_of(merged, pairs, 3) for merged in (mapped, kept)]
    monkeypatch.setattr(MoeCheckpoint, "stack", lambda self, tensor: None)
    pieces = double(source, keep=False)
    ours.append(gradient_of(pieces, pairs, 3))
    for other, merged in zip(ours[1:], (kept, pieces), strict=True):
        assert other.loss == pytest.approx(ours[0].loss, rel=1e-12)
        shift_L = (other.alpha_LN - ours[0].alpha_LN).mean(1, keepdim=True)
        torch.testing.assert_close(other.alpha_LN - shift_L, ours[0].alpha_LN, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(other.shared_L, ours[0].shared_L, rtol=1e-9, atol=1e-12)
        for name, value in mapped.model.state_dict().items():
            torch.testing.assert_close(value, merged.model.state_dict()[name], rtol=1e-12, atol=1e-14)


def test_the_teacher_is_the_moe_and_gate_mass_is_a_recount(moe: Path, tmp_path: Path) -> None:
    pairs, source = encode(moe, random_pairs(5), tmp_path), MoeCheckpoint(moe)
    targets = Targets(double(source), source.tokenizer(), pairs, FitSettings(micro_batch_size=2))
    model = load_moe(moe)
    from moemerge.models.moe import moe_layers

    for number, pair in enumerate(pairs):
        scores, mass_N = [], torch.zeros(N, dtype=torch.float64)
        for text in (pair.chosen, pair.rejected):
            gatings: list[Any] = []
            for layer in moe_layers(model).values():
                layer.observer = gatings.append
            scores.append(float(model(torch.tensor([text.ids])).logits.detach()))
            for gating in gatings:
                for token in range(len(text.ids)):
                    for expert, weight in zip(gating.index_TK[token], gating.weights_TK[token], strict=True):
                        mass_N[int(expert)] += float(weight.detach())
        assert float(targets.teacher_P[number]) == pytest.approx(scores[0] - scores[1], rel=1e-4)
        found_N = pair_gate_mass(load_moe(moe), source.tokenizer(), pairs, 2)[number]
        torch.testing.assert_close(found_N, mass_N / mass_N.sum(), rtol=1e-5, atol=1e-6)
    owners = targets.owners_PN
    assert owners.sum(1).tolist() == [1.0] * 5 and set(owners.flatten().tolist()) == {0.0, 1.0}


def test_owners_by_subset(moe: Path, tmp_path: Path) -> None:
    rows = random_pairs(4, subsets=("helpful", "harmless"))
    pairs, source = encode(moe, rows, tmp_path), MoeCheckpoint(moe)
    settings = FitSettings(owners={"helpful": 2, "harmless": 0})
    targets = Targets(double(source), source.tokenizer(), pairs, settings)
    assert targets.owners_PN.argmax(1).tolist() == [2, 0, 2, 0]
    alone = double(source)
    alone.merge(torch.eye(N, dtype=torch.float64)[2].repeat(L, 1), torch.zeros(L, dtype=torch.float64))
    states_2D = brute_answers(alone, pairs[:1], {}).states_2PD[:, 0]
    torch.testing.assert_close(targets.of_owners.states_2PD[:, 0], states_2D.detach(), rtol=1e-6, atol=1e-7)
    with pytest.raises(OptionError, match="has no owner"):
        _ = Targets(double(source), source.tokenizer(), pairs, FitSettings(owners={"helpful": 1})).owners_PN


def test_output_grams_against_outputs_written_out(moe: Path, tmp_path: Path) -> None:
    """w'Sw is the squared distance of outputs for any w; its minimum is found on the simplex."""
    rows, source = random_pairs(4, subsets=("a", "b")), MoeCheckpoint(moe)
    pairs, merged = encode(moe, rows, tmp_path), double(source)
    owner = {"a": 0, "b": 2}
    S_LMM = output_grams(Targets(merged, source.tokenizer(), pairs, FitSettings(owners=owner)), L)
    weights_M = torch.tensor([0.3, 0.2, 0.4, 0.1], dtype=torch.float64)
    expected_L = torch.zeros(L, dtype=torch.float64)
    matrices = [t for t in source.tensors if len(t.shape) == 2]
    for pair in pairs:
        member = owner[pair.pair.subset]
        merged.merge(torch.eye(N, dtype=torch.float64)[member].repeat(L, 1), torch.zeros(L).double())
        for text in (pair.chosen, pair.rejected):
            for tensor in matrices:
                inputs: list[Tensor] = []
                module = merged.model.get_submodule(tensor.dense.removesuffix(".weight"))
                hook = module.register_forward_hook(lambda m, x, y, kept=inputs: kept.append(x[0].detach()))
                merged.model(torch.tensor([text.ids]))
                hook.remove()
                copies = list(source.matrices(tensor))
                mean = sum(w * one for w, one in zip(weights_M, copies, strict=True))
                away = linear(inputs[0], mean - copies[member + 1])
                expected_L[tensor.layer] += (away**2).sum()
    found_L = torch.einsum("lij,i,j->l", S_LMM, weights_M, weights_M)
    torch.testing.assert_close(found_L, expected_L, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("first", [None, 0.0, 0.4])
def test_the_simplex_minimum_against_a_grid(first: float | None) -> None:
    factor = torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    S = factor.T @ factor
    found = on_simplex(S, first)
    ticks = torch.linspace(0, 1, 201, dtype=torch.float64)
    points = [
        torch.tensor([a, b, 1 - a - b])
        for a in (ticks if first is None else [torch.tensor(first)])
        for b in ticks
        if a + b <= 1
    ]
    best = min(float(p.double() @ S @ p.double()) for p in points)
    assert float(found @ S @ found) <= best + 1e-9
    assert float(found.sum()) == pytest.approx(1) and bool((found >= 0).all())
    assert first is None or float(found[0]) == pytest.approx(first)


def test_folds_keep_prompts_together() -> None:
    from moemerge.data.pairs import Pair

    pairs = [
        EncodedPair(Encoded([1], 0), Encoded([2], 0), Pair(f"p{n % 10}", f"c{n}", "r", row=n))
        for n in range(40)
    ]
    parts = fold(pairs, 3, 0)
    assert sorted(n for part in parts for n in part) == list(range(40))
    prompts = [{pairs[n].pair.prompt for n in part} for part in parts]
    assert not prompts[0] & prompts[1] and not prompts[1] & prompts[2] and not prompts[0] & prompts[2]
    with pytest.raises(DataError, match="held out"):
        fold(pairs, 11, 0)


def test_settings_that_contradict_each_other_are_refused() -> None:
    for wrong in ({"folds": 1}, {"objectives": {}}, {"objectives": {"bradley_terry": 0.0}}):
        with pytest.raises(ValueError):
            FitSettings(**wrong)


@pytest.mark.parametrize("kind", ["moe", "models"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "least_squares", "shared_weight": "learned"},
        {"granularity": "matrix", "objectives": {"distillation": 1.0, "alignment": 1.0}},
        {
            "granularity": "global",
            "shared_weight": "learned_global",
            "optimizer": "cma",
            "margin": "strength",
        },
        {"robust_rounds": 1, "candidates": "candidates.jsonl", "optimizer": "adam"},
        {"method": "one_hot", "initial_member": 1},
    ],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_the_stage_takes_every_option_for_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    members: dict[str, Any] = {"model": str(make_moe(tmp_path / "moe"))}
    if kind == "models":
        models = [str(save_dense(tmp_path / f"rm{seed}", seed=seed)) for seed in range(3)]
        members = {"models": models[1:], "base": models[0]}
    write_rows(tmp_path / "pairs.jsonl", random_pairs(16))
    answers = [{"text": f" w{n} w{n + 1}", "score": float(n)} for n in range(4)]
    rows: Any = [{"prompt": f"w{n} w9", "candidates": answers} for n in range(3)]
    write_rows(tmp_path / "candidates.jsonl", rows)
    given = {"pairs": "pairs.jsonl", "max_epochs": 2, "level": 1.0, **members}
    first = Coefficients.load(fit(output=tmp_path / "first", **given, **options))
    report = json.loads((tmp_path / "first/report.json").read_text())
    assert report["verdict"] in (tmp_path / "first/fit.md").read_text()
    again = {"granularity": options.get("granularity", "layer"), "method": "grid", "grid": [0.0, 0.5]}
    second = Coefficients.load(
        fit(output=tmp_path / "second", start=str(tmp_path / "first"), **given, **again)
    )
    assert torch.equal(second.alpha_LN, first.alpha_LN), "grid keeps the alpha that it starts from"
    assert second.blocks == first.blocks and set(second.shared_L.tolist()) <= {0.0, 0.5}


def test_coefficients_of_layers_start_matrices_and_not_the_other_way(moe: Path, tmp_path: Path) -> None:
    source = MoeCheckpoint(moe)
    meta = source.identity()
    coarse = Coefficients(source.blocks(), ALPHA, SHARED, meta).save(tmp_path / "coarse")
    given = {"model": str(moe), "method": "grid", "grid": [0.5]}
    pairs = str(write_rows(tmp_path / "pairs.jsonl", random_pairs(8)))
    fine = fit(output=tmp_path / "fine", start=str(coarse), granularity="matrix", pairs=pairs, **given)
    found = Coefficients.load(fine)
    rows = [int(block.split(".")[1]) for block in found.blocks]
    assert len(rows) == 3 * L and torch.equal(found.alpha_LN, ALPHA[rows])
    found.alpha_LN[0] = torch.tensor([1.0, 0.0, 0.0])
    Coefficients(found.blocks, found.alpha_LN, found.shared_L, meta).save(tmp_path / "uneven")
    with pytest.raises(CheckpointError, match="finer than those to fit"):
        fit(output=tmp_path / "f", start=str(tmp_path / "uneven"), pairs=pairs, **given)

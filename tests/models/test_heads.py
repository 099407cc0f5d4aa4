"""Heads of our own: each formula against quadrature, draws or torch; what a folder with one is and says."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import gamma, weibull_min
from small_heads import make_head, under_head
from tiny_models import batch, save_dense, scores, tiny_dense
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from moemerge.data.tokenise import Encoded
from moemerge.errors import CheckpointError, OptionError, UnsupportedError
from moemerge.models.cost import cost
from moemerge.models.folder import ModelFolder
from moemerge.models.heads.base import head_of
from moemerge.models.heads.saved import FIELD, SavedHead
from moemerge.models.heads.weibull import kl_from_gamma, relative_variance, scaled_draw
from moemerge.models.loading import load_reward_model
from moemerge.models.modelling import load_moe
from moemerge.models.pooled_states import states_and_scores
from moemerge.models.prefix_scores import prefix_scores
from moemerge.models.scorers import open_scorer
from moemerge.options.head import HeadOptions
from moemerge.stages.fit import fit
from moemerge.stages.merge import merge, merge_models
from moemerge.stages.upcycle import upcycle

NOISY = [("mlp", {"noise": True}), ("nonnegative", {})]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def several(deviation: Tensor, count: int) -> float:
    """Four standard errors of a mean of so many draws."""
    return 4 * deviation.std().item() / math.sqrt(count)


@pytest.mark.parametrize(
    ("mean", "shape", "prior"),
    [(1.0, 1.7, (1.0, 1.0)), (0.03, 1.2, (1.0, 1.0)), (4.0, 5.0, (1.0, 1.0)), (0.7, 2.5, (2.5, 0.6))],
)
def test_the_divergence_is_the_integral(mean: float, shape: float, prior: tuple[float, float]) -> None:
    """Of q ln(q / p), by quadrature over quantiles of q."""
    q = weibull_min(shape, scale=mean / math.gamma(1 + 1 / shape))
    p = gamma(prior[0], scale=1 / prior[1])
    wanted, _ = quad(lambda u: q.logpdf(q.ppf(u)) - p.logpdf(q.ppf(u)), 0, 1, limit=500)
    assert kl_from_gamma(f64(mean), f64(shape), *prior).item() == pytest.approx(wanted, abs=1e-5)


def test_the_divergence_of_the_prior_itself_is_0() -> None:
    """Weibull of shape 1 is exponential, and so is Gamma of shape 1."""
    assert kl_from_gamma(f64(1.0), f64(1.0)).item() == pytest.approx(0, abs=1e-12)
    assert kl_from_gamma(f64(0.5, 2.0), f64(1.0, 1.0), 1.0, 2.0)[0].item() == pytest.approx(0, abs=1e-12)
    assert (kl_from_gamma(f64(0.9, 1.1, 1.0), f64(1.0, 1.0, 1.1)) > 0).all()


def test_draws_have_the_mean_and_the_variance_that_are_said() -> None:
    uniform = torch.rand(3, 100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mean, shape = f64(2.0, 0.3, -1.5)[:, None], f64(1.0, 1.7, 6.0)[:, None]
    drawn = scaled_draw(uniform, mean, shape)
    for row, value in enumerate(mean[:, 0].tolist()):
        assert drawn[row].mean().item() == pytest.approx(value, abs=several(drawn[row], 100_000))
        square = (drawn[row] - value) ** 2
        wanted = value**2 * relative_variance(shape[row]).item()
        assert square.mean().item() == pytest.approx(wanted, abs=several(square, 100_000))
    assert relative_variance(f64(1.0)).item() == pytest.approx(1.0, abs=1e-12)
    q = weibull_min(5.0)
    assert relative_variance(f64(5.0)).item() == pytest.approx(q.var() / q.mean() ** 2, rel=1e-9)


def test_the_ends_of_a_draw_are_finite() -> None:
    uniform = torch.tensor([0.0, 1e-12, 1.0])
    mean, shape = (torch.full((3,), value, requires_grad=True) for value in (2.0, 1.2))
    drawn = scaled_draw(uniform, mean, shape)
    drawn.sum().backward()
    assert drawn.isfinite().all() and mean.grad is not None and shape.grad is not None
    assert mean.grad.isfinite().all() and shape.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "more"), NOISY)
def test_variances_of_scores_and_differences_are_those_of_draws(kind: str, more: dict[str, Any]) -> None:
    """A draw of weights is one for the whole batch; in eval mode the mean, and nothing moves."""
    head, count = make_head(kind, **more), 40_000
    states = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.no_grad():
        drawn = torch.vmap(lambda _: head(states)[:, 0], randomness="different")(torch.zeros(count))
        mean, said = head.eval()(states)[:, 0], head.variance(states)
        between = head.difference_variance(states[:1], states[1:])
        assert torch.equal(mean, head(states)[:, 0])
    difference, mean_difference = drawn[:, 0] - drawn[:, 1], mean[0] - mean[1]
    for values, center, variance in (
        (drawn[:, 0], mean[0], said[0]),
        (drawn[:, 1], mean[1], said[1]),
        (difference, mean_difference, between[0]),
    ):
        assert values.mean().item() == pytest.approx(center.item(), abs=several(values, count))
        square = (values - center) ** 2
        assert square.mean().item() == pytest.approx(variance.item(), abs=several(square, count))
        assert variance > 1e-4


def test_without_noise_there_is_no_variance() -> None:
    head, states = make_head("mlp"), torch.randn(3, 6, dtype=torch.float64)
    assert not head.variance(states).any() and not head.difference_variance(states, states.flip(0)).any()


def test_a_pessimistic_scorer_takes_off_deviations(tmp_path: Path) -> None:
    """Of each text, from the state that the head is given; only of a head with noise."""
    model = under_head(save_dense(tmp_path / "dense"), tmp_path / "rm", "nonnegative")
    texts = [Encoded([5, 6, 7, 8], 1), Encoded([9, 10], 1)]
    loaded = load_reward_model(model, "cpu")
    head: Any = head_of(loaded)
    states_ND, plain_N = states_and_scores(loaded, texts, 64)
    spread_N = head.variance(torch.from_numpy(states_ND)).sqrt().detach().numpy()
    for deviations in (0.0, 2.5):
        (tmp_path / "low.scorer.json").write_text(
            json.dumps({"kind": "pessimistic", "model": "rm", "deviations": deviations})
        )
        scored = open_scorer(tmp_path / "low.scorer.json").load(torch.device("cpu")).score(texts, 64)
        assert scored.numpy() == pytest.approx(plain_N - deviations * spread_N, abs=1e-5)
    assert (spread_N > 1e-3).all()
    (tmp_path / "low.scorer.json").write_text('{"kind": "pessimistic", "model": "dense"}')
    with pytest.raises(UnsupportedError, match="whose head has no noise"):
        open_scorer(tmp_path / "low.scorer.json").load(torch.device("cpu"))


@pytest.mark.parametrize(("kind", "more"), [*NOISY, ("mlp", {}), ("linear", {})])
def test_gradients_are_finite_differences(kind: str, more: dict[str, Any]) -> None:
    """Of states and of every weight, with the same draws each time."""
    head = make_head(kind, width=4, **more)
    states = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def drawn(states: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(4)
        named = dict(zip((name for name, _ in head.named_parameters()), weights, strict=True))
        result: Tensor = torch.func.functional_call(head, named, (states,))
        return result

    assert torch.autograd.gradcheck(drawn, (states, *head.parameters()), atol=1e-6)


def test_gradients_of_the_prior_are_finite_differences() -> None:
    head = make_head("nonnegative", width=4)

    names = [name for name, _ in head.named_parameters()]

    def prior(states: Tensor, *weights: Tensor) -> Tensor:
        head.score = lambda x: head.prior_loss(x, 7)
        result: Tensor = torch.func.functional_call(head, dict(zip(names, weights, strict=True)), (states,))
        return result

    states = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(prior, (states, *head.parameters()), atol=1e-6)


def test_the_prior_is_a_loop_over_texts_and_factors() -> None:
    """Two texts a pair; the weights' part is there once for all seven pairs of the data."""
    head = make_head("nonnegative")
    states = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        found = head.prior_loss(states, 7).item()
        total = 0.0
        for row in states:
            means, shapes = head.means(row), head.shapes(row)
            total += sum(kl_from_gamma(m, k).item() for m, k in zip(means, shapes, strict=True))
        weights = head.weights
        shapes = head.weight_shapes(weights)
        of_weights = sum(kl_from_gamma(w, k).item() for w, k in zip(weights, shapes, strict=True))
    assert found == pytest.approx(2 * total / 4 + of_weights / 7, rel=1e-12)


def plain(head: Any) -> nn.Sequential:
    """The same by torch's own layers."""
    made = nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Hardtanh(1e-6, 1e4), nn.Linear(5, 1, bias=False)
    ).double()
    given = [*head.mean_in.parameters(), *head.mean_out.parameters(), head.weights[None]]
    with torch.no_grad():
        for own, value in zip(made.parameters(), given, strict=True):
            own.copy_(value)
    return made


def test_an_mlp_head_is_torchs_layers_and_a_nonnegative_one_without_noise_is_it() -> None:
    positive = make_head("nonnegative", noise=False)
    mlp = make_head("mlp")
    mlp.load_state_dict(positive.state_dict())
    states = torch.randn(9, 6, dtype=torch.float64)
    assert torch.equal(mlp(states), positive(states)) and (positive(states) >= 0).all()
    torch.testing.assert_close(mlp(states), plain(mlp)(states), rtol=1e-14, atol=0)
    for head in (mlp, positive):
        head(states).square().sum().backward()
    for name, parameter in mlp.named_parameters():
        assert torch.equal(parameter.grad, positive.get_parameter(name).grad), name
    mlp = make_head("mlp", seed=3)
    assert (mlp.weights < 0).any() and not positive.has_prior


def test_sure_factors_are_their_means() -> None:
    head, states = make_head("nonnegative"), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        head.shape_out.bias.fill_(1e5)
        head.weight_shape_out.bias.fill_(1e5)
        drawn = head(states)
        torch.testing.assert_close(drawn, head.eval()(states), rtol=1e-3, atol=0)


def test_positive_weights_all_live_and_half_of_uniform_ones_are_dead() -> None:
    head = make_head("nonnegative", width=3000)
    assert head.facts()["live"] == 1.0
    head.draw(torch.Generator().manual_seed(0), "uniform")
    assert 0.45 < head.facts()["live"] < 0.55


@pytest.mark.parametrize(("kind", "more"), [*NOISY, ("mlp", {})])
def test_a_head_runs_in_float32_in_half_precision_too(kind: str, more: dict[str, Any]) -> None:
    head, states = make_head(kind, **more).float().eval(), torch.randn(4, 7, 6)
    wide = head(states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(states), wide)
    half = deepcopy(head).to(torch.bfloat16)
    rounded = half(states.to(torch.bfloat16))
    assert rounded.dtype == torch.float32
    exact = half.float()(states.to(torch.bfloat16).float())
    torch.testing.assert_close(rounded, exact, rtol=1e-6, atol=1e-6)


def test_dropout_is_of_the_state_and_of_training_only() -> None:
    head, states = make_head("mlp", dropout=0.5), torch.randn(2000, 6, dtype=torch.float64)
    torch.manual_seed(5)
    dropped = head(states)
    torch.manual_seed(5)
    kept = nn.functional.dropout(states, 0.5)
    assert torch.equal(dropped, make_head("mlp")(kept)) and not torch.equal(head.eval()(states), dropped)


@pytest.fixture(scope="module")
def headed(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama under a nonnegative head."""
    return under_head(dense_folder, tmp_path_factory.mktemp("headed") / "model", "nonnegative")


def test_a_folder_loads_as_it_was_by_our_class_and_says_so(headed: Path, dense_folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(headed)
    assert type(model).__name__ == "MoemergeLlamaForSequenceClassification" and not model.training
    ours, dense = load_reward_model(headed, "cpu"), tiny_dense()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for name, tensor in dense.state_dict().items():
        assert name == "score.weight" or torch.equal(tensor, ours.state_dict()[name]), name
    config, folder = json.loads((headed / "config.json").read_text()), ModelFolder(headed)
    assert config[FIELD]["kind"] == "nonnegative" and config[FIELD]["noise"] and "moemerge" not in config
    assert "pip install moemerge" in (headed / "moemerge_shim.py").read_text() and "auto_map" in config
    assert folder.kind == "dense" and folder.has_own_head and not ModelFolder(dense_folder).has_own_head
    assert cost(ours)["flops_per_token"] == cost(dense)["flops_per_token"] - 2 * 32  # of the linear head


def test_scores_are_the_heads_of_the_pooled_state_whatever_pads(headed: Path) -> None:
    """One text at a time through the trunk, its last state through the head, by hand; 0 to 50 pads."""
    model, inputs = load_reward_model(headed, "cpu"), batch()
    head = head_of(model)
    assert head is not None and head.positions_B is None
    found = scores(model)
    for ids, mask, score in zip(*inputs.values(), found, strict=True):
        with torch.no_grad():
            states = model.model(ids[mask.bool()][None]).last_hidden_state
            assert score.item() == pytest.approx(head(states[0, -1:]).item(), abs=1e-6)
            for pads in (0, 1, 50):
                longer = nn.functional.pad(ids[mask.bool()], (0, pads))[None]
                padded = model(longer, attention_mask=(longer != 0).long()).logits[0, 0]
                assert padded.item() == pytest.approx(score.item(), abs=1e-6)


def test_beginnings_have_scores_of_their_own(headed: Path) -> None:
    model, text = load_reward_model(headed, "cpu"), Encoded([5, 7, 9, 12, 1, 30, 9, 41], 3)
    (found,) = prefix_scores(model, [text], 100)
    with torch.no_grad():
        wanted = [model(torch.tensor([text.ids[:end]])).logits[0, 0].item() for end in range(1, 9)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6) and len({round(x, 6) for x in wanted}) > 4


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_only_the_last_matrix_of_a_head_is_replaced(family: str, tmp_path: Path) -> None:
    """A pooler, or a dense layer before the last, stays; taking the linear head again gives a stock model."""
    dense = save_dense(tmp_path / "dense", family)
    new = under_head(dense, tmp_path / "new", "mlp")
    before, after = (load_reward_model(folder, "cpu") for folder in (dense, new))
    kept = {n for n, t in before.state_dict().items() if torch.equal(t, after.state_dict().get(n, t[:0]))}
    lost = before.state_dict().keys() - kept
    assert len(lost) in (1, 2) and {name.rpartition(".")[2] for name in lost} <= {"weight", "bias"}
    back = under_head(new, tmp_path / "back", "linear", seed=1)
    assert type(load_reward_model(back, "cpu")) is type(before) and not (back / "moemerge_shim.py").exists()
    assert FIELD not in json.loads((back / "config.json").read_text())


def test_a_moe_of_it_is_merged_back_into_it(headed: Path, tmp_path: Path) -> None:
    """Equal experts: the very weights, head and all; a new head for the MoE is its head from then on."""
    upcycle(model=str(headed), output=tmp_path / "moe", num_routed_experts=2, num_experts_per_tok=1)
    moe = load_moe(tmp_path / "moe")
    torch.testing.assert_close(scores(moe), scores(load_reward_model(headed, "cpu")), rtol=1e-5, atol=1e-6)
    fit(model=str(tmp_path / "moe"), method="uniform", output=tmp_path / "equal")
    merge(model=str(tmp_path / "moe"), coefficients=str(tmp_path / "equal"), output=tmp_path / "merged")
    before, after = (load_reward_model(folder, "cpu") for folder in (headed, tmp_path / "merged"))
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    assert (tmp_path / "merged/moemerge_shim.py").exists() and ModelFolder(
        tmp_path / "merged"
    ).kind == "dense"
    again = under_head(tmp_path / "moe", tmp_path / "again", "mlp", seed=5)
    assert "experts" in " ".join(load_moe(again).state_dict()) and ModelFolder(again).kind == "moe"
    assert json.loads((again / "config.json").read_text())[FIELD]["kind"] == "mlp"


def test_heads_of_one_origin_are_averaged_and_others_refused(
    headed: Path, dense_folder: Path, tmp_path: Path
) -> None:
    """Bodies go together whatever the heads are."""
    twin = save_dense(tmp_path / "dense", seed=4)
    alike = under_head(twin, tmp_path / "alike", "nonnegative")
    other = under_head(twin, tmp_path / "other", "nonnegative", seed=1)
    same_seed = under_head(twin, tmp_path / "same", "nonnegative", seed=2, head_seed=0)
    wider = under_head(twin, tmp_path / "wider", "nonnegative", head_width=9)
    merge_models([headed, alike], tmp_path / "merged")
    states = [
        load_reward_model(folder, "cpu").state_dict() for folder in (headed, alike, tmp_path / "merged")
    ]
    for name, tensor in states[2].items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    for model, given in {other: "drawn as", wider: r"width 9", dense_folder: "linear"}.items():
        with pytest.raises(UnsupportedError, match=rf"(?s)cannot be averaged.*{given}.*scope to body"):
            merge_models([headed, model], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    merge_models([headed, same_seed], tmp_path / "alike-by-seed")
    merge_models([headed, dense_folder], tmp_path / "body", scope="body")
    body = load_reward_model(tmp_path / "body", "cpu").state_dict()
    assert all(torch.equal(body[name], states[0][name]) for name in body if name.startswith("score"))
    merge_models([dense_folder, headed], tmp_path / "stock", scope="body")
    assert ModelFolder(tmp_path / "stock").model_type == "llama"


def test_what_cannot_have_such_a_head_is_refused(headed: Path, tmp_path: Path) -> None:
    from moemerge.models.guards import check_reward_model

    with pytest.raises(UnsupportedError, match="(?s)mergekit.*nonnegative.*export --form linear"):
        check_reward_model(headed)
    experts = {name: str(headed) for name in ("a", "b")}
    given = {"gate": "prompt", "shared_expert": False, "num_experts_per_tok": 1, "heads": "by_expert"}
    with pytest.raises(UnsupportedError, match="(?s)heads of their own.*by_expert"):
        upcycle(model=str(headed), experts=experts, output=tmp_path / "moe", **given)
    with pytest.raises(OptionError, match=r"(?s)head.*'mpl'.*mlp"):
        load_reward_model(headed, "cpu", fresh_head_seed=0, head=HeadOptions(head="mpl"))


BROKEN = [
    {"kind": "linear"}, {"kind": "mpl"}, {"width": 0}, {"width": 2.5}, {"dropout": 1}, {"noise": 1},
    {"more": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", BROKEN, ids=str)
def test_a_config_that_names_no_head_is_a_fault(change: dict[str, Any], headed: Path, tmp_path: Path) -> None:
    for path in headed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((headed / "config.json").read_text())
    config[FIELD] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"(?s){FIELD}.*cannot be read"):
        load_reward_model(tmp_path, "cpu")
    del config[FIELD]["origin"]
    with pytest.raises(CheckpointError):
        SavedHead.read(config[FIELD])


def test_a_head_without_its_weights_is_a_fault(headed: Path, tmp_path: Path) -> None:
    from small_moe import rewrite

    for path in headed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rewrite(tmp_path, lambda name, tensor: None if name == "score.weights" else tensor)
    with pytest.raises(CheckpointError, match=r"score\.weights"):
        load_reward_model(tmp_path, "cpu")
    config = json.loads((headed / "config.json").read_text())
    config[FIELD]["width"] = 10**7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not hold the model that its config asks for"):
        load_reward_model(tmp_path, "cpu")

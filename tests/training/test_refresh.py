"""A reward model that learns while a policy trains: its step by hand, what moves, what is certified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_moe import make_moe
from small_policy import save_last_word_model, save_policy, write_prompts
from small_training import rows, write
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import logsigmoid

from moemerge.artifacts import stage as artifacts
from moemerge.artifacts.verify import verify
from moemerge.data.pairs import Pair
from moemerge.data.rows import read_rows
from moemerge.data.tokenise import EncodedPair, encode
from moemerge.errors import DataError, OptionError, UnsupportedError
from moemerge.fitting.coefficient_learner import CoefficientLearner, equal_coefficients
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.sources.open import open_source
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.options.base import Members
from moemerge.options.optimise import Optimise
from moemerge.stages.optimise import optimise
from moemerge.training.refresh import Refresher, WeightLearner, pair_losses

SHORT: dict[str, Any] = {
    "steps": 3, "measure_steps": 3, "measure_prompts": 4, "measure_answers": 2, "batch_size": 16,
    "answers_per_prompt": 8, "learning_rate": 3e-2, "max_new_tokens": 2, "resamples": 100, "threads": 1,
}  # fmt: skip


def no_w5(prompt: str, answer: str) -> int:
    """The rule: an answer that ends in w5 is wrong, one that is empty cannot be judged."""
    return int(not answer.strip().endswith("w5"))


def add_w5(prompt: str, right: str) -> str:
    """Makes any answer wrong."""
    return f"{right} w5"


def dislikes_w5(prompt: str, answer: str) -> float:
    """Gold: few words are w5."""
    return -float(answer.split().count("w5"))


def encoded(tokenizer: Any, *sides: tuple[str, str]) -> list[EncodedPair]:
    return [
        EncodedPair(encode(tokenizer, "w1 ", a), encode(tokenizer, "w1 ", b), Pair("w1 ", a, b))
        for a, b in sides
    ]


def scores_of(model: Any, pairs: list[EncodedPair], call: Callable[[Tensor], Any]) -> Tensor:
    """Each text by itself, without padding: [B, 2]."""
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    return torch.stack([call(torch.tensor([text.ids])).logits[0, 0] for text in texts]).view(-1, 2)


@pytest.fixture
def dense(dense_folder: Path) -> tuple[Any, Any]:
    return load_reward_model(dense_folder, "cpu"), load_tokenizer(dense_folder)


PAIRS = [("w3 w4 w5", "w6"), ("w7", "w8 w9"), ("w10 w11", "w12 w13 w14 w15")]


def test_a_step_is_adam_on_the_formula(dense: tuple[Any, Any], dense_folder: Path) -> None:
    model, tokenizer = dense
    pairs = encoded(tokenizer, *PAIRS)
    by_hand = load_reward_model(dense_folder, "cpu")
    scores_B2 = scores_of(by_hand, pairs, by_hand)
    losses_B = -logsigmoid(scores_B2[:, 0] - scores_B2[:, 1]) + 0.3 * scores_B2.sum(1) ** 2
    torch.testing.assert_close(pair_losses(model, pairs, 0.3), losses_B)
    losses_B.mean().backward()
    norm = torch.stack([p.grad.norm() for p in by_hand.parameters() if p.grad is not None]).norm()
    learner = WeightLearner(model, tokenizer, "all", 1e-2, max_norm=0.1)
    loss = learner.step([lambda: pair_losses(model, pairs[:1], 0.3).sum() / 3,
                         lambda: pair_losses(model, pairs[1:], 0.3).sum() / 3])  # fmt: skip
    assert loss == pytest.approx(losses_B.mean().item(), rel=1e-5) and norm > 0.1
    for new, old in zip(model.parameters(), by_hand.parameters(), strict=True):
        if old.grad is not None:
            g = old.grad * 0.1 / norm
            # Adam's first step, its moments corrected for their start.
            torch.testing.assert_close(new.data, old.data - 1e-2 * g / (g.abs() + 1e-8), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("trains", ["head", "experts"])
def test_only_what_is_meant_to_learns(tmp_path: Path, trains: str) -> None:
    folder = make_moe(tmp_path / "moe")
    model, tokenizer = load_reward_model(folder, "cpu"), load_tokenizer(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = WeightLearner(model, tokenizer, trains, 1e-2, 1.0)
    learner.step([lambda: pair_losses(model, encoded(tokenizer, *PAIRS), 0.01).mean()])
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all("score" in name if trains == "head" else "expert" in name for name in moved)


def test_coefficients_learn_by_their_own_gradient_and_nothing_else_moves(tmp_path: Path) -> None:
    """The gradient is autograd's through the average, in float64; what is not merged stays, bit for bit."""
    folder = make_moe(tmp_path / "moe")
    source, tokenizer = open_source(Members(model=str(folder))), load_tokenizer(folder)
    start = equal_coefficients(source)
    learner = CoefficientLearner(source, tokenizer, start, 0.05, torch.device("cpu"))
    model, pairs = learner.model, encoded(tokenizer, *PAIRS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits_LN = start.alpha_LN.log().requires_grad_()
    shared_L = start.shared_L.logit().requires_grad_()
    weights: dict[str, Tensor] = {name: tensor.double() for name, tensor in before.items()}
    lines = source.rows(start.blocks)
    for tensor in source.tensors:
        first, *others = [matrix.double() for matrix in source.matrices(tensor)]
        row = lines[tensor.dense]
        share, alpha_N = shared_L[row].sigmoid(), logits_LN[row].softmax(0)
        routed = sum(a * other for a, other in zip(alpha_N, others, strict=True))
        weights[tensor.dense] = share * first + (1 - share) * routed
    wide = model.double()
    scores_B2 = scores_of(model, pairs, lambda ids: functional_call(wide, weights, (ids,)))
    loss = (-logsigmoid(scores_B2[:, 0] - scores_B2[:, 1]) + 0.01 * scores_B2.sum(1) ** 2).mean()
    wanted = torch.autograd.grad(loss, [logits_LN, shared_L])
    model.float()
    found = learner.step([lambda: pair_losses(model, pairs, 0.01).mean()])
    assert found == pytest.approx(loss.item(), rel=1e-5)
    gradient_V = learner._v_V.grad
    assert gradient_V is not None
    torch.testing.assert_close(
        gradient_V, torch.cat([part.flatten() for part in wanted]), rtol=1e-3, atol=1e-7
    )
    merged = {tensor.dense for tensor in source.tensors}
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == merged
    saved = learner.coefficients()
    assert saved.meta["method"] == "refreshed" and not torch.equal(saved.alpha_LN, start.alpha_LN)


def options(**more: Any) -> Optimise:
    return Optimise(
        **{
            "policy": "p", "prompts": "q", "models": {"m": "m"}, "gold_function": dislikes_w5, "output": "o",
            "refresh": {"m": "during"}, "verifier": no_w5, "seed": 3, **more,
        }
    )  # fmt: skip


def garble(prompt: Any, answer: Any, draw: Any) -> str:
    return f"{answer} w{draw.choice((4, 5))}"


def judge(items: Any) -> list[int]:
    return [no_w5(*item) for item in items]


ANSWERS = {
    "w1 ": ["w5", "w6", "w7 w5", "w8"],  # both kinds
    "w2 ": ["w5", "w5", "w9 w5", "w5"],  # wrong only
    "w3 ": ["w6", "w7", "w8", "w9"],  # right only
}
ITEMS = [(prompt, answer) for prompt, answers in ANSWERS.items() for answer in answers]


def test_positives_are_right_and_negatives_wrong(dense: tuple[Any, Any]) -> None:
    drawn = set()
    for seed in range(12):
        learner = WeightLearner(*dense, "head", 1e-3, 1.0)
        refresher = Refresher(options(seed=seed), learner, judge, garble)
        refresher.update(ITEMS)
        assert {(row["prompt"], row["made"]) for row in refresher.pairs} <= {("w1 ", False), ("w3 ", True)}
        for row in refresher.pairs:
            assert no_w5("", row["chosen"]) and not no_w5("", row["rejected"])
            assert row["chosen"] in ANSWERS[row["prompt"]]
            assert row["made"] or row["rejected"] in ANSWERS[row["prompt"]]
        (update,) = refresher.updates
        assert update["prompts"] == 3 and update["pairs"] == len(refresher.pairs) >= 1
        drawn.add((refresher.pairs[0]["chosen"], refresher.pairs[0]["rejected"]))
    assert len(drawn) == 4, "any right answer against any wrong one"


@pytest.mark.parametrize(("negatives", "prompts"), [("answers", {"w1 "}), ("made", {"w1 ", "w3 "})])
def test_where_negatives_come_from(dense: tuple[Any, Any], negatives: str, prompts: set[str]) -> None:
    learner = WeightLearner(*dense, "head", 1e-3, 1.0)
    refresher = Refresher(
        options(negatives=negatives, tries=100 if negatives == "made" else 3), learner, judge, garble
    )
    refresher.update(ITEMS)
    assert {row["prompt"] for row in refresher.pairs} == prompts
    assert all(row["made"] == (negatives == "made") for row in refresher.pairs)


def test_old_pairs_make_their_share(dense: tuple[Any, Any]) -> None:
    old = encoded(dense[1], *PAIRS * 5)
    refresher = Refresher(
        options(replay_pairs="x", replay=0.75), WeightLearner(*dense, "head", 1e-3, 1.0), judge, garble, old
    )
    refresher.update(ITEMS[:4])
    assert (refresher.updates[0]["pairs"], refresher.updates[0]["replayed"]) == (1, 3)
    refresher.update(ITEMS[4:8])
    assert refresher.updates[1] == {
        "update": 1,
        "prompts": 1,
        "pairs": 0,
        "made": 0,
        "replayed": 0,
        "loss": None,
    }


def test_without_a_verified_pair_nothing_moves(dense: tuple[Any, Any]) -> None:
    model, tokenizer = dense
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unsure = Refresher(
        options(),
        WeightLearner(model, tokenizer, "all", 1e-2, 1.0),
        lambda items: [None] * len(items),
        garble,
    )
    unsure.update(ITEMS)
    assert unsure.updates[0]["pairs"] == 0 and unsure.updates[0]["prompts"] == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# The stage


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes as long as the run; one test draws."""
    if request.node.name != "test_a_hole_closes":
        monkeypatch.setattr("moemerge.reports.plotting.panels", lambda *_, **__: None)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("refresh")
    model = str(save_last_word_model(folder / "model", "w5"))
    return {
        "policy": str(save_policy(folder / "policy")), "models": {"static": model, "fresh": model},
        "prompts": write_prompts(folder / "prompts.jsonl", 60), "gold_function": dislikes_w5,
        "held_out_pairs": write(folder / "held.jsonl", rows(20, 5)),
    }  # fmt: skip


def read(output: Path, name: str = "samples.jsonl.gz") -> list[dict[str, Any]]:
    return [row for _, row in read_rows(str(output / name)) if isinstance(row, dict)]


def answers_of(output: Path, model: str) -> list[dict[str, Any]]:
    return [{**row, "model": ""} for row in read(output) if row["model"] == model]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def never(prompt: str, answer: str) -> None:
    """A rule that can say nothing."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of disk that were asked for."""
    asked: list[int] = []
    monkeypatch.setattr(artifacts, "require_space", lambda folder, size: asked.append(size))
    return asked


def test_a_refresh_with_nothing_to_do_is_none(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: list[int]
) -> None:
    """Bit for bit: what the policy says, what it is rewarded, and the model, for which there was room."""
    out = optimise(**given, **SHORT, refresh={"fresh": "during"}, verifier=never, output=tmp_path / "run")
    assert answers_of(out, "fresh") == answers_of(out, "static")
    mine, theirs = weights(out / "refreshed/fresh"), weights(Path(given["models"]["fresh"]))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert asked == [2 * sum(4 * weight.numel() for weight in mine.values())]
    assert "fresh was never refreshed" in caplog.text
    assert json.loads((out / "report.json").read_text())["models"]["fresh"]["refresh"]["pairs"] == 0


@pytest.mark.slow
def test_a_hole_closes(given: dict[str, Any], tmp_path: Path) -> None:
    """The model likes w5, which is wrong: refreshed it likes it less, and gold is higher."""
    more = {**SHORT, "steps": 24, "measure_steps": 24, "measure_prompts": 16, "batch_size": 32}
    fresh = {"refresh": {"fresh": "during"}, "refresh_trains": "head", "refresh_learning_rate": 0.02}
    fresh |= {"corrupt": add_w5}
    out = optimise(**given, **more, **fresh, verifier=no_w5, output=tmp_path / "run")
    report = json.loads((out / "report.json").read_text())
    static, refreshed = (report["models"][name] for name in ("static", "fresh"))
    assert refreshed["minus_baseline_low"][-1] > 0 and static["gold"][0] == refreshed["gold"][0]
    rows_made = read(out, "refresh.jsonl.gz")
    told = refreshed["refresh"]
    assert told["pairs"] == len(rows_made) > 20 and told["updates"] == 24 and "refresh" not in static
    assert told["masked"] == 24 * 4 - told["pairs"] and told["gold_agrees"] == 1
    assert all(no_w5("", row["chosen"]) and not no_w5("", row["rejected"]) for row in rows_made)
    model, tokenizer = (
        load_reward_model(out / "refreshed/fresh", "cpu"),
        load_tokenizer(out / "refreshed/fresh"),
    )
    with torch.no_grad():
        w5, w6 = (model(torch.tensor([encode(tokenizer, "w1 ", w).ids])).logits.item() for w in ("w5", "w6"))
    assert w5 < w6
    assert static["held_out"] == [static["held_out"][0]] * 2 and static["held_out_change"]["value"] == 0
    assert refreshed["held_out_pairs"] == 20 and refreshed["held_out_change"]["value"] != 0
    page = (out / "report.md").read_text()
    assert "Reward models refreshed" in page and "| fresh | during | head | " in page
    assert verify(out).faults == []


def test_before_takes_as_many_updates_and_then_none(given: dict[str, Any], tmp_path: Path) -> None:
    more = {"refresh": {"fresh": "before"}, "verifier": no_w5, "negatives": "made", "refresh_every": 2}
    more |= {"corrupt": add_w5}
    out = optimise(**given, **{**SHORT, "steps": 5}, **more, output=tmp_path / "run")
    report = json.loads((out / "report.json").read_text())["models"]["fresh"]
    assert report["refresh"]["when"] == "before" and report["refresh"]["updates"] == 2
    assert report["refresh"]["made"] == report["refresh"]["pairs"] > 0
    assert len(set(report["held_out"])) == 1, "the same model all along"
    rows_made = read(out, "refresh.jsonl.gz")
    assert {row["update"] for row in rows_made} <= {0, 1} and all(row["made"] for row in rows_made)


def test_only_coefficients(given: dict[str, Any], tmp_path: Path, asked: list[int]) -> None:
    moe = make_moe(tmp_path / "moe")
    more = {"refresh": {"fresh": "during"}, "refresh_trains": "coefficients", "verifier": no_w5}
    replayed = {"replay_pairs": given["held_out_pairs"], "replay": 0.5}
    models = {**given, "models": {"fresh": str(moe)}}
    out = optimise(**models, **SHORT, **more, **replayed, output=tmp_path / "run")
    home = out / "refreshed/fresh"
    saved = Coefficients.load(home)
    assert saved.meta["method"] == "refreshed" and not torch.allclose(saved.alpha_LN, saved.alpha_LN.mean())
    model = load_reward_model(home, "cpu")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert asked[1:] == [2 * 4 * model.num_parameters()], "behind what upcycling asked for"
    backbone = open_source(Members(model=str(moe)))
    assert all(torch.equal(model.state_dict()[name], backbone.kept(name)) for name in backbone.backbone)
    told = json.loads((out / "report.json").read_text())["models"]["fresh"]["refresh"]
    assert told["replayed"] == told["pairs"] > 0


def test_a_killed_run_goes_on_and_ends_alike(given: dict[str, Any], tmp_path: Path) -> None:
    calls: list[str] = []

    def rule(prompt: str, answer: str) -> int:
        calls.append(answer)
        if len(calls) == 70:
            raise KeyboardInterrupt
        return no_w5(prompt, answer)

    both = {"refresh": {"static": "during", "fresh": "during"}, "verifier": rule}
    with pytest.raises(KeyboardInterrupt):
        optimise(**given, **SHORT, **both, output=tmp_path / "killed")
    first = optimise(**given, **SHORT, **both, output=tmp_path / "killed")
    second = optimise(**given, **SHORT, **both, output=tmp_path / "straight")
    for name in ("report.json", "samples.jsonl.gz", "refresh.jsonl.gz"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    for name in ("static", "fresh"):
        one, other = weights(first / "refreshed" / name), weights(second / "refreshed" / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_faults(given: dict[str, Any], tmp_path: Path) -> None:
    def fails(match: str, error: type[Exception] = OptionError, **more: Any) -> None:
        with pytest.raises(error, match=match):
            optimise(**{**given, **SHORT, "refresh": {"fresh": "during"}, **more}, output=tmp_path / "run")

    fails("needs one rule")
    fails("needs one rule", verifier=no_w5, right_above=0.0)
    fails("verifier needs refresh", refresh={}, verifier=no_w5)
    fails("exclude each other", verifier=no_w5, credit="token")
    fails("replay needs replay_pairs", verifier=no_w5, replay=0.2)
    fails("corrupt needs negatives", verifier=no_w5, corrupt=no_w5, negatives="answers")
    fails("refresh_coefficients needs", verifier=no_w5, refresh_coefficients="x")
    fails("did you mean 'fresh'", verifier=no_w5, refresh={"fresch": "during"})
    fails("1 .right., 0 .wrong. or None", DataError, verifier=lambda prompt, answer: 2)
    fails("ZeroDivisionError", DataError, verifier=lambda prompt, answer: 1 // 0)
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/scorer.json").write_text(json.dumps({"kind": "implicit", "policy": given["policy"]}))
    fails(
        "refresh needs a classifier",
        UnsupportedError,
        models={"fresh": str(tmp_path / "judge")},
        verifier=no_w5,
    )
    assert not (tmp_path / "run").exists()

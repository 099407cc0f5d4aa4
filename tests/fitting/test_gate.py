"""Gates fitted in closed form: ridge against brute force, and a planted MoE whose experts suit prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_moe import make_moe, rewrite, write_rows
from tiny_models import save_dense
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import encode_pairs
from moemerge.errors import CheckpointError, DataError, MoemergeError, OptionError, UnsupportedError
from moemerge.fitting.gate import utilities
from moemerge.fitting.ridge import STRENGTHS, ridge
from moemerge.models.loading import load_tokenizer
from moemerge.models.modelling import load_moe
from moemerge.models.moe import moe_layers
from moemerge.models.scoring import score_pairs
from moemerge.options.base import TextFormat
from moemerge.stages.calibrate import calibrate
from moemerge.stages.fit import fit
from moemerge.stages.gate import gate
from moemerge.stages.train import train
from moemerge.stages.upcycle import upcycle

EXPERTS, SIDES = ("one", "other"), ("chosen", "rejected")


@pytest.mark.parametrize(("rows", "features"), [(12, 4), (6, 9)])
def test_ridge_equals_brute_force(rows: int, features: int) -> None:
    draw = np.random.default_rng(0)
    x_QD, y_QN = draw.normal(size=(rows, features)), draw.normal(size=(rows, 3))
    weight_Q = draw.integers(1, 5, rows).astype(float)
    unit = (np.linalg.svd(np.sqrt(weight_Q)[:, None] * x_QD, compute_uv=False) ** 2).mean()

    def solved(kept: Any, strength: float) -> Any:
        x, w = x_QD[kept], weight_Q[kept, None]
        return np.linalg.solve(x.T @ (w * x) + strength * np.eye(features), x.T @ (w * y_QN[kept])).T

    errors = []
    for strength in STRENGTHS:
        found = ridge(x_QD, y_QN, weight_Q, (strength,))
        np.testing.assert_allclose(found.weight_ND, solved(np.arange(rows), strength * unit), rtol=1e-6)
        for row in range(rows):
            others = np.arange(rows) != row
            by_others_N = solved(others, strength * unit) @ x_QD[row]
            np.testing.assert_allclose(found.left_out_QN[row], by_others_N, rtol=1e-6, atol=1e-9)
        errors.append((weight_Q[:, None] * (y_QN - found.left_out_QN) ** 2).sum())
    best = STRENGTHS[int(np.argmin(errors))]
    assert ridge(x_QD, y_QN, weight_Q).strength == pytest.approx(best * unit)


def test_a_loud_expert_is_worth_no_more() -> None:
    margins_NP = np.random.default_rng(1).normal(size=(3, 20))
    prompt_P = np.arange(20) // 2
    loud_NP = margins_NP * np.array([[1.0], [10.0], [0.1]])
    np.testing.assert_allclose(utilities(loud_NP, prompt_P), utilities(margins_NP, prompt_P))
    np.testing.assert_allclose(utilities(margins_NP, prompt_P).sum(1), 0, atol=1e-12)


def hybrid(base: Path, expert: Path) -> Any:
    """The base with the expert's MLPs, by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    other = AutoModelForSequenceClassification.from_pretrained(expert).state_dict()
    model.load_state_dict({name: value for name, value in other.items() if ".mlp." in name}, strict=False)
    return model


@torch.no_grad()
def plain_score(model: Any, tokenizer: Any, row: dict[str, str], side: str) -> float:
    inputs = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token, return_tensors="pt")
    return float(model(input_ids=inputs["input_ids"]).logits[0, 0])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoE of two models' MLPs, and pairs of two kinds of prompts: each kind is judged by one of them."""
    home, draw = tmp_path_factory.mktemp("planted"), random.Random(0)
    for seed, name in enumerate(("base", *EXPERTS)):
        save_dense(home / name, seed=seed)
    for name in EXPERTS:  # as they are drawn, MLPs hardly move a score
        rewrite(home / name, lambda name, tensor: 12 * tensor if ".mlp." in name else tensor)
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    judges = [hybrid(home / "base", home / name) for name in EXPERTS]
    rows = []
    for number in range(120):
        kind = number % 2
        prompt = " ".join(f"w{draw.randrange(10) + 30 * kind}" for _ in range(8)) + " "
        one, other = (" ".join(f"w{draw.randrange(60)}" for _ in range(5)) for _ in range(2))
        row = {"prompt": prompt, "chosen": one, "rejected": other, "subset": EXPERTS[kind]}
        if plain_score(judges[kind], tokenizer, row, "chosen") < plain_score(
            judges[kind], tokenizer, row, "rejected"
        ):
            row |= {"chosen": other, "rejected": one}
        rows.append(row)
    write_rows(home / "pairs.jsonl", rows[:80])
    write_rows(home / "held-out.jsonl", rows[80:])
    upcycle(
        model=str(home / "base"), experts={name: str(home / name) for name in EXPERTS}, gate="prompt",
        shared_expert=False, output=home / "moe",
    )  # fmt: skip
    gate(model=str(home / "moe"), pairs=str(home / "pairs.jsonl"), output=home / "gated")
    return home


def test_a_planted_gate_is_found(planted: Path) -> None:
    found = json.loads((planted / "gated" / "gate.json").read_text())
    assert found["known"] == 1.0 and 0.5 < found["single"] < 0.9
    assert found["routed"] > 0.95 and found["agreement"] > 0.9


def test_scores_are_those_of_the_model_with_the_right_expert(planted: Path) -> None:
    """On prompts that the gate has not seen, text by text, against plain transformers."""
    tokenizer = load_tokenizer(str(planted / "base"))
    pairs, report = read_pairs(str(planted / "held-out.jsonl"), TextFormat())
    encoded = encode_pairs(tokenizer, pairs, TextFormat(), report)
    ours_P2 = score_pairs(load_moe(planted / "gated"), tokenizer, encoded, 400)
    judges = {name: hybrid(planted / "base", planted / name) for name in EXPERTS}
    near = []
    for pair, ours_2 in zip(pairs, ours_P2.tolist(), strict=True):
        row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        theirs_2 = [plain_score(judges[pair.subset], tokenizer, row, side) for side in ("chosen", "rejected")]
        near.append(np.abs(np.subtract(ours_2, theirs_2)).max() < 1e-5)
    assert np.mean(near) > 0.9
    assert float((ours_P2[:, 0] > ours_P2[:, 1]).double().mean()) > 0.9


def test_only_the_routers_change(planted: Path) -> None:
    before, after = (load_moe(planted / name).state_dict() for name in ("moe", "gated"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".gate." in name} and len(changed) == 3


@pytest.fixture(scope="module")
def own_heads(planted: Path) -> Path:
    """A MoE of the same experts, each with its model's head, divided by the model's scale."""
    experts = {name: str(planted / name) for name in EXPERTS}
    calibrate(models=experts, pairs=str(planted / "pairs.jsonl"), output=planted / "scales")
    upcycle(
        model=str(planted / "base"), experts=experts, gate="prompt", shared_expert=False,
        heads="by_expert", calibration=str(planted / "scales"), output=planted / "own-heads",
    )  # fmt: skip
    gated = planted / "own-heads-gated"
    gate(model=str(planted / "own-heads"), pairs=str(planted / "pairs.jsonl"), output=gated)
    return gated


def with_own_head(planted: Path, name: str) -> Any:
    """The base with the expert's MLPs and its head on one scale, by plain transformers."""
    model = hybrid(planted / "base", planted / name)
    other = AutoModelForSequenceClassification.from_pretrained(planted / name)
    scales = json.loads((planted / "scales" / "calibration.json").read_text())["models"]
    model.score.weight.data = other.score.weight.data / scales[name]["scale"]
    return model


def test_a_text_has_the_head_of_the_expert_that_it_goes_through(planted: Path, own_heads: Path) -> None:
    """Text by text against plain transformers, whichever expert is chosen; both are chosen now and then."""
    model, tokenizer = load_moe(own_heads), load_tokenizer(str(planted / "base"))
    judges = [with_own_head(planted, name) for name in EXPERTS]
    pairs, report = read_pairs(str(planted / "held-out.jsonl"), TextFormat())
    encoded = encode_pairs(tokenizer, pairs, TextFormat(), report)
    chosen: list[Tensor] = []
    for layer in moe_layers(model).values():
        layer.observer = lambda gating: chosen.append(gating.index_TK[0, 0])
    ours_P2 = [score_pairs(model, tokenizer, [pair], 400)[0] for pair in encoded]
    choice_PL = torch.stack(chosen).view(len(pairs), -1)
    agree_P = (choice_PL == choice_PL[:, :1]).all(1)
    for pair, ours_2, expert_L, agree in zip(pairs, ours_P2, choice_PL, agree_P, strict=True):
        row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        if agree:
            theirs_2 = [plain_score(judges[expert_L[0]], tokenizer, row, side) for side in SIDES]
            assert ours_2.tolist() == pytest.approx(theirs_2, abs=1e-5)
    assert float(agree_P.double().mean()) > 0.8 and len(choice_PL[agree_P].unique()) == 2
    together_P2 = score_pairs(model, tokenizer, encoded, 400)  # in batches of many, padded
    torch.testing.assert_close(together_P2, torch.stack(ours_P2), atol=1e-5, rtol=1e-5)


def test_heads_by_expert_train_and_are_kept(planted: Path, own_heads: Path, tmp_path: Path) -> None:
    train(
        model=str(own_heads), pairs=str(planted / "pairs.jsonl"), output=tmp_path / "trained",
        epochs=1, learning_rate=1e-3,
    )  # fmt: skip
    before, after = load_moe(own_heads).state_dict(), load_moe(tmp_path / "trained").state_dict()
    assert before["score.weight"].shape == (2, 32)
    assert (before["score.weight"] != after["score.weight"]).any(1).all()


def test_what_heads_by_expert_cannot_do_is_refused(planted: Path, own_heads: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot be merged") as caught:
        fit(model=str(own_heads), pairs=str(planted / "pairs.jsonl"), output=tmp_path / "out")
    assert "merge --models" in caught.value.fix
    experts = {name: str(planted / name) for name in EXPERTS}
    base = {"model": str(planted / "base"), "output": tmp_path / "out"}
    with pytest.raises(OptionError, match="shared_expert false"):
        upcycle(experts=experts, heads="by_expert", gate="prompt", **base)
    with pytest.raises(OptionError, match="calibration goes with heads by_expert"):
        upcycle(experts=experts, calibration=str(planted / "scales"), **base)
    headless = tmp_path / "headless"
    LlamaForCausalLM(AutoConfig.from_pretrained(planted / "base")).save_pretrained(headless)
    load_tokenizer(str(planted / "base")).save_pretrained(headless)
    with pytest.raises(UnsupportedError, match="no reward head to give its expert"):
        upcycle(
            experts={"one": experts["one"], "headless": str(headless)}, heads="by_expert", gate="prompt",
            shared_expert=False, **base,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_what_has_no_prompt_gate_is_refused(planted: Path, tmp_path: Path) -> None:
    moe, pairs = make_moe(tmp_path / "moe"), str(planted / "pairs.jsonl")
    with pytest.raises(UnsupportedError, match="does not choose one expert by the prompt") as caught:
        gate(model=str(moe), pairs=pairs, output=tmp_path / "out")
    assert "shared_expert True" in caught.value.given and "upcycle" in caught.value.fix
    row = json.loads((planted / "pairs.jsonl").read_text().splitlines()[0])
    one = write_rows(tmp_path / "one.jsonl", [row, row | {"chosen": "w3"}])
    with pytest.raises(DataError, match="one prompt"):
        gate(model=str(planted / "moe"), pairs=str(one), output=tmp_path / "out")


def test_pairs_without_prompts_teach_no_gate(
    planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in (planted / "pairs.jsonl").read_text().splitlines()[:12]]
    without = [row | {"prompt": "", "chosen": row["prompt"] + row["chosen"]} for row in rows]
    none = write_rows(tmp_path / "none.jsonl", without)
    for stage in (gate, train):
        with pytest.raises(DataError, match="looks at prompts cannot learn"):
            stage(model=str(planted / "moe"), pairs=str(none), output=tmp_path / "out")
    some = write_rows(tmp_path / "some.jsonl", [*without[:5], *rows[5:]])
    gate(model=str(planted / "moe"), pairs=str(some), output=tmp_path / "out")
    assert "5 of 12 pairs have no prompt" in caplog.text


def test_an_expert_with_nan_is_named(planted: Path, tmp_path: Path) -> None:
    broken = save_dense(tmp_path / "broken")
    rewrite(broken, lambda name, tensor: tensor * float("nan") if "mlp.up" in name else tensor)
    experts = {"one": str(planted / "one"), "broken": str(broken)}
    with pytest.raises(CheckpointError, match="not finite") as caught:
        upcycle(model=str(planted / "base"), experts=experts, output=tmp_path / "out")
    assert caught.value.given.endswith(f"mlp.up_proj.weight of {broken}")


def test_experts_of_another_shape_are_refused(planted: Path, tmp_path: Path) -> None:
    wide = save_dense(tmp_path / "wide", intermediate_size=40)
    with pytest.raises(MoemergeError, match="intermediate_size|do not go together|architecture"):
        upcycle(
            model=str(planted / "base"), experts={"a": str(wide), "b": str(planted / "one")},
            output=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()

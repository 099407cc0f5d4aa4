"""A stock head for one of ours: least squares against numpy, what is written against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_heads import under_head
from small_moe import random_pairs, rewrite, write_rows
from tiny_models import save_dense, scores
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import moemerge
from moemerge.artifacts.manifest import read_manifest
from moemerge.errors import MoemergeError, OptionError, UnsupportedError
from moemerge.fitting.linear_head import fit_linear_head, likeness
from moemerge.models.loading import load_reward_model


def test_the_fit_is_least_squares_with_a_constant() -> None:
    """numpy's, where hardly any ridge is chosen: targets are linear but for little noise."""
    draw = np.random.default_rng(0)
    states, weight = draw.normal(size=(60, 5)) + 3, draw.normal(size=5)
    targets = states @ weight + 2.5 + 1e-3 * draw.normal(size=60)
    wanted = np.linalg.lstsq(np.column_stack([states, np.ones(60)]), targets, rcond=None)[0]
    found = fit_linear_head(states, targets)
    np.testing.assert_allclose([*found.weight_D, found.constant], wanted, atol=1e-5)


def test_likeness_is_counted() -> None:
    before = np.array([[3.0, 1.0], [0.0, 1.0], [2.0, 5.0], [4.0, 0.0]])  # differences 2, -1, -3, 4
    after = np.array([[2.0, 1.0], [1.0, 0.5], [2.0, 6.0], [7.0, 0.0]])  # 1, 0.5, -4, 7
    found = likeness(before, after)
    assert found["agreement"] == 0.75 and found["accuracy"] == {"before": 0.5, "after": 0.75}
    assert found["rank_correlation"] == 1.0 and found["held_out_pairs"] == 4
    rest = np.array([1, 0, -1, 0.5, 0, -1, -3, 0])
    assert found["r2"] == pytest.approx(1 - ((rest + 3.5 / 8) ** 2).sum() / ((before - 2) ** 2).sum())
    low, high = found["agreement_interval"]
    assert 0.2 < low < 0.75 < high < 1


def linear_in_disguise(name: str, tensor: Tensor) -> Tensor:
    """An mlp head whose relus never bite."""
    return tensor.abs() + 4.0 if name.endswith(("mean_in.bias", "mean_out.bias")) else tensor


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_head_that_is_linear_at_heart_loses_nothing(family: str, tmp_path: Path) -> None:
    """By plain transformers: differences are the same; where the stock head has a bias, scores too."""
    dense = save_dense(tmp_path / "dense", family)
    headed = rewrite(under_head(dense, tmp_path / "headed", "mlp"), linear_in_disguise)
    rows = str(write_rows(tmp_path / "rows.jsonl", random_pairs(60)))
    result = moemerge.export(headed, output=tmp_path / "stock", form="linear", pairs=rows)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock")
    assert type(stock).__name__ in ("LlamaForSequenceClassification", "BertForSequenceClassification")
    before, after = scores(load_reward_model(headed, "cpu")), scores(stock)
    gap = 0.0 if family == "bert" else (before - after).mean()
    torch.testing.assert_close(after + gap, before, rtol=0, atol=5e-2 * float(before.std()))
    numbers = result.numbers
    assert numbers["agreement"] == 1.0 and numbers["held_out_pairs"] + numbers["fitted_pairs"] == 60
    assert numbers["rank_correlation"] > 0.99 and 10 <= numbers["held_out_pairs"] <= 14
    config = json.loads((tmp_path / "stock/config.json").read_text())
    assert config["model_type"] == family and "moemerge_head" not in config and "auto_map" not in config
    assert not (tmp_path / "stock/moemerge_shim.py").exists()
    moemerge.evaluate([tmp_path / "stock", headed], pairs=rows, probes=["accuracy"], output=tmp_path / "e")


def test_a_head_of_another_form_is_refused_below_the_agreement(tmp_path: Path) -> None:
    """And written, with what it loses, above it."""
    headed = under_head(save_dense(tmp_path / "dense"), tmp_path / "headed", "nonnegative")

    def bent(name: str, tensor: Tensor) -> Tensor:
        return tensor * 6 if name.startswith("score.mean_in") else tensor

    options: dict[str, Any] = {"pairs": str(write_rows(tmp_path / "rows.jsonl", random_pairs(80)))}
    rewrite(headed, bent)
    with pytest.raises(UnsupportedError, match=r"(?s)on 0\.\d+ of 1\d pairs.*agreement on 1 of"):
        moemerge.export(headed, output=tmp_path / "out", form="linear", least_agreement=1.0, **options)
    assert not (tmp_path / "out").exists()
    moemerge.export(headed, output=tmp_path / "out", form="linear", least_agreement=0.2, **options)
    found = read_manifest(tmp_path / "out")["results"]
    assert 0.2 <= found["agreement"] < 1 and 0 < found["r2"] < 1 and -1 < found["rank_correlation"] < 1
    moemerge.publish(tmp_path / "out", output=tmp_path / "repo", base_model="someone/model")
    card = (tmp_path / "repo/README.md").read_text()
    assert "fitted, by least squares" in card and f"{found['agreement']:.1%}" in card


def test_what_has_no_head_to_replace_is_refused(dense_folder: Path, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", random_pairs(8)))
    headed = under_head(dense_folder, tmp_path / "headed", "mlp")
    moe = moemerge.upcycle(headed, output=tmp_path / "moe", num_routed_experts=2, num_experts_per_tok=1)
    for model, words in {dense_folder: "stock model already", moe: "is a MoE made by moemerge"}.items():
        with pytest.raises(MoemergeError, match=words):
            moemerge.export(model, output=tmp_path / "out", form="linear", pairs=rows)
    for options in ({"form": "linear"}, {"form": "dense", "pairs": rows}):
        with pytest.raises(OptionError, match="form linear and pairs go together"):
            moemerge.export(headed, output=tmp_path / "out", **options)
    with pytest.raises(OptionError, match="without coefficients"):
        moemerge.export(None, output=tmp_path / "out", models=[headed, headed], form="linear", pairs=rows)
    with pytest.raises(UnsupportedError, match="(?s)Qwen2-MoE cannot express its head.*form linear"):
        moemerge.export(moe, output=tmp_path / "out", form="qwen2_moe")

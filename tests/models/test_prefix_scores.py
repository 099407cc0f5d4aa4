"""Scores of beginnings by one pass: the oracle is plain transformers, each beginning by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import families, save_dense, tiny_moe
from transformers import AutoModelForSequenceClassification

from moemerge.data.tokenise import Encoded
from moemerge.errors import DataError, UnsupportedError
from moemerge.models.families import FAMILIES
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.prefix_scores import prefix_scores
from moemerge.models.scoring import score

CAUSAL = sorted(name for name, family in FAMILIES.items() if family.causal)
# Pad (0), end (1) and word 9, which some of the models pad with, stand within these and at their ends.
TEXTS = [
    Encoded([5, 7, 9, 12, 1, 30, 9, 41, 0, 17, 9, 1], 3),
    Encoded([40, 3, 22, 8, 1, 0], 2),
    Encoded([11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 9, 9], 5),
    Encoded([6], 0),
]


@torch.no_grad()
def one_by_one(model: Any, text: Encoded, **more: Any) -> list[float]:
    """The score of every beginning, each by a forward pass of its own."""
    begun = [torch.tensor([text.ids[:end]]) for end in range(1, len(text.ids) + 1)]
    return [model(input_ids=ids_1T, **more).logits[0, 0].item() for ids_1T in begun]


@pytest.mark.parametrize("pad", [None, 0, 1, 9])
def test_beginnings_of_every_padding(pad: int | None, tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "model", pad_token_id=pad)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_reward_model(folder, "cpu")
    for tokens in (1, 26, 1000):
        for scores_T, text in zip(prefix_scores(model, TEXTS, tokens), TEXTS, strict=True):
            np.testing.assert_allclose(scores_T, one_by_one(plain, text), atol=2e-6)
    whole = score(model, load_tokenizer(folder), TEXTS, 1000)
    last = [scores_T[-1] for scores_T in prefix_scores(model, TEXTS, 1000)]
    assert last == whole.tolist()  # to the last bit: the same batch


@pytest.mark.parametrize("family", families(CAUSAL))
def test_beginnings_in_every_decoder(family: str, tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "model", family)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    for scores_T, text in zip(prefix_scores(load_reward_model(folder, "cpu"), TEXTS, 30), TEXTS, strict=True):
        np.testing.assert_allclose(scores_T, one_by_one(plain, text), atol=1e-5)


@pytest.mark.parametrize("gate", ["xft", "topk", "prompt"])
@pytest.mark.parametrize("heads", ["shared", "by_expert"])
def test_beginnings_in_a_mixture(gate: str, heads: str) -> None:
    own_heads = heads == "by_expert"
    if own_heads and gate != "prompt":
        pytest.skip("heads by expert go with gate prompt")
    changes = {"num_experts_per_tok": 1, "shared_expert": False, "heads": heads} if own_heads else {}
    model = tiny_moe("llama", gate=gate, **changes).eval()
    for scores_T, text in zip(prefix_scores(model, TEXTS[:3], 40), TEXTS[:3], strict=True):
        more = {"prompt_lengths": torch.tensor([text.prompt_length])} if gate == "prompt" else {}
        start = text.prompt_length - 1  # a gate that looks at prompts has seen a whole one from here on
        np.testing.assert_allclose(scores_T[start:], one_by_one(model, text, **more)[start:], atol=1e-5)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(CAUSAL)))
def test_encoders_are_refused(family: str, tmp_path: Path) -> None:
    model = load_reward_model(save_dense(tmp_path / "model", family), "cpu")
    with pytest.raises(UnsupportedError, match="what each token adds"):
        prefix_scores(model, TEXTS, 100)


def test_coarse_models_have_fine_heads(tmp_path: Path) -> None:
    """In bfloat16 the states are coarse, their scores are not rounded once more."""
    folder = save_dense(tmp_path / "model")
    coarse = load_reward_model(folder, "cpu", torch.bfloat16)
    states: list[torch.Tensor] = []
    coarse.score.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    (scores_T,) = prefix_scores(coarse, TEXTS[2:3], 100)
    expected_T = states[0][0].double() @ coarse.score.weight[0].double()
    np.testing.assert_allclose(scores_T, expected_T.detach().numpy(), atol=1e-5)


def test_faults(tmp_path: Path) -> None:
    model = load_reward_model(save_dense(tmp_path / "model"), "cpu")
    assert prefix_scores(model, [], 10) == []
    with pytest.raises(DataError, match="without tokens"):
        prefix_scores(model, [Encoded([], 0)], 10)

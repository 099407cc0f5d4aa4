"""What the members of a sum say one by one, against checkpoints built by hand and scored by transformers."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_moe import ALPHA, encode, make_moe, random_pairs, rewrite
from tiny_models import save_dense
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from moemerge.data.tokenise import Encoded, texts_of
from moemerge.errors import OptionError
from moemerge.merging.average import as_changes
from moemerge.merging.experts.uncertainty import SpreadScores, score_with_spread
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.base import MergeSource
from moemerge.merging.sources.models import ModelList
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.stages.export import export

HEAD, NAMES = "score.weight", ("a", "b", "c")
SCALES = (0.5, 3.0, 20.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and a, b, c, whose bodies are near it and whose heads are their own."""
    home = tmp_path_factory.mktemp("spread")
    save_dense(home / "base", seed=0)
    for seed, name in enumerate(NAMES, start=1):
        shutil.copytree(home / "base", home / name)
        g = torch.Generator().manual_seed(seed)
        rewrite(home / name, lambda _, t, g=g: t + 0.2 * torch.randn(t.shape, generator=g))
    return home


@torch.no_grad()
def scores(folder: Path, texts: list[Encoded], weights: dict[str, Tensor] | None = None) -> Tensor:
    """By transformers, one text at a time; with `weights` in place of the folder's."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if weights is not None:
        model.load_state_dict(weights)
    return torch.tensor([model(torch.tensor([text.ids])).logits.item() for text in texts])


def spread(source: MergeSource, c_LN: Tensor, texts: list[Encoded]) -> SpreadScores:
    alpha_LN, total_L = as_changes(c_LN)
    merged = MergedModel(source, alpha_LN, 1 - total_L)
    return score_with_spread(merged, source.tokenizer(), texts, 100, coordinates="sum")


def by_hand(home: Path, blocks: list[str], c_LN: Tensor, scales: tuple[float, ...]) -> dict[str, Tensor]:
    """Tensors of base + sum_i c_i (member_i - base), heads divided by their scales first."""
    base, *members = (load_file(home / name / "model.safetensors") for name in ("base", *NAMES))
    made = {}
    for name, start in base.items():
        layer = ".".join(name.split(".")[1:3]) if ".layers." in name else "outside"
        c_N = c_LN[blocks.index("head" if name == HEAD else layer)]
        change = torch.zeros_like(start).double()
        for c, tensors, scale in zip(c_N, members, scales, strict=True):
            own = tensors[name].double() / (scale if name == HEAD else 1)
            change += c * (own - start.double())
        made[name] = (start.double() + change).float()
    return made


@pytest.mark.parametrize("scales", [None, SCALES])
def test_members_are_the_models_themselves_whatever_their_c(
    scales: tuple[float, ...] | None, home: Path, tmp_path: Path
) -> None:
    texts = texts_of(encode(home / "base", random_pairs(4), tmp_path))
    source = ModelList([str(home / name) for name in NAMES], str(home / "base"), "all", "sum", scales)
    blocks = source.blocks()
    c_LN = torch.tensor([0.9, -0.4, 1.7]).double() * torch.linspace(0.7, 1.2, len(blocks))[:, None].double()
    found, units = spread(source, c_LN, texts), scales or (1.0,) * 3
    expected_NT = torch.stack([scores(home / n, texts) / unit for n, unit in zip(NAMES, units, strict=True)])
    torch.testing.assert_close(found.members_NT, expected_NT, rtol=1e-4, atol=1e-5)
    whole_T = scores(home / "base", texts, by_hand(home, blocks, c_LN, units))
    torch.testing.assert_close(found.merged_T, whole_T, rtol=1e-4, atol=1e-4)
    for t in range(len(texts)):
        own = expected_NT[:, t].tolist()
        deviation = math.sqrt(sum((score - sum(own) / 3) ** 2 for score in own) / 3)
        assert found.pessimistic_T(2.0)[t].item() == pytest.approx(
            whole_T[t].item() - 2 * deviation, abs=1e-3
        )
    shifted = found.calibrated(found)
    torch.testing.assert_close(shifted.pessimistic_T(1.0), found.merged_T - shifted.spread_T)
    # A difference of two members sums to no weight at all; they disagree as much as before.
    apart = spread(source, torch.tensor([1.0, -1.0, 0.0]).double().expand(len(blocks), 3), texts)
    assert torch.equal(apart.members_NT, found.members_NT)


def test_members_of_a_moe_are_its_experts(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe")
    texts = texts_of(encode(moe, random_pairs(4), tmp_path))
    found = spread(MoeCheckpoint(moe), 2 * ALPHA, texts)
    experts = export(model=str(moe), output=tmp_path / "experts")
    expected_NT = torch.stack([scores(experts / f"expert-{i}", texts) for i in range(3)])
    torch.testing.assert_close(found.members_NT, expected_NT, rtol=1e-4, atol=1e-4)


def test_a_sum_that_is_not_said_to_be_one_is_refused(home: Path, tmp_path: Path) -> None:
    texts = texts_of(encode(home / "base", random_pairs(2), tmp_path))
    source = ModelList([str(home / name) for name in NAMES], str(home / "base"), "all", "sum")
    count = len(source.blocks())
    for alpha, shared in (([0.2, 0.3, 0.5], -1.0), ([0.2, 0.3, 0.5], 1.5), ([-0.5, 1.0, 0.5], 0.5)):
        alpha_LN = torch.tensor(alpha).double().expand(count, 3)
        merged = MergedModel(source, alpha_LN, torch.full((count,), shared).double())
        with pytest.raises(OptionError, match="are a sum's"):
            score_with_spread(merged, source.tokenizer(), texts, 100)

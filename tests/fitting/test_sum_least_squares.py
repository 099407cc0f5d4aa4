"""least_squares in sums of changes: against numpy's on outputs written out, planted members, by hand."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_moe import make_moe, random_pairs, rewrite, write_rows
from tiny_models import VOCABULARY, save_dense
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import EncodedPair, encode_pairs
from moemerge.errors import CheckpointError
from moemerge.fitting.methods.least_squares import nearest_changes
from moemerge.merging.coefficients import Coefficients
from moemerge.models.loading import load_tokenizer
from moemerge.options.base import TextFormat
from moemerge.stages.fit import fit, fit_models
from moemerge.stages.merge import merge_models

OWNERS = {"a": 0, "b": 1, "c": 2}
Columns = dict[str, list[np.ndarray]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and a, b, c near it, of gpt2 (transposed matrices, biases) in float64; pairs.jsonl by owner."""
    home = tmp_path_factory.mktemp("outputs")
    save_dense(home / "start", "gpt2")
    for seed, (name, away) in enumerate({"base": 0.0, "a": 0.1, "b": 0.2, "c": 0.05}.items()):
        g = torch.Generator().manual_seed(seed)
        shutil.copytree(home / "start", home / name)
        rewrite(home / name, lambda _, t, g=g, x=away: (t + x * torch.randn(t.shape, generator=g)).double())
    write_rows(home / "pairs.jsonl", random_pairs(12, subsets=tuple(OWNERS)))
    return home


def fitted(home: Path, output: Path, **more: Any) -> Coefficients:
    """Fitted on all pairs, which are held out as well."""
    pairs, members = str(home / "pairs.jsonl"), [home / name for name in OWNERS]
    given = {"method": "least_squares", "coordinates": "sum", "owners": OWNERS, "validation": pairs, **more}
    return Coefficients.load(fit_models(members, pairs, output, base=home / "base", **given))


def encoded(folder: Path, pairs: Path) -> list[EncodedPair]:
    read, report = read_pairs(str(pairs), TextFormat())
    return encode_pairs(load_tokenizer(str(folder)), read, TextFormat(), report)


def opened(folder: Path | str) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def written_out(home: Path) -> tuple[Columns, Columns]:
    """By block, over members' own texts one at a time: what each change makes of outputs, and the owner's.

    Inputs are those that transformers gives each linear module of the member; modules are transformers' own.
    """
    models = {name: opened(home / name) for name in ("base", *OWNERS)}
    made, wanted = {}, {}
    for pair in encoded(home / "base", home / "pairs.jsonl"):
        owner = pair.pair.subset
        for name, module in models[owner].named_modules():
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            block = f"layers.{name.split('.')[2]}" if ".h." in name else "head"
            for text in (pair.chosen, pair.rejected):
                kept: list[Tensor] = []
                hook = module.register_forward_pre_hook(lambda _, x, kept=kept: kept.append(x[0]))
                models[owner](torch.tensor([text.ids]))
                hook.remove()
                outputs = {n: m.get_submodule(name)(kept[0]).flatten() for n, m in models.items()}
                change = {n: (y - outputs["base"]).numpy() for n, y in outputs.items()}
                made.setdefault(block, []).append(np.stack([change[n] for n in OWNERS], 1))
                wanted.setdefault(block, []).append(change[owner])
    return made, wanted


@pytest.fixture(scope="module")
def outputs(home: Path) -> tuple[Columns, Columns]:
    return written_out(home)


@pytest.mark.parametrize(("granularity", "l2"), [("layer", 0.0), ("layer", 0.3), ("global", 0.1)])
def test_against_numpy_on_outputs_written_out(
    granularity: str, l2: float, home: Path, outputs: tuple[Columns, Columns], tmp_path: Path
) -> None:
    found = fitted(home, tmp_path / "c", granularity=granularity, l2=l2, scale=1.5)
    made, wanted = outputs
    blocks = [block for block in found.blocks if block in made]
    assert blocks == ["layers.0", "layers.1", "layers.2", "head"]
    shared = [blocks[:3], blocks[3:]] if granularity == "global" else [[block] for block in blocks]
    for names in shared:
        A = np.concatenate([part for name in names for part in made[name]])
        y = np.concatenate([part for name in names for part in wanted[name]])
        start = np.full(3, (1.0 if names == ["head"] else 1.5) / 3)
        pull = np.sqrt(l2 * (A**2).sum() / 3)
        stacked = np.concatenate([A, pull * np.eye(3)]), np.concatenate([y, pull * start])
        c = np.linalg.lstsq(*stacked, rcond=None)[0]
        for name in names:
            np.testing.assert_allclose(found.changes_LN[found.blocks.index(name)], c, rtol=1e-6, atol=1e-8)
    outside = found.changes_LN[found.blocks.index("outside")]
    # Embeddings are looked up: no matrix says anything of the rest, unless it shares its row.
    first = found.changes_LN[found.blocks.index("layers.0")]
    expected = first if granularity == "global" else torch.full((3,), 0.5).double()
    torch.testing.assert_close(outside, expected, rtol=1e-12, atol=0)
    report = json.loads((tmp_path / "c" / "report.json").read_text())
    moved = next(row["l1"] for row in report["moved"] if row["block"] == "layers.0")
    assert moved == pytest.approx(float((first - 0.5).abs().sum()))


# Members that read words of their own


def plant(kinds: tuple[int, ...]) -> Any:
    """Weights that score an answer by its words of three kinds, good ones +1 and bad ones -1.

    Each kind has a dimension of its own. The first layer's values add these up, attending to all tokens
    alike; kinds that are not in `kinds` have the wrong sign, as all have in the base.
    """

    def weight(name: str, tensor: Tensor) -> Tensor:
        planted = tensor.clone()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            planted.zero_()
        if name.endswith("down_proj.weight"):
            planted.zero_()
        if name == "model.layers.0.self_attn.o_proj.weight":
            planted[0, 0] = 1
        if name == "model.layers.0.self_attn.v_proj.weight":
            planted[0, 1:4] = torch.tensor([1.0 if kind in kinds else -1.0 for kind in range(3)])
        if name == "score.weight":
            planted.zero_()[0, 0] = 1
        if name == "model.embed_tokens.weight":
            planted[:, :4] = 0
            for kind in range(3):
                planted[VOCABULARY.index(f"w{kind}"), kind + 1] = 1
                planted[VOCABULARY.index(f"w{10 + kind}"), kind + 1] = -1
        return planted

    return weight


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("planted")
    save_dense(home / "start")
    for name, kinds in {"base": (), "a": (0,), "b": (1,), "c": (2,)}.items():
        rewrite(shutil.copytree(home / "start", home / name), plant(kinds))
    rows = []
    for number in range(18):
        kind, rest = number % 3, f"w{20 + number} w{40 + number}"
        row = {"prompt": f"w{50 - number} ", "subset": "abc"[kind]}
        rows.append({**row, "chosen": f"{rest} w{kind}", "rejected": f"{rest} w{10 + kind}"})
    write_rows(home / "pairs.jsonl", rows)
    return home


@torch.no_grad()
def scores(folder: Path, pairs: list[EncodedPair]) -> Tensor:
    """[P, 2], by transformers, one text at a time."""
    model = opened(folder)
    texts = [(pair.chosen.ids, pair.rejected.ids) for pair in pairs]
    return torch.tensor([[float(model(torch.tensor([ids])).logits) for ids in two] for two in texts])


def test_the_sum_is_every_member_on_its_own_pairs_and_the_average_none(world: Path, tmp_path: Path) -> None:
    pairs, members = encoded(world / "base", world / "pairs.jsonl"), [world / name for name in OWNERS]
    right = {}
    for coordinates, base in {"sum": world / "base", "average": None}.items():
        found = fitted(world, tmp_path / coordinates, coordinates=coordinates, scale=1.2)
        given = {"base": world / "base", "coefficients": tmp_path / coordinates}
        scores_P2 = scores(merge_models(members, tmp_path / f"m-{coordinates}", **given), pairs)
        right[coordinates] = float((scores_P2[:, 0] > scores_P2[:, 1]).double().mean())
        if base is not None:
            c = found.changes_LN[found.blocks.index("layers.0")]
            torch.testing.assert_close(c, torch.ones(3).double(), atol=1e-5, rtol=0)
            owned = [scores(world / pair.pair.subset, [pair])[0] for pair in pairs]
            torch.testing.assert_close(scores_P2, torch.stack(owned), atol=1e-5, rtol=0)
    assert right == {"sum": 1.0, "average": 0.0}


def test_without_owners_a_sum_is_near_the_average_and_that_is_said(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bodies are one, so inputs are, and what is nearest to three heads alike is their mean: c = 1/3 each."""
    home = shutil.copytree(home, tmp_path / "heads")
    for seed, name in enumerate(OWNERS):
        shutil.rmtree(home / name)
        shutil.copytree(home / "base", home / name)
        head = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)).double()
        rewrite(home / name, lambda key, tensor, h=head: h if key == "score.weight" else tensor)
    caplog.set_level(logging.WARNING)
    found = fitted(home, tmp_path / "c", owners={}, scale=0.5)
    head = found.changes_LN[found.blocks.index("head")]
    torch.testing.assert_close(head, torch.full((3,), 1 / 3).double(), atol=1e-8, rtol=0)
    assert "say by owners" in caplog.text
    assert bool((found.changes_LN[:-1] == found.changes_LN[0]).all()), "equal bodies keep the start"
    caplog.clear()
    fitted(home, tmp_path / "d")
    assert "say by owners" not in caplog.text


def test_experts_of_a_moe(tmp_path: Path) -> None:
    moe, pairs = make_moe(tmp_path / "moe"), write_rows(tmp_path / "pairs.jsonl", random_pairs(12))
    given = {"method": "least_squares", "coordinates": "sum", "pairs": str(pairs), "granularity": "group"}
    found = Coefficients.load(fit(model=str(moe), output=tmp_path / "c", **given))
    assert found.coordinates == "sum" and bool(found.changes_LN.isfinite().all())
    assert not torch.allclose(found.changes_LN, torch.full((3,), 2 / 3).double(), atol=0.05)


def test_outputs_that_are_not_finite_are_told(world: Path, tmp_path: Path) -> None:
    home = shutil.copytree(world, tmp_path / "world")
    rewrite(home / "c", lambda name, tensor: tensor * 1e30 if name.endswith("v_proj.weight") else tensor)
    with pytest.raises(CheckpointError, match="outputs that are not finite"):
        fitted(home, tmp_path / "c")


# By hand


def gram(changes: list[list[float]], owner: int) -> Tensor:
    """S of outputs of the base, at zero, and of members, at `changes`, with one member's as target."""
    out_MX = torch.tensor([[0.0] * len(changes[0]), *changes]).double()
    away_MX = out_MX - out_MX[owner + 1]
    return away_MX @ away_MX.T


def test_what_outputs_leave_open_stays_near_the_start() -> None:
    """Twins share what they have to add up to; a member that changes nothing keeps its own."""
    start_N = torch.tensor([0.2, 0.6, 0.7]).double()
    twins = gram([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], owner=0)
    found_N = nearest_changes(twins, start_N, 0.0)  # 0.2 more are needed for a sum of 1
    torch.testing.assert_close(found_N, torch.tensor([0.3, 0.7, 0.7]).double())
    assert torch.equal(nearest_changes(torch.zeros(4, 4).double(), start_N, 0.0), start_N)


def test_factors_of_any_sign() -> None:
    """Changes (1, 0) and (1, 1), targets (0, 1) as if of a third: -1 and 1, which no average is."""
    out_MX = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]).double()
    away_MX = out_MX - torch.tensor([0.0, 1.0]).double()
    found_N = nearest_changes(away_MX @ away_MX.T, torch.ones(2).double(), 0.0)
    torch.testing.assert_close(found_N, torch.tensor([-1.0, 1.0]).double())


def test_the_pull_by_hand() -> None:
    """Changes of sizes 1 and 3 at right angles, u = (1 + 9) / 2: c = (b + l2 u start) / (size^2 + l2 u)."""
    found_N = nearest_changes(gram([[1.0, 0.0], [0.0, 3.0]], owner=1), torch.tensor([0.5, 0.5]).double(), 0.2)
    torch.testing.assert_close(found_N, torch.tensor([(0 + 0.5) / 2, (9 + 0.5) / 10]).double())
    far = nearest_changes(gram([[1.0, 0.0], [0.0, 3.0]], owner=1), torch.tensor([0.5, 0.5]).double(), 1e9)
    torch.testing.assert_close(far, torch.tensor([0.5, 0.5]).double())

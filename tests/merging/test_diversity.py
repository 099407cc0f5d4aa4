"""Diversity of experts, each number against other means: tensors read whole, merged checkpoints, loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_moe import ALPHA, SHARED, N, make_moe, random_pairs, rewrite, write_rows
from tiny_models import save_dense
from torch import Tensor

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import EncodedPair, encode_pairs
from moemerge.errors import DataError
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.experts.diversity import (
    barriers,
    disagreement,
    line_point,
    measure_updates,
    score_pairs_at,
)
from moemerge.merging.experts.report import mean_off_diagonal, plain
from moemerge.merging.experts.speculation import measure_speculation
from moemerge.merging.experts.uncertainty import SpreadScores, member_points, score_with_spread
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.families import family_of
from moemerge.models.families.dense import dense_class, dense_config
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.modelling import load_moe
from moemerge.models.moe import gate_weights, moe_layers
from moemerge.models.routing import gate_mass
from moemerge.options.base import TextFormat
from moemerge.stages.merge import merge
from moemerge.stages.route import route
from moemerge.stages.upcycle import upcycle

PAIRS = 12
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "unshared"])
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("diversity") / "moe", shared_expert=request.param)


@pytest.fixture(scope="module")
def pairs(moe: Path) -> list[EncodedPair]:
    file = write_rows(moe.parent / "pairs.jsonl", random_pairs(PAIRS))
    found, report = read_pairs(str(file), TextFormat())
    return encode_pairs(load_tokenizer(str(moe)), found, TextFormat(), report)


def has_shared(moe: Path) -> bool:
    return MoeCheckpoint(moe).settings.shared_expert


def merged_model(moe: Path) -> MergedModel:
    return MergedModel(MoeCheckpoint(moe), ALPHA, SHARED if has_shared(moe) else torch.zeros_like(SHARED))


def scores_of(folder: Path, pairs: list[EncodedPair]) -> Tensor:
    """[P, 2] by transformers only, one unpadded text at a time."""
    model = load_reward_model(str(folder), "cpu")
    with torch.no_grad():
        return torch.tensor(
            [[model(torch.tensor([getattr(p, s).ids])).logits.item() for s in SIDES] for p in pairs]
        )


def merge_to(moe: Path, output: Path, alpha_LN: Tensor, shared_L: Tensor) -> Path:
    layers = MoeCheckpoint(moe).settings.layers
    found = Coefficients.of_layers(layers, alpha_LN.contiguous(), shared_L.contiguous())
    found.save(output.parent / f"c-{output.name}")
    return merge(model=str(moe), coefficients=str(output.parent / f"c-{output.name}"), output=output)


def vectors(moe: Path, layer: int) -> dict[str, Tensor]:
    """The MLP of the shared expert and of each routed one as a vector, read by llama's tensor names."""
    held, prefix = load_file(moe / "model.safetensors"), f"model.layers.{layer}.mlp."
    names = ("gate_proj", "up_proj", "down_proj")
    found = {}
    if has_shared(moe):
        found["shared"] = torch.cat([held[f"{prefix}shared_expert.{n}.weight"].flatten() for n in names])
    for i in range(N):
        stack = held[f"{prefix}experts.gate_up_proj"][i]
        parts = (stack[:48], stack[48:], held[f"{prefix}experts.down_proj"][i])
        found[str(i)] = torch.cat([part.flatten() for part in parts])
    return {name: vector.double() for name, vector in found.items()}


def test_updates_against_whole_vectors(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moemerge.merging.experts.diversity.CHUNK", 100)
    found = measure_updates(MoeCheckpoint(moe))
    assert found.layers == [0, 1, 2]
    for row in range(3):
        held = vectors(moe, row)
        experts = [held[str(i)] for i in range(N)]
        start = held.get("shared", sum(experts) / N)
        for i, one in enumerate(experts):
            assert found.size_LN[row, i].item() == pytest.approx(((one - start).norm() / start.norm()).item())
            for j, other in enumerate(experts):
                cosine = torch.nn.functional.cosine_similarity(one - start, other - start, dim=0)
                assert found.cosine_LNN[row, i, j].item() == pytest.approx(cosine.item(), abs=1e-12)
                apart = ((one - other).norm() / start.norm()).item()
                assert found.distance_LNN[row, i, j].item() == pytest.approx(apart, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_updates_of_transposed_and_biased_matrices(family: str, tmp_path: Path) -> None:
    """An expert scaled away from the start by hand has cosine 1 with one that went half as far."""
    moe = make_moe(tmp_path / "moe", family)
    source = MoeCheckpoint(moe)
    starts = load_file(moe / "model.safetensors")
    copies = {t.stacked: t for t in family_of(source.config).expert_tensors(source.config)}

    def line(name: str, tensor: Tensor) -> Tensor:
        if name not in copies:
            return tensor
        start, t = starts[copies[name].shared], copies[name]
        start = start.T if t.transposed else start
        return torch.stack([start + step * (tensor[0] - start) for step in (1.0, 0.5, -2.0)])

    found = measure_updates(MoeCheckpoint(rewrite(moe, line)))
    signs = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(found.cosine_LNN, signs.outer(signs).expand(3, N, N), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.size_LN[:, 1] * 4, found.size_LN[:, 2], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.distance_LNN[:, 0, 2], 3 * found.size_LN[:, 0], rtol=1e-5, atol=0.0)


def test_experts_that_did_not_move_have_no_cosine(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    upcycle(model=str(dense), output=tmp_path / "moe", num_routed_experts=2, num_experts_per_tok=1)
    found = measure_updates(MoeCheckpoint(tmp_path / "moe"))
    assert found.cosine_LNN.isnan().all() and not found.distance_LNN.any() and not found.size_LN.any()


def test_members_are_the_merged_checkpoints(moe: Path, pairs: list[EncodedPair], tmp_path: Path) -> None:
    merged, tokenizer = merged_model(moe), load_tokenizer(str(moe))
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    before = {name: weight.clone() for name, weight in merged.model.state_dict().items()}
    found = score_with_spread(merged, tokenizer, texts, 100)
    expected = []
    for i in range(N):
        alpha_LN = torch.zeros(3, N, dtype=torch.float64)
        alpha_LN[:, i] = 1
        expected.append(
            scores_of(merge_to(moe, tmp_path / str(i), alpha_LN, merged.shared_L), pairs).flatten()
        )
    whole = scores_of(merge_to(moe, tmp_path / "all", ALPHA, merged.shared_L), pairs).flatten()
    torch.testing.assert_close(found.merged_T, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.members_NT, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(weight, merged.model.state_dict()[name]) for name, weight in before.items())
    for t in range(len(texts)):
        scores = [one[t].item() for one in expected]
        mean = sum(scores) / N
        spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / N)
        assert found.mean_T[t].item() == pytest.approx(mean, abs=1e-4)
        assert found.spread_T[t].item() == pytest.approx(spread, abs=1e-4)
        assert found.pessimistic_T(0.5)[t].item() == pytest.approx(mean - 0.5 * spread, abs=2e-4)
    assert found.spread_T.max() > 0.01


def test_disagreement_by_hand() -> None:
    """Two members, two pairs, the second one's scores 7 too high. One verdict of two differs."""
    scores = torch.tensor([[[0.0, 1.0], [3.0, 2.0]], [[9.0, 8.0], [8.0, 13.0]], [[0.0, 1.0], [3.0, 2.0]]])
    found = disagreement(scores[:2])
    one, other = np.array([-1.5, -0.5, 1.5, 0.5]), np.array([-0.5, -1.5, -1.5, 3.5])
    assert found.ratio == pytest.approx(np.abs(one - other).mean() / 2 / ((one + other) / 2).std())
    assert found.flips_NN.tolist() == [[0, 1], [1, 0]]
    assert disagreement(scores).flips_NN.tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert disagreement(scores[[0, 2]]).ratio == 0


def test_calibrated_members_differ_in_judgement_only() -> None:
    generator = torch.Generator().manual_seed(0)
    texts_T, levels_N = torch.randn(9, generator=generator), torch.tensor([-3.0, 0.0, 6.0])
    shifted = SpreadScores(texts_T, texts_T + levels_N[:, None])
    assert shifted.spread_T.min() > 3 and shifted.calibrated(shifted).spread_T.max() < 1e-6
    torch.testing.assert_close(shifted.calibrated(shifted).mean_T, shifted.mean_T)
    reference = SpreadScores(texts_T[:4], torch.zeros(3, 4))
    assert torch.equal(shifted.calibrated(reference).members_NT, shifted.members_NT)


def test_barriers_against_merged_checkpoints(moe: Path, pairs: list[EncodedPair], tmp_path: Path) -> None:
    merged, tokenizer = merged_model(moe), load_tokenizer(str(moe))
    found = barriers(merged, tokenizer, pairs, 100)
    members = N + has_shared(moe)
    assert found.shape == (members, members) and torch.equal(found, found.T) and not found.diagonal().any()
    assert found.max() > 0
    for one, other in ((0, 1), (1, 2), (0, members - 1)):
        losses = []
        for t in (0, 0.25, 0.5, 0.75, 1):
            weight = [0.0] * members
            weight[one], weight[other] = 1 - t, t
            losses.append(loss_of(weight, moe, pairs, tmp_path / f"{one}-{other}-{t}"))
        above = [loss - (1 - k / 4) * losses[0] - k / 4 * losses[4] for k, loss in enumerate(losses)]
        assert found[one, other].item() == pytest.approx(max(above), abs=2e-5)


def loss_of(weight: list[float], moe: Path, pairs: list[EncodedPair], output: Path) -> float:
    """Bradley-Terry loss of the dense checkpoint whose MLPs are summed here, tensor by tensor."""
    source, held = MoeCheckpoint(moe), load_file(moe / "model.safetensors")
    tensors = {name: held[name] for name in source.backbone}
    for layer in range(3):
        vector = sum(w * v for w, v in zip(weight, vectors(moe, layer).values(), strict=True))
        parts = vector.float().split(48 * 32)
        shapes = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = part.reshape(shape)
    config = dense_config(source.config)
    model = dense_class(config)(config)
    model.load_state_dict(tensors)
    model.save_pretrained(output)
    gaps = [chosen - rejected for chosen, rejected in scores_of(output, pairs).double().tolist()]
    return sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps)


def test_line_points_are_averages_of_their_ends(moe: Path) -> None:
    merged, shared = merged_model(moe), has_shared(moe)
    alpha_LN, shared_L = line_point(merged, int(shared), shared + 1, 0.25)
    assert alpha_LN.tolist() == [[0.75, 0.25, 0.0]] * 3 and not shared_L.any()
    if shared:
        alpha_LN, shared_L = line_point(merged, 0, 2, 0.25)
        assert alpha_LN.tolist() == [[0.0, 1.0, 0.0]] * 3 and shared_L.tolist() == [0.75] * 3
        assert line_point(merged, 0, 0, 0.0)[1].tolist() == [1.0] * 3


def gates_by_text(moe: Path, pairs: list[EncodedPair]) -> dict[str, Tensor]:
    """Sums of gate weights by side, [P, L, N], from the routers' logits, one unpadded text at a time."""
    model, logits = load_moe(moe), []
    for layer in moe_layers(model).values():
        layer.gate.register_forward_hook(lambda _m, _i, out: logits.append(out.double()))
    found = {}
    for side in SIDES:
        sums = torch.zeros(len(pairs), 3, N, dtype=torch.float64)
        for p, pair in enumerate(pairs):
            logits.clear()
            with torch.no_grad():
                model(input_ids=torch.tensor([getattr(pair, side).ids]))
            for row, logits_TN in enumerate(logits):
                _, index_TK, weights_TK, _ = gate_weights(logits_TN, 2, "xft", has_shared(moe))
                sums[p, row].index_add_(0, index_TK.flatten(), weights_TK.flatten().double())
        found[side] = sums
    return found


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_gate_mass_by_text(moe: Path, pairs: list[EncodedPair], batch_tokens: int) -> None:
    model = load_moe(moe)
    texts = [getattr(pair, side) for side in SIDES for pair in pairs]
    scores_T, mass_TLN = gate_mass(model, load_tokenizer(str(moe)), texts, batch_tokens)
    expected = gates_by_text(moe, pairs)
    torch.testing.assert_close(mass_TLN, torch.cat([expected[s] for s in SIDES]), rtol=1e-5, atol=1e-5)
    by_pair = scores_of(moe, pairs)
    torch.testing.assert_close(scores_T, by_pair.T.flatten(), rtol=1e-4, atol=1e-4)
    assert all(layer.observer is None for layer in moe_layers(model).values())


def test_speculation_against_loops(moe: Path, pairs: list[EncodedPair]) -> None:
    found = measure_speculation(load_moe(moe), load_tokenizer(str(moe)), pairs, 100, seed=3, resamples=200)
    mass, scores = gates_by_text(moe, pairs), scores_of(moe, pairs)[:, 1].tolist()
    high = sorted(range(PAIRS), key=lambda p: -scores[p])[:3]
    tokens = {side: [len(getattr(pair, side).ids) for pair in pairs] for side in SIDES}

    def per_token(side: str, rows: list[int], row: int, expert: int) -> float:
        return sum(mass[side][p, row, expert].item() for p in rows) / sum(tokens[side][p] for p in rows)

    for row in range(3):
        for i in range(N):
            top = per_token("rejected", high, row, i)
            others = per_token("rejected", [p for p in range(PAIRS) if p not in high], row, i)
            chosen = per_token("chosen", list(range(PAIRS)), row, i)
            assert found.over_rejected.value[row, i] == pytest.approx(top / others, rel=1e-4)
            assert found.over_chosen.value[row, i] == pytest.approx(top / chosen, rel=1e-4)
    resampled(found, mass, tokens, high)


def resampled(found: Any, mass: dict[str, Tensor], tokens: dict[str, list[int]], high: list[int]) -> None:
    """Intervals from the same draws of pairs, one ratio at a time."""
    ratios = []
    random = np.random.default_rng(3)
    for drawn in random.integers(0, PAIRS, size=(200, PAIRS)):
        tops, others = [p for p in drawn if p in high], [p for p in drawn if p not in high]
        if tops and others:
            sides = [
                sum(mass["rejected"][p, 1, 2].item() for p in rows) / sum(tokens["rejected"][p] for p in rows)
                for rows in (tops, others)
            ]
            ratios.append(sides[0] / sides[1])
    low, high_end = np.quantile(ratios, [0.025, 0.975])
    assert found.over_rejected.low[1, 2] == pytest.approx(low, rel=1e-4)
    assert found.over_rejected.high[1, 2] == pytest.approx(high_end, rel=1e-4)


def test_a_planted_speculative_expert_is_found(
    moe: Path, pairs: list[EncodedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert 2 of layer 1 gets twice the mass where a rejected answer scores high; expert 0 half of it."""
    many = pairs * 5
    generator = torch.Generator().manual_seed(0)
    scores_P2 = torch.randn(len(many), 2, generator=generator)
    tokens_P2 = torch.tensor([[len(getattr(pair, side).ids) for side in SIDES] for pair in many]).double()
    noise_P2LN = 1 + 0.1 * torch.rand(len(many), 2, 3, N, generator=generator, dtype=torch.float64)
    mass_P2LN = noise_P2LN * tokens_P2[:, :, None, None]
    high = scores_P2[:, 1].topk(len(many) // 4).indices
    mass_P2LN[high, 1, 1, 2] *= 2
    mass_P2LN[high, 1, 0, 0] /= 2
    planted = (scores_P2.flatten(), mass_P2LN.flatten(0, 1))
    monkeypatch.setattr("moemerge.merging.experts.speculation.gate_mass", lambda *_: planted)
    found = measure_speculation(load_moe(moe), load_tokenizer(str(moe)), many, 100, seed=0)
    assert (1, 2) in found.suspects and (0, 0) not in found.suspects
    assert found.over_rejected.value[1, 2] == pytest.approx(2, rel=0.03)
    assert found.over_chosen.high[0, 0] < 0.6


def test_an_expert_that_nobody_uses_has_no_ratio(tmp_path: Path, pairs: list[EncodedPair]) -> None:
    moe = make_moe(tmp_path / "moe")
    rewrite(moe, lambda name, tensor: tensor.zero_() if ".0.mlp.gate." in name else tensor)
    found = measure_speculation(load_moe(moe), load_tokenizer(str(moe)), pairs, 100, seed=0)
    assert np.isnan(found.over_rejected.value[0]).tolist() == [False, False, True]
    assert np.isfinite(found.over_rejected.value[1:]).all()


def test_too_few_pairs_are_refused(moe: Path, pairs: list[EncodedPair]) -> None:
    with pytest.raises(DataError, match="too few pairs"):
        measure_speculation(load_moe(moe), load_tokenizer(str(moe)), pairs[:7], 100, seed=0)


def test_scores_at_members_have_the_shape_of_pairs(moe: Path, pairs: list[EncodedPair]) -> None:
    merged = merged_model(moe)
    points = member_points(merged.alpha_LN, merged.shared_L)
    found = score_pairs_at(merged, load_tokenizer(str(moe)), pairs, points, 100)
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    members_NT = score_with_spread(merged, load_tokenizer(str(moe)), texts, 100).members_NT
    torch.testing.assert_close(found.flatten(1), members_NT, rtol=0, atol=0)


def test_stage_writes_what_was_measured(moe: Path, pairs: list[EncodedPair], tmp_path: Path) -> None:
    file = str(moe.parent / "pairs.jsonl")
    folder = route(model=str(moe), pairs=file, output=tmp_path / "all", diversity="all", probe_pairs=10)
    held = json.loads((folder / "diversity.json").read_text())
    merged, tokenizer, first = merged_model(moe), load_tokenizer(str(moe)), pairs[:10]
    updates, line = measure_updates(merged.source), barriers(merged, tokenizer, first, 10_000)
    points = member_points(ALPHA, torch.full((3,), 0.5 * has_shared(moe), dtype=torch.float64))
    judged = disagreement(score_pairs_at(merged, tokenizer, first, points, 10_000))
    spied = measure_speculation(load_moe(moe), tokenizer, first, 10_000, seed=0)
    assert held["layers"] == [0, 1, 2] and held["cosine"] == updates.cosine_LNN.tolist()
    assert held["distance"] == updates.distance_LNN.tolist() and held["size"] == updates.size_LN.tolist()
    assert held["verdicts_that_differ"] == judged.flips_NN.tolist()
    assert held["disagreement"] == pytest.approx(judged.ratio, rel=1e-5)
    np.testing.assert_allclose(held["barriers"], line, atol=1e-5)
    for name, ratio in (("over_rejected", spied.over_rejected), ("over_chosen", spied.over_chosen)):
        for end, values in vars(ratio).items():
            np.testing.assert_allclose(held["speculation"][name][end], values, rtol=1e-4)
    told = read_manifest(folder)["results"]["diversity"]
    apart = [(0, 1), (0, 2), (1, 2)]
    means = [sum(row[i][j] for i, j in apart) / 3 for row in held["cosine"]]
    assert told["cosine"] == pytest.approx(means)
    assert told["largest_barrier"] == np.max(held["barriers"])
    assert told["speculative_experts"] == held["speculative_experts"] == [list(s) for s in spied.suspects]
    report = (folder / "routing.md").read_text()
    assert f"{held['barriers'][-2][-1]:.4f}" in report and f"{judged.ratio:.4f}" in report
    assert ("shared and 0" in report) == has_shared(moe)
    for name in ("update_cosine", "update_distance", "barriers", "speculation"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"]({name}.png)" in report


def test_stage_with_weights_only_scores_nothing_more(moe: Path, tmp_path: Path) -> None:
    given = {"model": str(moe), "pairs": str(moe.parent / "pairs.jsonl")}
    folder = route(**given, output=tmp_path / "weights", diversity="weights")
    held = json.loads((folder / "diversity.json").read_text())
    assert held.keys() == {"layers", "cosine", "distance", "size"}
    without = route(**given, output=tmp_path / "none")
    names = {path.name for path in folder.iterdir()} - {path.name for path in without.iterdir()}
    maps = {f"{name}{end}" for name in ("update_cosine", "update_distance") for end in (".png", ".plot.json")}
    assert names == {"diversity.json", *maps}
    report = (without / "routing.md").read_text()
    tables = report.removesuffix("![gate mass](gate_mass.png)\n")
    assert tables and (folder / "routing.md").read_text().startswith(tables)
    assert "diversity" not in read_manifest(without)["results"]


def test_untrained_experts_are_reported_without_a_cosine(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    upcycle(model=str(dense), output=tmp_path / "moe", num_routed_experts=2, num_experts_per_tok=1)
    file = write_rows(tmp_path / "pairs.jsonl", random_pairs(8))
    folder = route(model=str(tmp_path / "moe"), pairs=str(file), output=tmp_path / "r", diversity="all")
    told = read_manifest(folder)["results"]["diversity"]
    assert told["cosine"] == [None] * 3 and told["distance"] == [0.0] * 3
    assert told["verdicts_that_differ"] == told["disagreement"] == 0
    assert told["largest_barrier"] == pytest.approx(0, abs=1e-7)
    assert not (folder / "update_cosine.png").exists()


def test_means_over_pairs_leave_out_pairs_without_a_value() -> None:
    """Of three experts the last did not move: one cosine is left."""
    nan = math.nan
    cosine_NN = torch.tensor([[1, 0.5, nan], [0.5, 1, nan], [nan, nan, nan]], dtype=torch.float64)
    assert mean_off_diagonal(cosine_NN[None]) == [0.5]
    assert plain({"a": cosine_NN[:1], "b": (nan, 1)}) == {"a": [[1.0, 0.5, None]], "b": [None, 1]}

"""Routing statistics: a brute-force recount with padding, batches, addition, files, the stage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from small_moe import K, N, make_moe, random_pairs, rewrite, write_rows
from tiny_models import save_dense
from torch import Tensor

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import EncodedPair, encode_pairs
from moemerge.errors import CheckpointError, DataError
from moemerge.models.loading import load_tokenizer
from moemerge.models.modelling import load_moe
from moemerge.models.moe import moe_layers
from moemerge.models.routing import RoutingStatistics, Sums
from moemerge.options.base import TextFormat
from moemerge.stages.route import collect, route

SUBSETS = ("plain", "code")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("route") / "moe")


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", random_pairs(14, subsets=SUBSETS))


def encoded_pairs(moe: Path, pairs_file: Path) -> list[EncodedPair]:
    pairs, report = read_pairs(str(pairs_file), TextFormat())
    return encode_pairs(load_tokenizer(str(moe)), pairs, TextFormat(), report)


def statistics(moe: Path, pairs: list[EncodedPair], batch_tokens: int = 100) -> RoutingStatistics:
    return collect(load_moe(moe), load_tokenizer(str(moe)), pairs, batch_tokens)


def recount(moe: Path, pairs: list[EncodedPair]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The same sums from the router's logits, one unpadded text and one token at a time (gate xft)."""
    model, found = load_moe(moe), {}
    layers = moe_layers(model)
    logits: dict[int, Tensor] = {}
    for number, layer in layers.items():
        layer.gate.register_forward_hook(lambda _m, _i, out, n=number: logits.update({n: out.double()}))
    for pair in pairs:
        for side in ("chosen", "rejected"):
            sums = found.setdefault((pair.pair.subset, side), vars(Sums.zeros(len(layers), N)))
            with torch.no_grad():
                model(input_ids=torch.tensor([getattr(pair, side).ids]))
            for row, number in enumerate(layers):
                for token_N in logits[number]:
                    add_token(sums, row, token_N.softmax(0).tolist())
    return found


def add_token(sums: dict[str, Tensor], row: int, s: list[float]) -> None:
    selected = sorted(range(N), key=lambda i: -s[i])[:K]
    powers = {i: torch.tensor(s[i]).double().exp().item() for i in selected}
    for i in selected:
        sums["selections_LN"][row, i] += 1
        sums["gate_LN"][row, i] += max(s) * powers[i] / sum(powers.values())
        for j in selected:
            sums["together_LNN"][row, i, j] += 1
    for i in range(N):
        sums["probability_LN"][row, i] += s[i]
        sums["entropy_L"][row] -= s[i] * torch.tensor(s[i]).double().log().item()
    sums["shared_L"][row] += 1 - max(s)
    sums["tokens_L"][row] += 1


def assert_alike(one: RoutingStatistics, other: RoutingStatistics) -> None:
    assert one.groups.keys() == other.groups.keys()
    for group, sums in one.groups.items():
        assert_sums(vars(sums), vars(other.groups[group]))


def assert_sums(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        if name in ("selections_LN", "together_LNN", "tokens_L"):
            assert torch.equal(value, other[name]), name
        else:
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-5)


def test_equals_a_brute_force_recount(moe: Path, pairs_file: Path) -> None:
    pairs = encoded_pairs(moe, pairs_file)
    lengths = {len(text.ids) for pair in pairs for text in (pair.chosen, pair.rejected)}
    assert len(lengths) > 5, "the batches must hold padding for this test to mean something"
    ours, theirs = statistics(moe, pairs, batch_tokens=10_000), recount(moe, pairs)
    assert ours.groups.keys() == theirs.keys() == {(s, t) for s in SUBSETS for t in ("chosen", "rejected")}
    for group, sums in theirs.items():
        assert_sums(vars(ours.groups[group]), sums)


def test_tokens_add_up(moe: Path, pairs_file: Path) -> None:
    pairs = encoded_pairs(moe, pairs_file)
    found, tokens = statistics(moe, pairs), Counter()
    for pair in pairs:
        tokens[pair.pair.subset, "chosen"] += len(pair.chosen.ids)
        tokens[pair.pair.subset, "rejected"] += len(pair.rejected.ids)
    for group, sums in found.groups.items():
        assert sums.tokens_L.tolist() == [tokens[group]] * 3
    total = found.total()
    assert total.selections_LN.sum(1).tolist() == [K * tokens.total()] * 3
    assert torch.equal(total.together_LNN.diagonal(dim1=1, dim2=2), total.selections_LN)
    torch.testing.assert_close(total.gate_LN.sum(1) + total.shared_L, total.tokens_L, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(total.probability_LN.sum(1), total.tokens_L, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("batch_tokens", [1, 37, 10_000])
def test_batches_change_nothing(moe: Path, pairs_file: Path, batch_tokens: int) -> None:
    pairs = encoded_pairs(moe, pairs_file)
    assert_alike(statistics(moe, pairs, batch_tokens), statistics(moe, pairs, 100))


def test_two_passes_merge_into_one(moe: Path, pairs_file: Path, tmp_path: Path) -> None:
    pairs = encoded_pairs(moe, pairs_file)
    first, second = statistics(moe, pairs[:5]), statistics(moe, pairs[5:])
    merged = first.merge(second)
    assert_alike(merged, statistics(moe, pairs))
    assert_alike(RoutingStatistics.load(first.save(tmp_path / "1")).merge(second), merged)
    assert first.total().tokens_L[0] < merged.total().tokens_L[0], "merge must not change its operands"
    other = RoutingStatistics([0, 1], N, K)
    with pytest.raises(CheckpointError, match="different models"):
        first.merge(other)


def test_prompt_gate_counts_every_token_with_its_prompts_gate(tmp_path: Path, pairs_file: Path) -> None:
    moe = make_moe(tmp_path / "moe", gate="prompt")
    pairs = encoded_pairs(moe, pairs_file)
    found = statistics(moe, pairs[:1]).total()
    tokens = len(pairs[0].chosen.ids) + len(pairs[0].rejected.ids)
    assert found.tokens_L.tolist() == [tokens] * 3
    assert sorted(found.selections_LN[0].tolist()) == [0.0, tokens, tokens], "one prompt, one gate"


def test_save_and_load_are_exact(moe: Path, pairs_file: Path, tmp_path: Path) -> None:
    found = statistics(moe, encoded_pairs(moe, pairs_file))
    found.meta["model"] = "abc"
    path = found.save(tmp_path / "statistics")
    for source in (path, path.parent):
        again = RoutingStatistics.load(source)
        assert (again.layers, again.num_experts, again.num_experts_per_tok) == ([0, 1, 2], N, K)
        assert again.meta["model"] == "abc"
        assert list(again.groups) == list(found.groups)
        for group, sums in found.groups.items():
            assert all(torch.equal(v, vars(again.groups[group])[n]) for n, v in vars(sums).items())
    header = path.read_bytes()[:1000].decode(errors="replace")
    assert "moemerge routing statistics 1" in header and '[\\"plain\\", \\"chosen\\"]' in header


def test_damaged_files_are_refused(moe: Path, pairs_file: Path, tmp_path: Path) -> None:
    path = statistics(moe, encoded_pairs(moe, pairs_file)).save(tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-8], whole.replace(b"statistics 1", b"statistics 9"), b"no safetensors" * 9):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be read"):
            RoutingStatistics.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        RoutingStatistics.load(tmp_path / "nowhere")


def test_shares_by_hand() -> None:
    """Two layers; expert 2 of the first is never selected. 4 tokens chosen, 6 rejected."""
    found = RoutingStatistics([3, 5], 3, 1, {("", side): Sums.zeros(2, 3) for side in ("chosen", "rejected")})
    chosen, rejected = found.groups.values()
    chosen.gate_LN += torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.5, 1.0]])
    rejected.gate_LN += torch.tensor([[3.0, 0.0, 0.0], [0.5, 0.5, 1.0]])
    for sums, tokens, shared in ((chosen, 4, 2.0), (rejected, 6, 3.0)):
        sums.tokens_L += tokens
        sums.shared_L += shared
    torch.testing.assert_close(
        found.gate_mass_LN(), torch.tensor([[0.8, 0.2, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64)
    )
    assert found.gate_mass_LN(side="chosen")[0].tolist() == [0.5, 0.5, 0.0]
    assert found.shared_mass_L().tolist() == [0.5, 0.5]
    for subset, side in (("other", None), (None, "neither")):
        with pytest.raises(DataError, match="no routed tokens"):
            found.gate_mass_LN(subset, side)


def test_observers_are_taken_off(moe: Path) -> None:
    layers = moe_layers(load_moe(moe))
    observing = RoutingStatistics([0, 1, 2], N, K).observe(layers, [("", "chosen")])
    with pytest.raises(RuntimeError, match="on purpose"), observing as on_batch:
        on_batch([0])
        assert all(layer.observer is not None for layer in layers.values())
        raise RuntimeError("on purpose")
    assert all(layer.observer is None for layer in layers.values())


def test_stage_writes_what_it_counted(moe: Path, pairs_file: Path, tmp_path: Path) -> None:
    folder = route(model=str(moe), pairs=str(pairs_file), output=tmp_path / "route", max_pairs=5)
    found = RoutingStatistics.load(folder)
    assert_alike(found, statistics(moe, encoded_pairs(moe, pairs_file)[:5]))
    results = read_manifest(folder)["results"]
    assert results["pairs"] == 5 and results["layers"] == [0, 1, 2]
    assert results["entropy"] == found.entropy_L().tolist()
    assert results["max_share"] == found.gate_mass_LN().max(1).values.tolist()
    assert results["dead_experts"] == {}
    assert (folder / "gate_mass.png").read_bytes().startswith(b"\x89PNG")
    assert f"{found.gate_mass_LN()[2, 1]:.4f}" in (folder / "routing.md").read_text()
    assert folder.rows()[2]["expert 1"] == found.gate_mass()[2, 1] and len(folder.rows()) == len(found.layers)


def test_dead_experts_are_reported(tmp_path: Path, pairs_file: Path) -> None:
    """A zero router always selects the first K experts."""
    moe = make_moe(tmp_path / "moe", router_init="zero", layers="1")
    rewrite(moe, lambda name, tensor: tensor.zero_() if ".gate." in name else tensor)
    results = read_manifest(route(model=str(moe), pairs=str(pairs_file), output=tmp_path / "r"))["results"]
    assert results["dead_experts"] == {"1": [2]}


def test_a_dense_model_cannot_be_routed(tmp_path: Path, pairs_file: Path) -> None:
    with pytest.raises(CheckpointError, match="not a MoE"):
        route(model=str(save_dense(tmp_path / "dense")), pairs=str(pairs_file), output=tmp_path / "r")

"""Every architecture through the whole chain: upcycle, train, save, load, route, fit, merge, stock mergekit.

The tiny models are lively: random norms, biases and large weights, so that a wrong activation, a lost bias
or a swapped matrix moves the scores by far more than any tolerance here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_moe import ALPHA, SHARED, gradient_of, random_pairs, rewrite, stock_merge, write_rows
from tiny_models import (
    CORE,
    SIZES,
    TINY,
    batch,
    families,
    scores,
    tiny_dense,
    tiny_tokenizer,
    tokenizer_of,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import logsigmoid
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

import moemerge
from moemerge.artifacts.manifest import read_manifest
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import EncodedPair, encode_pairs
from moemerge.errors import UnsupportedError
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.mergekit.bridge import mlp_layer
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.families import ENCODERS, FAMILIES, GATED, PLAIN, family_called, family_of
from moemerge.models.families.base import PREFIX
from moemerge.models.families.refused import REFUSED
from moemerge.models.families.table import table
from moemerge.models.loading import load_tokenizer
from moemerge.models.modelling import load_moe
from moemerge.models.moe import Gating, MoELayer, moe_layers
from moemerge.models.portable import make_portable
from moemerge.models.scoring import collate
from moemerge.options.base import TextFormat
from moemerge.stages.export import export
from moemerge.stages.merge import merge
from moemerge.stages.route import collect
from moemerge.stages.train import train
from moemerge.stages.upcycle import upcycle

EVEN = torch.full((3, 3), 1 / 3, dtype=torch.float64)


def lively(family: str, folder: Path) -> nn.Module:
    """A dense model none of whose tensors is zero or one, saved with its tokenizer."""
    model = tiny_dense(family)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


@pytest.mark.parametrize("family", families())
def test_the_whole_chain(family: str, tmp_path: Path) -> None:
    dense = lively(family, tmp_path / "dense")
    options = {"num_routed_experts": 3, "num_experts_per_tok": 2, "balance_coefficient": 0.1}
    folder = upcycle(model=str(tmp_path / "dense"), output=tmp_path / "moe", **options)
    moe = load_moe(folder)
    equals_dense(moe, dense)
    observes_every_token(moe)
    prompts_see_the_answer(moe, not FAMILIES[family].causal)
    merges_into_the_dense_model(folder, dense, tmp_path)
    trains(moe)
    saves_and_loads(moe, tmp_path / "trained")
    rewrite(folder, noise())
    pairs = encoded_pairs(folder, tmp_path)
    routes(folder, pairs)
    fits(folder, pairs)
    merges_what_was_trained(folder, dense, tmp_path)
    merges_in_stock_mergekit(folder, tmp_path)


def encoded_pairs(folder: Path, home: Path) -> list[EncodedPair]:
    pairs, report = read_pairs(str(write_rows(home / "pairs.jsonl", random_pairs(3))), TextFormat())
    return encode_pairs(load_tokenizer(str(folder)), pairs, TextFormat(), report)


def routes(folder: Path, pairs: list[EncodedPair]) -> None:
    """Every real token is counted once per layer, with gate weights that sum to one."""
    seen = collect(load_moe(folder), load_tokenizer(str(folder)), pairs, batch_tokens=60).total()
    count = sum(len(text.ids) for pair in pairs for text in (pair.chosen, pair.rejected))
    assert seen.tokens_L.tolist() == [count] * 3
    torch.testing.assert_close(seen.selections_LN.sum(1), torch.full((3,), 2.0 * count, dtype=torch.float64))
    torch.testing.assert_close(seen.gate_LN.sum(1) + seen.shared_L, seen.tokens_L, rtol=1e-5, atol=0)


def fits(folder: Path, pairs: list[EncodedPair]) -> None:
    """The gradient of the coefficients equals autograd's through the merge."""
    merged = MergedModel(MoeCheckpoint(folder), ALPHA, SHARED)
    ours = gradient_of(merged, pairs, 2)
    alpha_LN, shared_L = ALPHA.clone().requires_grad_(), SHARED.clone().requires_grad_()
    weights = {}
    for tensor in merged.source.tensors:
        row = merged.rows[tensor.dense]
        shared, *routed = merged.source.matrices(tensor)
        mean = sum(a * matrix for a, matrix in zip(alpha_LN[row], routed, strict=True))
        weights[tensor.dense] = (shared_L[row] * shared + (1 - shared_L[row]) * mean).float()
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    inputs = collate(texts, 0, False, torch.device("cpu"))
    scores_B = functional_call(merged.model, weights, (), inputs).logits[:, 0].double()
    loss = -logsigmoid(scores_B[: len(pairs)] - scores_B[len(pairs) :]).mean()
    expected_LN, expected_L = torch.autograd.grad(loss, [alpha_LN, shared_L])
    found = [gradient - gradient.mean(1, keepdim=True) for gradient in (ours.alpha_LN, expected_LN)]
    assert ours.loss == pytest.approx(loss.item(), rel=1e-4)
    scale = float(expected_LN.abs().max())
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3 * scale)
    torch.testing.assert_close(ours.shared_L, expected_L, rtol=2e-3, atol=2e-3 * scale)


def merges_in_stock_mergekit(folder: Path, home: Path) -> None:
    """linear.yml over the exported experts gives the bits of our own reading of the MoE."""
    options: dict[str, Any] = {"model": str(folder), "coefficients": str(home / "fit" / "coefficients")}
    exported = export(**options, output=home / "experts")
    stock = Checkpoint(stock_merge(exported / "linear.yml", home / "stock"))
    ours = Checkpoint(
        merge(**options, output=home / "linear", method="linear", parameters={"normalize": False})
    )
    assert set(stock.names) == set(ours.names)
    assert all(torch.equal(stock.tensor(name), ours.tensor(name)) for name in ours.names)


def equals_dense(moe: nn.Module, dense: nn.Module) -> None:
    """With every gate; and the MLPs matter: others give other scores."""
    expected = scores(dense)
    assert close(scores(moe), expected)
    layers = moe_layers(moe).values()
    settings = next(iter(layers)).settings
    for gate in ("topk", "prompt"):
        for layer in layers:
            layer.settings = replace(settings, gate=gate)
        assert close(scores(moe, prompt_lengths=torch.tensor([3, 2, 1, 9])), expected)
    for layer in layers:
        layer.settings = settings
    last = list(layers)[-1].experts
    kept, last.act_fn = last.act_fn, nn.Identity()
    assert not torch.allclose(scores(moe), expected, rtol=1e-3)
    last.act_fn = kept


def observes_every_token(moe: nn.Module) -> None:
    seen: dict[int, list[Gating]] = {number: [] for number in moe_layers(moe)}
    for number, layer in moe_layers(moe).items():
        layer.observer = seen[number].append
    scores(moe)
    for layer in moe_layers(moe).values():
        layer.observer = None
    assert list(seen) == [0, 1, 2]
    for (gating,) in seen.values():
        assert torch.equal(gating.mask_T.reshape(4, 13), batch()["attention_mask"].bool())
        assert len(gating.weights_TK) == 4 * 13


@torch.no_grad()
def prompts_see_the_answer(moe: nn.Module, expected: bool) -> None:
    """Whether the last token changes what the last layer's router says of those before it."""
    seen: list[Tensor] = []
    last = moe_layers(moe)[2]
    last.observer = lambda gating: seen.append(gating.probabilities_TN[:12])
    ids_BT = batch()["input_ids"][:1]
    for token in (5, 6):
        ids_BT[0, 12] = token
        moe(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    last.observer = None
    assert (not torch.allclose(*seen, rtol=0, atol=1e-6)) == expected


def trains(moe: nn.Module) -> None:
    """One step of plain descent moves experts, shared experts and routers in every layer."""
    before = {name: weight.detach().clone() for name, weight in moe.named_parameters()}
    scores_B = moe.train()(**batch()).logits[:, 0]
    (scores_B[0] - scores_B[1]).sigmoid().log().neg().backward()
    torch.optim.AdamW(moe.parameters(), lr=1e-3).step()
    moe.zero_grad()
    names = [name for layer in tensors_of(moe) for name in layer]
    assert len(names) >= 3 * 5
    weights = dict(moe.named_parameters())
    assert [name for name in names if torch.equal(weights[name], before[name])] == []


def tensors_of(moe: nn.Module) -> list[list[str]]:
    homes = [name for name, module in moe.named_modules() if isinstance(module, MoELayer)]
    return [[name for name, _ in moe.named_parameters() if name.startswith(f"{home}.")] for home in homes]


def saves_and_loads(moe: nn.Module, folder: Path) -> None:
    moe.save_pretrained(folder)
    again, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(moe)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in moe.state_dict().items())
    assert torch.equal(scores(again), scores(moe))


def noise() -> Callable[[str, Tensor], Tensor]:
    """What makes all experts differ."""
    generator = torch.Generator().manual_seed(3)
    return lambda name, value: (
        value + 0.2 * torch.randn(value.shape, generator=generator) if "expert" in name else value
    )


def merged(folder: Path, alpha_LN: Tensor, shared_L: Tensor, home: Path) -> Path:
    home.mkdir()
    Coefficients.of_layers([0, 1, 2], alpha_LN, shared_L, {}).save(home / "coefficients")
    return merge(model=str(folder), coefficients=str(home / "coefficients"), output=home / "dense")


def merges_into_the_dense_model(folder: Path, dense: nn.Module, tmp_path: Path) -> None:
    """Bit for bit, under the same names, in the same class, with the same config."""
    written = merged(folder, EVEN, torch.full((3,), 0.25, dtype=torch.float64), tmp_path / "even")
    ours, theirs = Checkpoint(written), Checkpoint(tmp_path / "dense")
    assert set(ours.names) == set(theirs.names)
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.names)
    type(dense)(dense.config).load_state_dict(dict(ours.tensors()))
    mlps = {tensor.dense for tensor in family_of(dense.config).expert_tensors(dense.config)}
    assert {name for name in ours.names if mlp_layer(name) is not None} == mlps
    make_portable(tmp_path / "dense")  # as merge does with what it writes
    one, other = AutoConfig.from_pretrained(written), AutoConfig.from_pretrained(tmp_path / "dense")
    assert one.to_dict() | {"_name_or_path": ""} == other.to_dict() | {"_name_or_path": ""}


def merges_what_was_trained(folder: Path, dense: nn.Module, tmp_path: Path) -> None:
    """The written model is the one that a fit sees, and differs from the dense model."""
    written = AutoModelForSequenceClassification.from_pretrained(
        merged(folder, ALPHA, SHARED, tmp_path / "fit")
    )
    assert type(written) is type(dense)
    found = scores(written)
    assert close(found, scores(MergedModel(MoeCheckpoint(folder), ALPHA, SHARED).model))
    assert not torch.allclose(found, scores(dense), rtol=1e-3)


@pytest.mark.parametrize(("family", "trainable"), [("gpt2", "lora"), ("opt", "experts")])
def test_the_stage_trains_and_keeps_the_rest(family: str, trainable: str, tmp_path: Path) -> None:
    lively(family, tmp_path / "dense")
    folder = upcycle(model=str(tmp_path / "dense"), output=tmp_path / "moe")
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(8))
    common: dict[str, Any] = {"pairs": str(pairs), "output": tmp_path / "out", "device": "cpu"}
    train(model=str(folder), trainable=trainable, **common)
    old, new = Checkpoint(folder), Checkpoint(tmp_path / "out")
    moved = {name for name in old.names if not torch.equal(old.tensor(name), new.tensor(name))}
    home = ("experts.", "shared_expert.", "gate.", "score.")
    attention = ("attn.c_attn.weight", "attn.c_proj.weight") if trainable == "lora" else ()
    assert moved == {name for name in old.names if any(part in name for part in home + attention)}


def test_dropout_of_the_dense_mlp_is_kept(tmp_path: Path) -> None:
    """GPT-2's MLP drops part of its output; so does the MoE that stands there, while it trains."""
    tiny_dense("gpt2", resid_pdrop=0.5).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    moe = load_moe(upcycle(model=str(tmp_path / "dense"), output=tmp_path / "moe"))
    layer = moe_layers(moe)[0]
    x_TD = torch.randn(40, SIZES["hidden_size"])
    with torch.no_grad():
        share = [float((layer.train(mode)(x_TD) == 0).float().mean()) for mode in (True, False)]
    assert share[0] == pytest.approx(0.5, abs=0.05) and share[1] == 0


def test_every_family_has_tiny_sizes_and_names_itself() -> None:
    assert set(TINY) == set(FAMILIES) and set(CORE) < set(TINY)
    assert {name: family.model_type for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}
    assert len(FAMILIES) == len(GATED) + len(PLAIN) + len(ENCODERS), "a model_type stands in two rows"
    assert list(FAMILIES) == sorted(FAMILIES)


def test_the_door_knows_our_model_types_by_the_same_prefix() -> None:
    assert moemerge._PREFIX == PREFIX


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_give_the_reason(name: str) -> None:
    assert name not in FAMILIES
    assert name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    with pytest.raises(UnsupportedError) as caught:
        family_called(name)
    assert name in str(caught.value) and REFUSED[name] in str(caught.value)


def test_the_documents_list_the_architectures() -> None:
    root = Path(__file__).parent.parent.parent
    listed = (root / "docs/architectures.md").read_text(encoding="utf-8")
    assert table() in listed, (
        "put the text of moemerge.models.families.table.table() into docs/architectures.md"
    )
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"[{len(FAMILIES)} architectures](docs/architectures.md)" in readme


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("biogpt", AutoModelForCausalLM),
        ("opt", AutoModelForCausalLM),
        ("electra", AutoModelForMaskedLM),
        ("modernbert", AutoModelForMaskedLM),
        ("roberta", AutoModel),
        ("roberta", AutoModelForMaskedLM),
    ],
)
def test_base_models_lose_their_own_heads(family: str, kind: Any, tmp_path: Path) -> None:
    config = tiny_dense(family).config
    kind.from_config(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    folder = upcycle(model=str(tmp_path / "base"), output=tmp_path / "moe")
    names = {name for name in Checkpoint(folder).names if "expert" not in name and ".gate." not in name}
    assert names < set(tiny_dense(family).state_dict())
    assert len(read_manifest(folder)["results"]["fresh_head"]) > 0


def test_buffers_of_older_versions_are_left_out(tmp_path: Path) -> None:
    """Checkpoints on the hub still hold GPT-2's causal masks."""
    lively("gpt2", tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    old = {**load_file(path), "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    save_file(old, path, metadata={"format": "pt"})
    folder = upcycle(model=str(tmp_path / "dense"), output=tmp_path / "moe")
    assert not any("h.0.attn.bias" in name for name in Checkpoint(folder).names)

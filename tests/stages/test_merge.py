"""Merging: the written model is the average, in the original class, and nothing is missing or left over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_moe import ALPHA, SHARED, N, make_moe, random_pairs, rewrite, write_rows
from tiny_models import CORE, families, tiny_dense, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.tokenise import encode
from moemerge.errors import CheckpointError
from moemerge.merging import average as averaging
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.modelling import load_moe
from moemerge.models.scoring import score
from moemerge.stages.fit import fit
from moemerge.stages.merge import merge
from moemerge.stages.upcycle import upcycle


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("merge") / "moe")


def coefficients(folder: Path, alpha_LN: Tensor = ALPHA, shared_L: Tensor = SHARED, **meta: str) -> str:
    return str(
        Coefficients.of_layers(list(range(len(alpha_LN))), alpha_LN, shared_L, meta).save(folder).parent
    )


def scores(model: torch.nn.Module, moe: Path) -> Tensor:
    tokenizer = load_tokenizer(str(moe))
    texts = [encode(tokenizer, row["prompt"], row["rejected"]) for row in random_pairs(8)]
    return score(model, tokenizer, texts, batch_tokens=60)


def with_expert(moe: Path, index: int) -> torch.nn.Module:
    """The dense model with one expert's matrices put in by hand (index -1: the shared expert's)."""
    dense = AutoModelForSequenceClassification.from_pretrained(moe.parent / f"dense-{moe.name}").eval()
    tensors, own = load_file(moe / "model.safetensors"), dense.state_dict()
    for name in own:
        if name in tensors:
            own[name].copy_(tensors[name])
    for layer, block in enumerate(dense.model.layers):
        home = f"model.layers.{layer}.mlp"
        for matrix in ("gate", "up", "down"):
            if index < 0:
                value = tensors[f"{home}.shared_expert.{matrix}_proj.weight"]
            elif matrix == "down":
                value = tensors[f"{home}.experts.down_proj"][index]
            else:
                value = tensors[f"{home}.experts.gate_up_proj"][index].chunk(2)[matrix == "up"]
            getattr(block.mlp, f"{matrix}_proj").weight.data.copy_(value)
    return dense


@pytest.mark.parametrize("family", families(CORE))
def test_the_original_model_comes_back_with_averaged_mlps(family: str, tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", family)
    folder = merge(model=str(moe), coefficients=coefficients(tmp_path / "c"), output=tmp_path / "merged")
    source, merged, dense = MoeCheckpoint(moe), Checkpoint(folder), Checkpoint(tmp_path / "dense-moe")
    assert set(merged.names) == set(dense.names)
    for tensor in source.tensors:
        row, matrices = tensor.layer, list(source.matrices(tensor))
        expected = SHARED[row] * matrices[0].double()
        expected += (1 - SHARED[row]) * sum(
            a * w.double() for a, w in zip(ALPHA[row], matrices[1:], strict=True)
        )
        found = merged.tensor(tensor.dense)
        assert found.shape == dense.shape(tensor.dense) and found.dtype == dense.dtype(tensor.dense)
        assert float((found.double() - expected).abs().max()) < 2e-7
    mlps = {tensor.dense for tensor in source.tensors}
    assert all(torch.equal(merged.tensor(n), source.weights.tensor(n)) for n in set(merged.names) - mlps)

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    original = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense-moe")
    assert type(model) is type(original)
    assert model.config.to_dict() | {"_name_or_path": ""} == original.config.to_dict() | {"_name_or_path": ""}
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "dense-moe").iterdir()} | {
        "manifest.json"
    }
    fitted = MergedModel(source, ALPHA, SHARED)
    torch.testing.assert_close(scores(model.eval(), moe), scores(fitted.model, moe), rtol=1e-5, atol=1e-5)
    assert float((scores(model, moe) - scores(original.eval(), moe)).abs().max()) > 1e-3


def test_the_written_model_scores_as_the_fitted_one(moe: Path, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(24))
    fitted = fit(
        model=str(moe),
        pairs=str(pairs),
        validation=str(pairs),
        output=tmp_path / "fit",
        initial="uniform",
        shared_weight="learned",
        max_epochs=2,
        judge="preferences",
    )
    merged = load_reward_model(
        str(merge(model=str(moe), coefficients=str(fitted), output=tmp_path / "m")), "cpu"
    )
    found = Coefficients.load(fitted)
    ours = MergedModel(MoeCheckpoint(moe), found.alpha_LN, found.shared_L).model
    assert float((scores(merged, moe) - scores(ours, moe)).abs().max()) <= 3e-5  # of scores of about 16
    report = json.loads((fitted / "report.json").read_text())
    assert not report["kept_initial"]
    tokenizer, losses = load_tokenizer(str(moe)), []
    for row in random_pairs(24):
        texts = [encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        chosen, rejected = score(merged, tokenizer, texts, 1000).double()
        losses.append(float(-torch.nn.functional.logsigmoid(chosen - rejected)))
    assert sum(losses) / 24 == pytest.approx(report["held_out"]["after"]["loss"], abs=1e-5)


@pytest.mark.parametrize("index", range(N))
def test_one_hot_is_the_model_with_that_expert(moe: Path, tmp_path: Path, index: int) -> None:
    one_hot_LN = torch.eye(N, dtype=torch.float64)[index].repeat(3, 1)
    given = coefficients(tmp_path / "c", one_hot_LN, torch.zeros(3, dtype=torch.float64))
    merged = Checkpoint(merge(model=str(moe), coefficients=given, output=tmp_path / "m"))
    expected = with_expert(moe, index).state_dict()
    assert all(torch.equal(merged.tensor(name), expected[name]) for name in merged.names)


def test_shared_weight_one_is_the_model_with_the_shared_expert(moe: Path, tmp_path: Path) -> None:
    given = coefficients(tmp_path / "c", ALPHA, torch.ones(3, dtype=torch.float64))
    merged = Checkpoint(merge(model=str(moe), coefficients=given, output=tmp_path / "m"))
    expected = with_expert(moe, -1).state_dict()
    assert all(torch.equal(merged.tensor(name), expected[name]) for name in merged.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_moe_merges_into_the_dense_model_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = with_dtype(tmp_path / "dense", dtype)
    moe = upcycle(model=str(model), output=tmp_path / "moe", num_routed_experts=N, num_experts_per_tok=2)
    merged = merge(model=str(moe), coefficients=coefficients(tmp_path / "c"), output=tmp_path / "m")
    ours, theirs = load_file(merged / "model.safetensors"), load_file(model / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == dtype
        assert torch.equal(value.view(torch.uint8), theirs[name].view(torch.uint8)), name
    assert AutoConfig.from_pretrained(merged).dtype == dtype


def with_dtype(folder: Path, dtype: torch.dtype) -> Path:
    tiny_dense().to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stored", "asked"), [("bfloat16", "keep"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_dtypes(stored: str, asked: str, tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", dtype=getattr(torch, stored))
    given = coefficients(tmp_path / "c")
    merged = Checkpoint(merge(model=str(moe), coefficients=given, output=tmp_path / "m", dtype=asked))
    wanted = getattr(torch, stored if asked == "keep" else asked)
    assert {merged.dtype(name) for name in merged.names} == {wanted}
    assert AutoConfig.from_pretrained(merged.folder).dtype == wanted
    difference = read_manifest(merged.folder)["results"]["largest_difference"]
    assert difference <= {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[wanted]
    assert difference > 0, "these experts do not average without rounding"


def test_side_files_shards_and_layers(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", layers="1")
    (moe / "chat_template.jinja").write_text("{{ messages }}")
    given = Coefficients.of_layers([1], ALPHA[:1], SHARED[:1]).save(tmp_path / "c")
    folder = merge(model=str(moe), coefficients=str(given), output=tmp_path / "m", shard_size=30_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (
        AutoTokenizer.from_pretrained(folder)("w1 w2").input_ids
        == load_tokenizer(str(moe))("w1 w2").input_ids
    )
    merged, dense = Checkpoint(folder), Checkpoint(tmp_path / "dense-moe")
    untouched = [name for name in dense.names if ".layers.0." in name or ".layers.2." in name]
    assert len(untouched) == 18
    assert all(torch.equal(merged.tensor(name), dense.tensor(name)) for name in untouched)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(merged.tensor(name), dense.tensor(name))
    load_reward_model(str(folder), "cpu")


def test_without_a_shared_expert(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", shared_expert=False)
    given = coefficients(tmp_path / "c", ALPHA, torch.zeros(3, dtype=torch.float64))
    assert (
        read_manifest(merge(model=str(moe), coefficients=given, output=tmp_path / "m"))["results"][
            "merged_tensors"
        ]
        == 9
    )
    with pytest.raises(CheckpointError, match="there is no shared member"):
        merge(model=str(moe), coefficients=coefficients(tmp_path / "d"), output=tmp_path / "n")


def drop(part: str) -> Callable[[str, Tensor], Tensor | None]:
    return lambda name, tensor: None if part in name else tensor


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (drop("layers.1.mlp.experts.down_proj"), "missing: model.layers.1.mlp.experts.down_proj"),
        (drop("layers.2.mlp.shared_expert.up_proj"), "missing"),
        (drop("layers.0.self_attn.q_proj"), "missing: model.layers.0.self_attn.q_proj"),
        (drop("score"), "missing: score.weight"),
        (drop("layers.0.mlp.gate."), "missing"),
        (
            lambda name, tensor: tensor[:2] if name.endswith("1.mlp.experts.down_proj") else tensor,
            "misshapen",
        ),
        (lambda name, tensor: tensor[:-1] if name.endswith("norm.weight") else tensor, "misshapen"),
    ],
)
def test_incomplete_models_are_refused(
    change: Callable[[str, Tensor], Tensor | None], word: str, moe: Path, tmp_path: Path
) -> None:
    broken = rewrite(shutil.copytree(moe, tmp_path / "broken"), change)
    with pytest.raises(CheckpointError, match=word):
        merge(model=str(broken), coefficients=coefficients(tmp_path / "c"), output=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_left_over_tensors_are_refused(moe: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(moe, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    for extra in (
        "model.layers.3.mlp.experts.down_proj",
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    ):
        save_file(
            {**tensors, extra: torch.zeros(2, 2)}, broken / "model.safetensors", metadata={"format": "pt"}
        )
        with pytest.raises(CheckpointError, match=f"left over: {extra}"):
            merge(model=str(broken), coefficients=coefficients(tmp_path / "c"), output=tmp_path / "m")


def test_foreign_coefficients_are_refused(moe: Path, tmp_path: Path) -> None:
    four_LN = torch.full((3, 4), 0.25, dtype=torch.float64)
    foreign: list[Any] = [
        coefficients(tmp_path / "few", ALPHA[:2], SHARED[:2]),
        coefficients(tmp_path / "wide", four_LN),
        coefficients(tmp_path / "other", model="0" * 64),
        str(Coefficients.of_layers([0, 1, 3], ALPHA, SHARED).save(tmp_path / "layers")),
    ]
    for given in foreign:
        with pytest.raises(CheckpointError, match="do not belong to this model"):
            merge(model=str(moe), coefficients=given, output=tmp_path / "m")
    with pytest.raises(CheckpointError, match="cannot be read"):
        merge(model=str(moe), coefficients=str(moe), output=tmp_path / "m")
    with pytest.raises(CheckpointError, match="not a MoE"):
        merge(model=str(moe.parent / "dense-moe"), coefficients=foreign[0], output=tmp_path / "m")


def test_coefficients_stay_with_the_weights_they_were_fitted_for(moe: Path, tmp_path: Path) -> None:
    fitted = str(fit(model=str(moe), output=tmp_path / "fit", method="uniform"))
    moved = shutil.copytree(moe, tmp_path / "moved")
    (moved / "README.md").write_text("a card does not make another model")
    merge(model=str(moved), coefficients=fitted, output=tmp_path / "m")
    rewrite(moved, lambda name, tensor: tensor * 1.001 if "score" in name else tensor)
    with pytest.raises(CheckpointError, match="fingerprint"):
        merge(model=str(moved), coefficients=fitted, output=tmp_path / "n")


def test_reading_back_notices_a_wrong_tensor(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk, or a writer, that changes one value: in an MLP, elsewhere, or loses a tensor."""
    from moemerge.models import checkpoint

    written = save_file

    def faulty(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[..., None]:
        def write(shard: dict[str, Tensor], path: Path, metadata: Any) -> None:
            changed = {n: change(t.clone()) if n == name else t for n, t in shard.items()}
            written({n: t for n, t in changed.items() if t is not None}, path, metadata)

        return write

    def nudge(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] += 1e-4
        return tensor

    for name, change in (
        ("model.layers.1.mlp.up_proj.weight", nudge),
        ("model.norm.weight", nudge),
        ("model.norm.weight", lambda tensor: None),
    ):
        monkeypatch.setattr(checkpoint, "save_file", faulty(name, change))
        with pytest.raises(CheckpointError, match="not written as meant"):
            merge(model=str(moe), coefficients=coefficients(tmp_path / "c"), output=tmp_path / "m")


def test_merging_in_chunks_changes_no_bit(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = coefficients(tmp_path / "c")
    whole = Checkpoint(merge(model=str(moe), coefficients=given, output=tmp_path / "whole"))
    monkeypatch.setattr(averaging, "CHUNK", 100)
    chunked = Checkpoint(merge(model=str(moe), coefficients=given, output=tmp_path / "chunked"))
    assert all(torch.equal(whole.tensor(name), chunked.tensor(name)) for name in whole.names)


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_experts_that_are_not_finite_are_refused_and_named(
    place: int, weight: float, value: float, moe: Path, tmp_path: Path
) -> None:
    """Whatever their weight: the first tensor's is zero, or the last element's chunk is not the first."""

    def spoil(name: str, tensor: Tensor) -> Tensor:
        if name == "model.layers.1.mlp.experts.down_proj":
            tensor[place, -1, -1] = value
        return tensor

    broken = rewrite(shutil.copytree(moe, tmp_path / "broken"), spoil)
    others = (1 - weight) / (N - 1)
    alpha_LN = torch.tensor([[weight if n == place else others for n in range(N)]] * 3, dtype=torch.float64)
    given = coefficients(tmp_path / "c", alpha_LN)
    with pytest.raises(CheckpointError, match=rf"layers\.1\.mlp\.down_proj.* of expert-{place}"):
        merge(model=str(broken), coefficients=given, output=tmp_path / "m")


@pytest.mark.parametrize(("dtype", "fault"), [("float32", 1e-4), ("bfloat16", 1e-1)])
def test_the_plain_sum_notices_a_wrong_average(
    dtype: str, fault: float, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = MoeCheckpoint.merged

    def wrong(*arguments: Any) -> Tensor:
        average = right(*arguments)
        average.view(-1)[-1] += fault
        return average

    monkeypatch.setattr(MoeCheckpoint, "merged", wrong)
    given = coefficients(tmp_path / "c")
    with pytest.raises(CheckpointError, match=rf"off by {f'{fault:.0e}'[0]}"):
        merge(model=str(moe), coefficients=given, output=tmp_path / "m", dtype=dtype)


def test_experts_that_cancel_are_no_fault(tmp_path: Path) -> None:
    """The average of W and -W rounds as W does, not as the tiny result."""
    moe = make_moe(tmp_path / "moe", shared_expert=False)

    def mirror(name: str, tensor: Tensor) -> Tensor:
        if ".experts." in name:
            tensor[1], tensor[2] = -tensor[0] * 1.0000001, tensor[0] * 1e-9
        return tensor

    rewrite(moe, mirror)
    alpha_LN = torch.tensor([[0.1, 0.1, 0.8]] * 3, dtype=torch.float64)
    given = coefficients(tmp_path / "c", alpha_LN, torch.zeros(3, dtype=torch.float64))
    merged = merge(model=str(moe), coefficients=given, output=tmp_path / "m")
    assert 0 < read_manifest(merged)["results"]["largest_difference"] < 1e-7


def test_half_precision_comes_back_after_training_in_float32(tmp_path: Path) -> None:
    """Training widens a bfloat16 model to float32; the merged checkpoint is bfloat16 again."""
    tiny_dense().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    moe = upcycle(model=str(tmp_path / "dense"), output=tmp_path / "moe")
    wide = load_moe(moe, dtype=torch.float32)
    wide.save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    found = fit(model=str(tmp_path / "wide"), method="uniform", output=tmp_path / "fit")
    merged = merge(model=str(tmp_path / "wide"), coefficients=str(found), output=tmp_path / "merged")
    written = Checkpoint(merged)
    assert {written.dtype(name) for name in written.names} == {torch.bfloat16}
    assert ModelFolder(merged).config_json["dtype"] == "bfloat16"
    original = Checkpoint(tmp_path / "dense")
    assert all(torch.equal(written.tensor(name), original.tensor(name)) for name in original.names)

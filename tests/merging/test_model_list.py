"""Merging whole models: averages by hand, what is kept, what is refused; coefficients fitted over a list."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_moe import gradient_of, make_moe, random_pairs, rewrite, stock_merge, write_rows
from tiny_models import save_dense
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from moemerge.artifacts.checksums import fingerprint
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import EncodedPair, encode_pairs
from moemerge.errors import CheckpointError, OptionError, UnsupportedError
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.models import ModelList
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.scoring import score_pairs
from moemerge.options.base import TextFormat
from moemerge.run import cli
from moemerge.stages.export import export
from moemerge.stages.fit import fit_models
from moemerge.stages.merge import merge_models

BLOCKS = ["outside", "layers.0", "layers.1", "layers.2", "head"]
ALPHA = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
SHARED = torch.tensor([0.3, 0.5, 0.7, 0.0, 0.9], dtype=torch.float64)


def lively(folder: Path, family: str = "llama", seed: int = 0, **changes: object) -> Path:
    """A tiny dense reward model whose head and norms are far from where models start."""
    generator = torch.Generator().manual_seed(seed)
    save_dense(folder, family, seed, **changes)
    return rewrite(
        folder,
        lambda _, tensor: tensor + 0.2 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rm-0, rm-1 and rm-2, reward models of one architecture."""
    home = tmp_path_factory.mktemp("models")
    for seed in range(3):
        lively(home / f"rm-{seed}", seed=seed)
    return home


@pytest.fixture(scope="module")
def models(home: Path) -> list[str]:
    return [str(home / f"rm-{seed}") for seed in range(3)]


def config_of(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text())


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def block(name: str) -> str:
    """What the coefficients' rows stand for, told apart from the code."""
    if name.startswith("score"):
        return "head"
    return f"layers.{name.split('.')[2]}" if ".layers." in name else "outside"


def by_hand(members: list[str], coefficients: Coefficients, has_base: bool) -> dict[str, Tensor]:
    tensors = [weights(member) for member in members]
    found = {}
    for name in tensors[0]:
        row = coefficients.blocks.index(block(name))
        shared, alpha = float(coefficients.shared_L[row]), coefficients.alpha_LN[row].tolist()
        factors = [shared, *((1 - shared) * a for a in alpha)] if has_base else alpha
        found[name] = sum(w * t[name].double() for w, t in zip(factors, tensors, strict=True))
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), atol=3e-7, rtol=0)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "albert", "modernbert"])
def test_the_plain_mean(family: str, tmp_path: Path) -> None:
    """WARM: heads included. ALBERT can be no MoE here, but its models can be averaged."""
    from tiny_models import SIZES, TINY

    TINY.setdefault("albert", {"embedding_size": 16}) if family == "albert" else None
    try:
        folders = [str(lively(tmp_path / str(seed), family, seed)) for seed in range(3)]
    finally:
        TINY.pop("albert", None)
    assert SIZES["num_labels"] == 1
    before = [fingerprint(Path(folder))["sha256"] for folder in folders]
    merged = merge_models(folders, tmp_path / "merged")
    tensors = [weights(folder) for folder in folders]
    expected = {name: sum(t[name].double() for t in tensors) / 3 for name in tensors[0]}
    assert_close(weights(merged), expected)
    model, info = AutoModelForSequenceClassification.from_pretrained(merged, output_loading_info=True)
    assert (
        type(model).__name__ == json.loads((Path(folders[0]) / "config.json").read_text())["architectures"][0]
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (merged / "tokenizer.json").read_bytes() == (Path(folders[0]) / "tokenizer.json").read_bytes()
    assert [fingerprint(Path(folder))["sha256"] for folder in folders] == before


def test_weights_and_a_base(models: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = weights(merge_models(models[1:], tmp_path / "m", base=models[0], coefficients=[2.0, 1.0, 5.0]))
    tensors = [weights(model) for model in models]
    one, two, three = tensors
    expected = {n: 0.25 * one[n].double() + 0.125 * two[n].double() + 0.625 * three[n].double() for n in one}
    assert_close(found, expected)
    assert "weights sum to 8, so that models count by their shares, 0.25, 0.125, 0.625" in caplog.text
    caplog.clear()
    merge_models(models, tmp_path / "one", coefficients=[0.2, 0.3, 0.5])
    assert "weights sum" not in caplog.text


def test_exact_cases(models: list[str], tmp_path: Path) -> None:
    """One model with all the weight is that model; equal models are what they are."""
    one = merge_models(models, tmp_path / "one", coefficients=[0.0, 1.0, 0.0])
    assert_same(weights(one), weights(models[1]))
    copies = [str(shutil.copytree(models[2], tmp_path / f"copy-{number}")) for number in range(3)]
    same = merge_models(copies, tmp_path / "same", base=models[2], coefficients=[0.3, 0.1, 0.2, 0.4])
    assert_same(weights(same), weights(models[2]))


@pytest.mark.parametrize("has_base", [True, False])
def test_coefficients_by_block(has_base: bool, models: list[str], tmp_path: Path) -> None:
    shared_L = SHARED if has_base else torch.zeros(5, dtype=torch.float64)
    given = Coefficients(BLOCKS, ALPHA, shared_L)
    given.save(tmp_path / "c")
    members = {"models": models[1:], "base": models[0]} if has_base else {"models": models[:2]}
    merged = merge_models(output=tmp_path / "m", coefficients=tmp_path / "c", **members)
    assert_close(weights(merged), by_hand(models if has_base else models[:2], given, has_base))


@pytest.mark.parametrize(
    ("scope", "kept"), [("body", ("score",)), ("mlp", ("score", "norm", "attn", "embed"))]
)
def test_scope(scope: str, kept: tuple[str, ...], models: list[str], tmp_path: Path) -> None:
    found = weights(merge_models(models, tmp_path / "m", scope=scope))
    tensors = [weights(model) for model in models]
    for name, tensor in found.items():
        if any(part in name for part in kept):
            assert torch.equal(tensor, tensors[0][name]), name
        else:
            assert not torch.equal(tensor, tensors[0][name]), name
            mean = sum(t[name].double() for t in tensors) / 3
            torch.testing.assert_close(tensor.double(), mean, atol=3e-7, rtol=0)


def test_blocks_of_a_list(models: list[str]) -> None:
    assert ModelList(models).blocks() == BLOCKS
    assert ModelList(models, scope="body").blocks() == BLOCKS[:-1]
    assert ModelList(models, scope="mlp").blocks() == BLOCKS[1:-1]
    fine = ModelList(models).blocks(per_matrix=True)
    assert (
        fine[0] == "outside"
        and fine[-1] == "head"
        and "layers.1.mlp.up_proj" in fine
        and len(fine) == 2 + 3 * 9
    )


@pytest.mark.parametrize("has_base", [True, False])
def test_the_yaml_for_stock_mergekit(has_base: bool, models: list[str], tmp_path: Path) -> None:
    """linear.yml names the models where they are; the result is `merge --method linear`'s bit for bit."""
    shared_L = SHARED if has_base else torch.zeros(5, dtype=torch.float64)
    Coefficients(BLOCKS, ALPHA, shared_L).save(tmp_path / "c")
    members: dict[str, Any] = (
        {"models": models[1:], "base": models[0]} if has_base else {"models": models[:2]}
    )
    folder = export(**members, coefficients=str(tmp_path / "c"), output=tmp_path / "e")
    assert {path.name for path in folder.iterdir()} == {"linear.yml", "manifest.json"}
    ours = merge_models(
        output=tmp_path / "m", coefficients=tmp_path / "c", method="linear",
        parameters={"normalize": False}, **members,
    )  # fmt: skip
    assert_same(weights(stock_merge(folder / "linear.yml", tmp_path / "stock")), weights(ours))


def test_our_method_in_yaml(models: list[str], tmp_path: Path) -> None:
    """With a base of its own weight, and with a base that is one of the models."""
    for has_base, alpha_LN in ((True, ALPHA), (False, torch.cat([ALPHA / 2, ALPHA[:, :1] * 0 + 0.5], 1))):
        home = tmp_path / str(has_base)
        shared_L = SHARED if has_base else torch.zeros(5, dtype=torch.float64)
        meta = ModelList(models[1:], models[0]).identity() if has_base else ModelList(models).identity()
        given = Coefficients(BLOCKS, alpha_LN, shared_L, meta)
        given.save(home / "fit")
        first = 0 if has_base else 1
        config = {
            "merge_method": "routing_normalized_average",
            "base_model": models[0],
            "parameters": {"coefficients": "fit"},
            "models": [{"model": m, "parameters": {"expert": first + i}} for i, m in enumerate(models[1:])],
        }
        (home / "merge.yml").write_text(yaml.safe_dump(config))
        with pytest.raises(SystemExit) as done:
            cli.main(["mergekit", "yaml", str(home / "merge.yml"), str(home / "out")])
        assert done.value.code == 0
        assert_close(weights(home / "out"), by_hand(models, given, has_base))


@pytest.mark.parametrize("method", ["ties", "sce", "model_stock", "karcher"])
def test_mergekits_methods_over_models(method: str, models: list[str], tmp_path: Path) -> None:
    from mergekit.merge_methods import merge_state_dicts

    parameters = {"ties": {"weight": 1.0, "density": 0.5}, "sce": {"select_topk": 0.5}}.get(method, {})
    merged = merge_models(models[1:], tmp_path / "m", base=models[0], method=method, parameters=parameters)
    named = dict(zip(("shared", 0, 1), map(weights, models), strict=True))
    assert_same(weights(merged), merge_state_dicts(named, method, base="shared", parameters=parameters))


def encoded(model: str, rows: list[dict[str, str]], folder: Path) -> list[EncodedPair]:
    pairs, report = read_pairs(str(write_rows(folder / "rows.jsonl", rows)), TextFormat())
    return encode_pairs(load_tokenizer(model), pairs, TextFormat(), report)


@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_the_gradient_is_autograds(family: str, tmp_path: Path) -> None:
    """Of alpha and lambda, through every tensor of the model, embeddings and head included, in float64."""
    folders = []
    for seed in range(3):
        folder = lively(tmp_path / str(seed), family, seed)
        rewrite(folder, lambda _, tensor: tensor.double())
        folders.append(str(folder))
    source = ModelList(folders[1:], folders[0])
    pairs = encoded(folders[0], random_pairs(5), tmp_path)
    merged = MergedModel(source, ALPHA, SHARED, dtype=torch.float64)
    ours = gradient_of(merged, pairs, 2)

    alpha_LN, shared_L = ALPHA.clone().requires_grad_(), SHARED.clone().requires_grad_()
    tensors = {}
    for tensor in source.tensors:
        row = merged.rows[tensor.dense]
        base, *others = source.matrices(tensor)
        routed = sum(a * other for a, other in zip(alpha_LN[row], others, strict=True))
        tensors[tensor.dense] = shared_L[row] * base + (1 - shared_L[row]) * routed
    assert not source.backbone

    def score(ids: list[int]) -> Tensor:
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        }
        return functional_call(merged.model, tensors, (), inputs).logits[0, 0]

    loss = -sum(logsigmoid(score(p.chosen.ids) - score(p.rejected.ids)) for p in pairs) / len(pairs)
    loss.backward()
    assert ours.loss == pytest.approx(loss.item(), rel=1e-6)
    centred = [g - g.mean(1, keepdim=True) for g in (ours.alpha_LN, alpha_LN.grad)]
    torch.testing.assert_close(*centred, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.shared_L, shared_L.grad, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def tuned(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models with one body and heads of their own."""
    generator, folders = torch.Generator().manual_seed(7), []

    def moved(name: str, tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) if name.startswith("score") else tensor

    for place in range(3):
        folder = tmp_path_factory.mktemp("tuned") / str(place)
        folders.append(str(rewrite(shutil.copytree(models[0], folder), moved)))
    return folders


def test_fitting_finds_the_model_that_made_the_labels(tuned: list[str], tmp_path: Path) -> None:
    models, rows = tuned, random_pairs(80, seed=3)
    judge = load_reward_model(models[1], "cpu")
    scores_P2 = score_pairs(judge, load_tokenizer(models[1]), encoded(models[1], rows, tmp_path), 10_000)
    for row, (chosen, rejected) in zip(rows, scores_P2.tolist(), strict=True):
        if chosen < rejected:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    found = fit_models(models, pairs, tmp_path / "fit", learning_rate=0.3, max_epochs=5, evals_per_epoch=2)
    coefficients = Coefficients.load(found)
    assert coefficients.blocks == BLOCKS and coefficients.meta["scope"] == "all"
    assert coefficients.alpha_LN[-1, 1] > 0.7
    uniform_LN = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(coefficients.alpha_LN[:-1], uniform_LN, rtol=0, atol=1e-9)
    report = json.loads((found / "report.json").read_text())
    assert report["held_out"]["after"]["loss"] < 0.8 * report["held_out"]["before"]["loss"]
    assert "model-1" in (found / "fit.md").read_text()
    merged = merge_models(models, tmp_path / "merged", coefficients=found)
    assert_close(weights(merged), by_hand(models, coefficients, has_base=False))
    with pytest.raises(CheckpointError, match="fingerprint"):
        merge_models(models[::-1], tmp_path / "other", coefficients=found)


def test_the_command_line_does_the_same(models: list[str], tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(12))
    same = {"max_epochs": 1, "batch_size": 4}
    by_call = fit_models(models[1:], pairs, tmp_path / "call", base=models[0], **same)
    flags = ["--base", models[0], "--pairs", str(pairs), "--max-epochs", "1", "--batch-size", "4", "--quiet"]
    with pytest.raises(SystemExit) as done:
        cli.main(["fit", "--models", *models[1:], *flags, "--output", str(tmp_path / "flag")])
    assert done.value.code == 0
    one, other = (Coefficients.load(folder) for folder in (by_call, tmp_path / "flag"))
    assert torch.equal(one.alpha_LN, other.alpha_LN) and torch.equal(one.shared_L, other.shared_L)
    with pytest.raises(SystemExit) as done:
        cli.main(
            [
                "merge",
                "--models",
                *models,
                "--weights",
                "1",
                "1",
                "2",
                "--output",
                str(tmp_path / "m"),
                "--quiet",
            ]
        )
    assert done.value.code == 0
    assert_same(
        weights(tmp_path / "m"), weights(merge_models(models, tmp_path / "n", coefficients=[1.0, 1.0, 2.0]))
    )


def refused(kind: type[Exception], word: str, tmp_path: Path, models: list[Any], **options: Any) -> None:
    with pytest.raises(kind, match=word):
        merge_models(models, tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()


def test_models_that_do_not_go_together(models: list[str], tmp_path: Path) -> None:
    other = str(lively(tmp_path / "qwen2", "qwen2"))
    refused(UnsupportedError, "model_type qwen2", tmp_path, [models[0], other])
    wide = str(lively(tmp_path / "wide", intermediate_size=64))
    refused(UnsupportedError, "mlp", tmp_path, [models[0], wide])
    many = str(save_dense(tmp_path / "many", num_labels=2))
    refused(CheckpointError, "2 outputs", tmp_path, [many, models[0]])
    refused(UnsupportedError, "score.weight", tmp_path, [models[0], many])
    moe = str(make_moe(tmp_path / "moe"))
    refused(UnsupportedError, "moe is a MoE made by moemerge", tmp_path, [models[0], moe])
    # Most agree with another than the first: that one is blamed, as a base by its name.
    refused(UnsupportedError, f"^{wide} does not go(?s:.*)intermediate_size 64", tmp_path, [wide, *models])
    refused(UnsupportedError, f"^the base {wide} does not(?s:.*)as base", tmp_path, models, base=wide)
    cut = lively(tmp_path / "cut")
    rewrite(cut, lambda name, tensor: None if "layers.1.mlp.up" in name else tensor)
    refused(CheckpointError, "missing: model.layers.1.mlp.up_proj", tmp_path, [models[0], str(cut)])
    broken = lively(tmp_path / "broken")
    rewrite(broken, lambda name, tensor: tensor * float("nan") if "norm" in name else tensor)
    refused(CheckpointError, f"not finite(?s:.*)norm.weight of {broken}", tmp_path, [models[0], str(broken)])


def test_another_tokenizer_is_refused(models: list[str], tmp_path: Path) -> None:
    other = lively(tmp_path / "other")
    text = (other / "tokenizer.json").read_text().replace('"w7"', '"w_seven"')
    (other / "tokenizer.json").write_text(text)
    named = r"tokenizer of \S*/other does not go with the others(?s:.*)w_seven(?s:.*)as of \S*/rm-0"
    refused(UnsupportedError, named, tmp_path, [models[0], str(other)])
    named = r"the tokenizer of the base \S*/other does not go(?s:.*)give as base the model"
    refused(UnsupportedError, named, tmp_path, models, base=str(other))


def test_options_that_contradict(models: list[str], tmp_path: Path) -> None:
    refused(OptionError, "one model alone", tmp_path, models[:1])
    refused(OptionError, "weights: 2 for 3 models", tmp_path, models, coefficients=[1.0, 2.0])
    refused(OptionError, "none below zero", tmp_path, models, coefficients=[1.0, -2.0, 3.0])
    refused(OptionError, "not both", tmp_path, models, model=models[0])
    with pytest.raises(OptionError, match="scope go with models"):
        fit_models([], None, tmp_path / "f", model=models[0], scope="mlp")
    with pytest.raises(OptionError, match="routing statistics are needed"):
        fit_models(models, None, tmp_path / "f", method="usage")


def test_configs_that_differ_are_told(
    models: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = lively(tmp_path / "other", rms_norm_eps=1e-3)
    merged = merge_models([models[0], str(other)], tmp_path / "m")
    assert "differs from" in caplog.text and "rms_norm_eps" in caplog.text
    assert config_of(merged)["rms_norm_eps"] == 1e-6


def test_mixed_dtypes_are_summed_in_the_widest(tmp_path: Path) -> None:
    one, two = lively(tmp_path / "one", seed=1), lively(tmp_path / "two", seed=2)
    rewrite(one, lambda _, tensor: tensor.bfloat16())
    expected = {n: (t.double() + weights(two)[n].double()) / 2 for n, t in weights(one).items()}
    found = weights(merge_models([str(one), str(two)], tmp_path / "m", dtype="float32"))
    assert_close(found, expected)
    kept = weights(merge_models([str(one), str(two)], tmp_path / "kept"))
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}


def test_a_model_without_a_pad_token_is_given_none(models: list[str], tmp_path: Path) -> None:
    """It would be another model: one that reads its scores before a text's end."""
    bare = lively(tmp_path / "bare")
    (bare / "config.json").write_text(json.dumps({**config_of(bare), "pad_token_id": None}))
    merged = merge_models([str(bare), models[1]], tmp_path / "m")
    assert config_of(merged).get("pad_token_id") is None

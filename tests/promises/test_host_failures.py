"""What mergekit 0.1.5 gets wrong without a word, run for real, and what moemerge does with the same input.

`stock` is mergekit itself; `ours` is a merge by our method in mergekit YAML.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import MergeOptions, run_merge
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_moe import ALPHA, SHARED, make_moe, random_pairs, rewrite, stock_merge, write_rows
from tiny_models import SIZES, TINY, save_dense, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3ForSequenceClassification,
    MixtralForSequenceClassification,
)

from moemerge.errors import ArtifactError, CheckpointError, MoemergeError, OptionError, UnsupportedError
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.mergekit.bridge import INLINE, OURS, run_command
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model
from moemerge.stages.evaluate import evaluate
from moemerge.stages.export import export
from moemerge.stages.merge import merge
from moemerge.stages.upcycle import upcycle

HEAD = "score.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def fresh_cache() -> None:
    """mergekit keeps opened models for the life of the process."""
    LoaderCache.loaders.clear()


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and two models: tiny llama reward models of different seeds."""
    return [save_dense(tmp_path / f"m{seed}", seed=seed) for seed in range(3)]


def stock(output: Path, models: list[Any], /, method: str = "linear", **more: Any) -> Path:
    """mergekit's own merge; the first model is the base unless `base_model` is given."""
    named = [{"model": as_text(m), "parameters": {"weight": 1 / len(models)}} for m in models]
    config = {"merge_method": method, "base_model": as_text(models[0]), "models": named, **more}
    options = config.pop("options", {})
    given = {key: value for key, value in config.items() if value is not None}
    run_merge(MergeConfiguration.model_validate(given), str(output), MergeOptions(quiet=True, **options))
    return output


def as_text(model: Any) -> Any:
    return model if isinstance(model, dict) else str(model)


def ours(output: Path, models: list[Any], /, *options: str, command: str = "yaml", **more: Any) -> Path:
    """Our average of the models after the first, half of it the first: `moemerge mergekit yaml`."""
    others = [{"model": as_text(m), "parameters": {"weight": 1 / (len(models) - 1)}} for m in models[1:]]
    config = {
        "merge_method": INLINE,
        "base_model": as_text(models[0]),
        "parameters": {"shared_weight": 0.5},
        "models": others,
        **more,
    }
    file = output.with_name(f"{output.name}.yml")
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    place = ["--out-path", str(output)] if command == "multi" else [str(output)]
    run_command(command, [str(file), *place, *options], "moemerge mergekit")
    return output


def refused(
    kind: type[MoemergeError], match: str, output: Path, models: list[Any], /, *options: str, **more: Any
) -> None:
    """Our merge ends with that error, and leaves neither a result nor a part of one."""
    with pytest.raises(kind, match=match) as caught:
        ours(output, models, *options, **more)
    assert caught.value.fix
    assert not output.exists() and not list(output.parent.glob(f".{output.name}.*"))


def half(models: list[Path], name: str) -> Tensor:
    """What `ours` must give for an MLP tensor, in float64."""
    base, *others = (Checkpoint(model).tensor(name).double() for model in models)
    return 0.5 * base + 0.5 * sum(others) / len(others)


def right(output: Path, models: list[Path]) -> bool:
    """Whether `output` has the base's tensors, in the MLPs the average."""
    written, base = Checkpoint(output), Checkpoint(models[0])
    assert set(written.names) == set(base.names)
    for name in base.names:
        expected = half(models, name) if ".mlp." in name else base.tensor(name).double()
        torch.testing.assert_close(written.tensor(name).double(), expected, atol=2e-7, rtol=0)
    return True


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


# The head, and the class that has it


@pytest.mark.parametrize(("family", "name"), [("qwen2", "Qwen2ForRewardModel"), ("llama", "LlamaForScore")])
def test_a_class_of_its_own_loses_its_head(family: str, name: str, tmp_path: Path) -> None:
    models = [save_dense(tmp_path / f"m{s}", family, seed=s) for s in range(2)]
    for model in models:
        configure(model, architectures=[name])
    merged = stock(tmp_path / "stock", models)
    assert HEAD in Checkpoint(models[0]).names and HEAD not in Checkpoint(merged).names
    refused(UnsupportedError, "class of its own.*\n.*" + name, tmp_path / "ours", models)
    with pytest.raises(UnsupportedError, match="class of its own"):
        merge(models=[str(model) for model in models], output=tmp_path / "list")
    for model in (models[0], merged):
        with pytest.raises(UnsupportedError, match="class of its own"):
            upcycle(model=str(model), output=tmp_path / "moe")
        with pytest.raises(UnsupportedError, match="class of its own"):
            load_reward_model(str(model), "cpu")
    assert not (tmp_path / "moe").exists()


def test_code_that_comes_along_and_is_trusted_runs(dense_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense_folder, tmp_path / "own")
    code = "from transformers import LlamaForSequenceClassification\n\n\nclass LlamaForScore(" + (
        "LlamaForSequenceClassification):\n    pass\n"
    )
    (folder / "modeling_own.py").write_text(code)
    auto_map = {"AutoModelForSequenceClassification": "modeling_own.LlamaForScore"}
    configure(folder, architectures=["LlamaForScore"], auto_map=auto_map)
    with pytest.raises(UnsupportedError, match="class of its own"):
        load_reward_model(str(folder), "cpu")
    model = load_reward_model(ModelFolder(folder, trust_remote_code=True), "cpu")
    assert type(model).__name__ == "LlamaForScore"
    moe = upcycle(model=str(folder), output=tmp_path / "moe", trust_remote_code=True)
    assert torch.equal(Checkpoint(moe).tensor(HEAD), Checkpoint(folder).tensor(HEAD))


def test_a_reward_model_that_says_it_is_a_language_model_loses_its_head(
    models: list[Path], tmp_path: Path
) -> None:
    for model in models:
        configure(model, architectures=["LlamaForCausalLM"])
    assert HEAD not in Checkpoint(stock(tmp_path / "stock", models)).names
    refused(UnsupportedError, "does not say that it is a reward model", tmp_path / "ours", models)
    moe = Checkpoint(upcycle(model=str(models[0]), output=tmp_path / "moe"))
    assert torch.equal(moe.tensor(HEAD), Checkpoint(models[0]).tensor(HEAD))


def test_a_language_model_as_the_base_takes_the_head_away(tmp_path: Path) -> None:
    reward = save_dense(tmp_path / "reward", "qwen2")
    sizes = {key: value for key, value in SIZES.items() if key != "num_labels"}
    config = AutoConfig.for_model("qwen2", **sizes, **TINY["qwen2"], tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "language")
    tiny_tokenizer().save_pretrained(tmp_path / "language")
    pair = [tmp_path / "language", reward]
    assert HEAD not in Checkpoint(stock(tmp_path / "stock", pair)).names
    for order in (pair, pair[::-1]):
        refused(UnsupportedError, "does not say that it is a reward model", tmp_path / "ours", order)


def test_a_language_model_and_a_reward_model_of_llama_are_taken_for_either(tmp_path: Path) -> None:
    """With --allow-crimes, mergekit takes the class of whichever model comes first out of a set."""
    reward, language = save_dense(tmp_path / "reward"), tmp_path / "language"
    config = AutoConfig.from_pretrained(reward)
    AutoModelForCausalLM.from_config(config).save_pretrained(language)
    tiny_tokenizer().save_pretrained(language)
    pair = [language, reward]
    with pytest.raises(RuntimeError, match="allow-crimes"):
        stock(tmp_path / "careful", pair)
    try:
        written = Checkpoint(stock(tmp_path / "stock", pair, options={"allow_crimes": True})).names
    except Exception as error:
        assert HEAD in str(error)
    else:
        assert HEAD not in written
    for order in (pair, pair[::-1]):
        match = "does not say that it is a reward model"
        refused(UnsupportedError, match, tmp_path / "ours", order, "--allow-crimes")


def test_a_lost_head_is_drawn_at_random(dense_folder: Path, tmp_path: Path) -> None:
    """What transformers does with a model whose head a merge has dropped."""
    folder = shutil.copytree(dense_folder, tmp_path / "headless")
    rewrite(folder, lambda name, tensor: None if name == HEAD else tensor)
    heads = [AutoModelForSequenceClassification.from_pretrained(folder).score.weight for _ in range(2)]
    assert not torch.equal(*heads)
    with pytest.raises(CheckpointError, match="no reward head"):
        upcycle(model=str(folder), output=tmp_path / "moe")
    with pytest.raises(CheckpointError, match="no reward head"):
        load_reward_model(str(folder), "cpu", fresh_head_seed=1)
    refused(CheckpointError, f"missing: {HEAD}", tmp_path / "ours", [dense_folder, folder])
    with pytest.raises(CheckpointError, match="no reward head"):
        merge(models=[str(dense_folder), str(folder)], output=tmp_path / "list")


def lora(base: Path, folder: Path, **more: Any) -> Path:
    """A LoRA reward model on `base`: attention moved, head trained."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **more)
    adapted = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["up_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    return folder


def test_a_lora_reward_model_on_a_language_model_loses_its_head(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_labels"}
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **TINY["llama"]))
    language.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapter = lora(tmp_path / "base", tmp_path / "adapter")
    assert any("score" in name for name in load_file(adapter / "adapter_model.safetensors"))
    pair = [f"{tmp_path / 'base'}+{adapter}", str(tmp_path / "base")]
    cache = {"lora_merge_cache": str(tmp_path / "cache")}
    assert HEAD not in Checkpoint(stock(tmp_path / "stock", pair, options=cache)).names
    merge_cache = ("--lora-merge-cache", str(tmp_path / "cache2"))
    refused(UnsupportedError, "merge a LoRA adapter", tmp_path / "ours", pair, *merge_cache)
    with pytest.raises(CheckpointError, match="is an adapter"):
        upcycle(model=str(adapter), output=tmp_path / "moe")
    with pytest.raises(CheckpointError, match="is an adapter"):
        load_reward_model(str(adapter), "cpu")


def test_a_lora_reward_model_on_a_reward_model_is_merged(models: list[Path], tmp_path: Path) -> None:
    adapter = lora(models[1], tmp_path / "adapter")
    pair: list[Any] = [models[0], f"{models[1]}+{adapter}"]
    merged = ours(tmp_path / "ours", pair, "--lora-merge-cache", str(tmp_path / "cache"))
    (whole,) = (tmp_path / "cache").iterdir()
    assert not torch.equal(Checkpoint(whole).tensor(UP), Checkpoint(models[1]).tensor(UP))
    assert right(merged, [models[0], whole])


def test_multimodal_gemma3_loses_its_language_model(tmp_path: Path) -> None:
    text = {**SIZES, **TINY["gemma3_text"], "num_hidden_layers": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        num_labels=1,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
        mm_tokens_per_image=4,
    )
    models = [tmp_path / "a", tmp_path / "b"]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        Gemma3ForSequenceClassification(config).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
    merged = stock(tmp_path / "stock", models)
    load = AutoModelForSequenceClassification.from_pretrained
    _, whole = load(models[0], output_loading_info=True)
    _, info = load(merged, output_loading_info=True)
    lost = {name for name in info["missing_keys"] if "language_model" in name}
    assert not whole["missing_keys"] and len(lost) == 28
    refused(UnsupportedError, "reads images.*gemma3_text", tmp_path / "ours", models)
    with pytest.raises(CheckpointError, match="reads images.*gemma3_text"):
        merge(models=[str(model) for model in models], output=tmp_path / "list")
    with pytest.raises(UnsupportedError, match="reads images"):
        upcycle(model=str(models[0]), output=tmp_path / "moe")
    with pytest.raises(CheckpointError, match="missing"):
        load_reward_model(str(merged), "cpu")
    assert load_reward_model(str(models[0]), "cpu").config.num_labels == 1


def test_a_model_without_mlps_that_we_know_would_not_be_merged(tmp_path: Path) -> None:
    """mergekit runs a method over any tensor; ours would have merged none of these."""
    config = AutoConfig.for_model("mixtral", **SIZES, **TINY["mistral"], num_local_experts=2)
    models = [tmp_path / "a", tmp_path / "b"]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        MixtralForSequenceClassification(config).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
    inline = {"parameters": {"shared_weight": 0.5}, "base_model": str(models[0])}
    unguarded = {**inline, "models": [{"model": str(models[1]), "parameters": {"weight": 1.0}}]}
    written = Checkpoint(stock(tmp_path / "stock", models, INLINE, **unguarded))
    base = MixtralForSequenceClassification.from_pretrained(models[0]).state_dict()
    assert all(torch.equal(written.tensor(name), base[name]) for name in written.names)
    refused(UnsupportedError, "mixture of experts already", tmp_path / "ours", models)


def test_the_experts_of_a_moe_are_no_dense_models(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe")
    refused(UnsupportedError, "is a MoE made by moemerge", tmp_path / "ours", [moe, moe])


def test_slices_that_the_config_does_not_know(tmp_path: Path) -> None:
    models = [save_dense(tmp_path / f"m{s}", "gpt_neox", seed=s) for s in range(2)]

    def sliced(per_model: dict[str, Any]) -> dict[str, Any]:
        sources = [{"model": str(m), "layer_range": [0, 2], "parameters": per_model} for m in models]
        return {"models": None, "slices": [{"sources": sources}]}

    merged = stock(tmp_path / "stock", models, **sliced({"weight": 0.5}))
    held, layers = Checkpoint(merged).names, ModelFolder(merged).config_json["num_hidden_layers"]
    assert layers == 3 and not any("layers.2." in name for name in held)
    refused(CheckpointError, "missing: .*layers.2", tmp_path / "ours", models, **sliced({"weight": 1.0}))


# Values


def spoil(folder: Path, tensor: str, value: float) -> Path:
    def change(name: str, weights: Tensor) -> Tensor:
        weights = weights.clone()
        weights.flatten()[3] = value if name == tensor else weights.flatten()[3]
        return weights

    return rewrite(folder, change)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [UP, HEAD])
def test_not_a_number_passes(name: str, value: float, models: list[Path], tmp_path: Path) -> None:
    spoil(models[1], name, value)
    assert not Checkpoint(stock(tmp_path / "stock", models)).tensor(name).isfinite().all()
    refused(CheckpointError, f"NaN or infinity in {name}", tmp_path / "ours", models)
    with pytest.raises(CheckpointError, match=f"NaN or infinity in {name}"):
        merge(models=[str(model) for model in models], output=tmp_path / "list")
    for noise in (0.0, 0.1):  # with noise, scores are not compared with the dense model's
        with pytest.raises(CheckpointError, match=f"NaN or infinity in {name}"):
            upcycle(model=str(models[1]), output=tmp_path / "moe", expert_noise=noise)
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(4))
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate(
            models={"m": str(models[1])}, pairs={"p": str(pairs)}, probes=["accuracy"], output=tmp_path / "e"
        )


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.down_proj", "model.norm.weight"])
def test_a_moe_with_nan_is_neither_merged_nor_exported(name: str, tmp_path: Path) -> None:
    moe = spoil(make_moe(tmp_path / "moe"), name, float("nan"))
    given = str(Coefficients.of_layers([0, 1, 2], ALPHA, SHARED).save(tmp_path / "fit"))
    for make in (merge, export):
        with pytest.raises(CheckpointError, match="weights are not finite"):
            make(model=str(moe), coefficients=given, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_narrow_dtype_overflows(models: list[Path], tmp_path: Path) -> None:
    for model in models:
        spoil(model, HEAD, 1e6)
    assert Checkpoint(stock(tmp_path / "stock", models, out_dtype="float16")).tensor(HEAD).isinf().any()
    refused(CheckpointError, "NaN or infinity in score.weight", tmp_path / "o", models, out_dtype="float16")


def test_mixed_dtypes_widen(models: list[Path], tmp_path: Path) -> None:
    configure(rewrite(models[0], lambda _, tensor: tensor.to(torch.bfloat16)), dtype="bfloat16")
    assert Checkpoint(stock(tmp_path / "stock", models)).dtype(UP) == torch.float32
    refused(CheckpointError, "differ in dtypes", tmp_path / "ours", models)
    merged = Checkpoint(ours(tmp_path / "float32", models, dtype="float32"))
    assert {merged.dtype(name) for name in merged.names} == {torch.float32}
    torch.testing.assert_close(merged.tensor(UP).double(), half(models, UP), atol=2e-7, rtol=0)


def test_a_bare_list_of_weights_moves_the_head(models: list[Path], tmp_path: Path) -> None:
    lists = [[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]]

    def members(chosen: list[Path]) -> list[dict[str, Any]]:
        pairs = zip(chosen, lists, strict=True)
        return [{"model": str(m), "parameters": {"weight": w}} for m, w in pairs]

    merged = Checkpoint(stock(tmp_path / "stock", models[:2], models=members(models[:2])))
    base, other = (Checkpoint(model).tensor(HEAD) for model in models[:2])
    assert torch.equal(merged.tensor(HEAD), other) and not torch.equal(base, other)
    written = Checkpoint(ours(tmp_path / "ours", models, models=members(models[1:])))
    assert torch.equal(written.tensor(HEAD), base)
    torch.testing.assert_close(written.tensor(UP).double(), half(models, UP), atol=2e-7, rtol=0)


def test_a_misspelt_parameter_is_ignored(models: list[Path], tmp_path: Path) -> None:
    plain = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models[1:]]
    typo = [{**one, "parameters": {"weight": 0.5, "densty": 0.1}} for one in plain]
    found = [
        Checkpoint(stock(tmp_path / n, models, "ties", models=m))
        for n, m in zip("ab", (plain, typo), strict=True)
    ]
    assert all(torch.equal(found[0].tensor(name), found[1].tensor(name)) for name in found[0].names)
    with pytest.raises(RuntimeError, match="Missing required parameter shared_weight"):
        ours(tmp_path / "ours", models, parameters={"shared_wieght": 0.5})
    assert not (tmp_path / "ours").exists()
    with pytest.raises(OptionError, match="densty"):
        merge(
            model=str(make_moe(tmp_path / "moe")),
            method="ties",
            parameters={"weight": 0.5, "densty": 0.1},
            output=tmp_path / "merged",
        )


# Folders


def test_without_a_base_model_the_donor_is_drawn(models: list[Path], tmp_path: Path) -> None:
    """Of config and tokenizer. Thirty-two names of the same two models: is the first one always the donor?"""
    for number, model in enumerate(models):
        configure(model, initializer_range=0.01 * (number + 1))
    places = set()
    for number in range(16):
        links = [tmp_path / f"{place}-{number}" for place in (0, 1)]
        for link, model in zip(links, models, strict=False):
            link.symlink_to(model)
        listed = [{"model": str(link), "parameters": {"weight": 0.5}} for link in links]
        config = MergeConfiguration.model_validate({"merge_method": "linear", "models": listed})
        places.add([str(link) for link in links].index(str(config.referenced_models()[0])))
    assert places == {0, 1}
    donor = config.referenced_models()[0].config().initializer_range
    merged = stock(tmp_path / "stock", links, base_model=None)
    assert ModelFolder(merged).config_json["initializer_range"] == donor
    refused(OptionError, "no base_model", tmp_path / "ours", models, base_model=None)


def test_shards_of_an_earlier_merge_are_read_again(models: list[Path], tmp_path: Path) -> None:
    from mergekit.io.lazy_tensor_loader import ShardedTensorIndex

    out = stock(tmp_path / "out", models[:2], options={"out_shard_size": 40_000})
    old = Checkpoint(out).tensor(UP)
    stock(out, models[1:])
    new = load_file(out / "model.safetensors")[UP]
    assert (out / "model.safetensors.index.json").exists() and not torch.equal(old, new)
    assert ShardedTensorIndex.from_disk(str(out)).tensor_paths[UP] != "model.safetensors"
    with pytest.raises(ArtifactError, match="output exists already"):
        ours(out, models)
    assert torch.equal(load_file(out / "model.safetensors")[UP], new)
    for read in (Checkpoint, lambda f: load_reward_model(f, "cpu")):
        with pytest.raises(CheckpointError, match="two models' weights"):
            read(str(out))
    with pytest.raises(CheckpointError, match="two models' weights"):
        upcycle(model=str(out), output=tmp_path / "moe")


def test_stages_refuse_a_used_output_too(dense_folder: Path, tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for output in (moe, tmp_path / "dangling"):
        for stage, model in ((upcycle, dense_folder), (export, moe)):
            with pytest.raises(ArtifactError, match="output exists already"):
                stage(model=str(model), output=output)
    (tmp_path / "link").symlink_to(shutil.copytree(moe, tmp_path / "copy"))
    made = export(model=str(moe), output=tmp_path / "link", overwrite=True)
    assert not made.is_symlink() and (made / "shared").is_dir() and Checkpoint(tmp_path / "copy").names


def test_an_empty_folder_may_be_the_output(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    assert right(ours(tmp_path / "ours", models), models)
    assert "# ours\n" in (tmp_path / "ours" / "README.md").read_text()


def test_replaced_models_are_merged_as_they_were(models: list[Path], tmp_path: Path) -> None:
    before = Checkpoint(stock(tmp_path / "a", models)).tensor(UP)
    ours(tmp_path / "c", models)
    stock(tmp_path / "stock-first", models)
    save_dense(models[1], seed=9)
    assert torch.equal(Checkpoint(stock(tmp_path / "b", models)).tensor(UP), before)
    assert right(ours(tmp_path / "ours", models), models)
    moe = make_moe(tmp_path / "moe")
    given = str(Coefficients.of_layers([0, 1, 2], ALPHA, SHARED).save(tmp_path / "fit"))
    one = Checkpoint(merge(model=str(moe), coefficients=given, output=tmp_path / "one")).tensor(UP)
    rewrite(moe, lambda name, tensor: tensor * 2 if "expert" in name else tensor)
    two = Checkpoint(merge(model=str(moe), coefficients=given, output=tmp_path / "two")).tensor(UP)
    torch.testing.assert_close(two, 2 * one)


def test_a_relative_path_leaves_a_part_of_the_result(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card asks the hub about m0, when the weights are written already."""
    monkeypatch.chdir(tmp_path)
    names = [model.name for model in models]
    with pytest.raises(Exception, match="offline mode"):
        stock(tmp_path / "stock", names)
    assert (tmp_path / "stock/model.safetensors").exists()
    assert not (tmp_path / "stock/tokenizer.json").exists()
    assert right(ours(tmp_path / "ours", names), models)
    assert (tmp_path / "ours/tokenizer.json").exists()


def test_a_tokenizer_that_cannot_be_copied_and_templates_that_are_not(
    models: list[Path], tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "judge": "{{ messages }}!"}
    tokenizer.save_pretrained(models[0])
    (models[0] / "LICENSE").write_text("mine")
    merged = stock(tmp_path / "stock", models)
    assert AutoTokenizer.from_pretrained(merged).chat_template == "{{ messages }}"
    written = ours(tmp_path / "ours", models)
    assert AutoTokenizer.from_pretrained(written).chat_template == tokenizer.chat_template
    assert (written / "LICENSE").read_text() == "mine"
    moe = upcycle(model=str(models[0]), output=tmp_path / "moe")
    assert AutoTokenizer.from_pretrained(moe).chat_template == tokenizer.chat_template
    for file in models[0].glob("*token*"):
        file.unlink()
    bare = stock(tmp_path / "bare", models)
    assert not list(bare.glob("*token*"))
    refused(CheckpointError, "no tokenizer", tmp_path / "bare-ours", models)
    assert right(ours(tmp_path / "without", models, "--no-copy-tokenizer"), models)


@pytest.mark.parametrize("name", ["a+b", "a@b", "a@b@c+d"])
def test_at_and_plus_in_a_path(name: str, tmp_path: Path, models: list[Path]) -> None:
    """mergekit takes them for revision and LoRA; `moemerge` takes a path for a path."""
    home = tmp_path / name
    home.mkdir()
    moved = [models[0].rename(home / "base"), *models[1:]]
    with pytest.raises((OSError, RuntimeError), match="Repo id|multiple|parse|path"):
        stock(tmp_path / "stock", moved)
    refused(OptionError, "revision and LoRA", tmp_path / "ours", moved)
    dicts: list[Any] = [{"model": {"path": str(moved[0])}}, *moved[1:]]
    assert right(ours(tmp_path / "ours", dicts), moved)
    with pytest.raises(OptionError, match="symbolic link"):
        ours(tmp_path / "multi", dicts, "-I", str(tmp_path / "between"), command="multi")
    (tmp_path / "link").symlink_to(moved[0])
    assert right(ours(home / "written", [tmp_path / "link", *moved[1:]]), moved)


def test_stages_take_any_path_and_links(tmp_path: Path) -> None:
    home = tmp_path / "a@b+c"
    home.mkdir()
    save_dense(home / "dense")
    (tmp_path / "dense").symlink_to(home / "dense")
    fields = {"num_routed_experts": 4, "num_experts_per_tok": 2}
    moes = [upcycle(model=str(at / "dense"), output=at / "moe", **fields) for at in (home, tmp_path)]
    (tmp_path / "linked").symlink_to(moes[0])
    alpha_LN, shared_L = torch.full((3, 4), 0.25).double(), torch.full((3,), 0.5).double()
    given = str(Coefficients.of_layers([0, 1, 2], alpha_LN, shared_L).save(home / "fit"))
    for number, moe in enumerate((*moes, tmp_path / "linked")):
        merged = merge(model=str(moe), coefficients=given, output=home / f"merged-{number}")
        dense, written = load_file(home / "dense/model.safetensors"), load_file(merged / "model.safetensors")
        assert all(torch.equal(written[name], tensor) for name, tensor in dense.items())
        exported = export(model=str(moe), coefficients=given, output=home / f"experts-{number}")
        text = yaml.safe_load((exported / "linear.yml").read_text())
        assert text["base_model"] == "./shared"
        again = stock_merge(exported / "linear.yml", home / f"again-{number}")
        assert (load_file(again / "model.safetensors")[UP] - dense[UP]).abs().max() < 1e-6


def test_stock_methods_stay_stock(models: list[Path], tmp_path: Path) -> None:
    """The checks are for our methods: what mergekit does by its own, it does here."""
    spoil(models[1], UP, float("nan"))
    config = {
        "merge_method": "linear",
        "base_model": str(models[0]),
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in models[:2]],
    }
    (tmp_path / "linear.yml").write_text(yaml.safe_dump(config))
    for _ in range(2):
        run_command("yaml", [str(tmp_path / "linear.yml"), str(tmp_path / "out")], "moemerge mergekit")
    assert Checkpoint(tmp_path / "out").tensor(UP).isnan().any()


def test_multi_and_raw_merges_are_checked(models: list[Path], tmp_path: Path) -> None:
    """A stage of mergekit-multi whose input has lost its head; a raw merge into a used folder."""
    for model in models[:2]:
        configure(model, architectures=["LlamaForCausalLM"])
    members = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models[:2]]
    first = {"name": "first", "merge_method": "linear", "base_model": str(models[0]), "models": members}
    second = {
        "merge_method": INLINE,
        "base_model": str(models[2]),
        "parameters": {"shared_weight": 0.5},
        "models": [{"model": "first", "parameters": {"weight": 1.0}}],
    }
    file = tmp_path / "multi.yml"
    file.write_text(yaml.safe_dump(first) + "---\n" + yaml.safe_dump(second))
    options = ["--out-path", str(tmp_path / "out"), "-I", str(tmp_path / "between")]
    with pytest.raises(UnsupportedError, match="does not say that it is a reward model"):
        run_command("multi", [str(file), *options], "moemerge mergekit")
    assert HEAD not in Checkpoint(tmp_path / "between" / "first").names and not (tmp_path / "out").exists()
    files = [model / "model.safetensors" for model in models]
    assert (load_file(ours(tmp_path / "raw", files, command="pytorch") / "model.safetensors"))[HEAD].any()
    with pytest.raises(ArtifactError, match="output exists already"):
        ours(tmp_path / "raw", files, command="pytorch")


def test_the_method_by_coefficients_is_checked_alike(models: list[Path], tmp_path: Path) -> None:
    alpha_LN, shared_L = torch.full((3, 2), 0.5).double(), torch.full((3,), 0.5).double()
    Coefficients.of_layers([0, 1, 2], alpha_LN, shared_L).save(tmp_path / "fit")
    numbered = [{"model": str(m), "parameters": {"expert": i}} for i, m in enumerate(models[1:])]
    given: dict[str, Any] = {"coefficients": str(tmp_path / "fit")}
    how = {"merge_method": OURS, "parameters": given, "models": numbered}
    assert right(ours(tmp_path / "ours", models, **how), models)
    spoil(models[2], HEAD, float("nan"))
    refused(CheckpointError, f"NaN or infinity in {HEAD}", tmp_path / "nan", models, **how)

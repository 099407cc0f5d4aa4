"""MoE checkpoints as HF folders: exact reload, any dtype and device map, safe without moemerge."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CORE, save_dense, tiny_moe, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline

from moemerge.errors import CheckpointError
from moemerge.merging.mergekit.bridge import OURS
from moemerge.models.families.dense import dense_class, is_moe
from moemerge.models.modelling import load_moe, moe_to_look_at

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = (IDS != 0).long()


@torch.no_grad()
def scores(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, attention_mask=MASK).logits[:, 0].float()


@pytest.fixture(params=CORE)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    model = tiny_moe(request.param)
    model.save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    return model, tmp_path / "moe"


def test_reload_is_exact(saved: tuple[torch.nn.Module, Path]) -> None:
    model, folder = saved
    again, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    torch.testing.assert_close(scores(again), scores(model), rtol=0, atol=1e-8)
    assert is_moe(again.config)
    assert again.config._experts_implementation == "grouped_mm"


def test_a_moe_on_its_mapped_files_is_the_one_loaded(saved: tuple[torch.nn.Module, Path]) -> None:
    """Bit for bit, buffers too; and its weights are views of one file, not copies."""
    _, folder = saved
    loaded, mapped = load_moe(folder), moe_to_look_at(folder)
    for name, tensor in [*loaded.state_dict().items(), *loaded.named_buffers()]:
        found = dict([*mapped.state_dict().items(), *mapped.named_buffers()])[name]
        assert torch.equal(tensor, found) and tensor.dtype == found.dtype, name
    assert torch.equal(scores(mapped), scores(loaded))
    first, *others = (weight.untyped_storage().data_ptr() for weight in mapped.parameters())
    assert max(abs(other - first) for other in others) < (folder / "model.safetensors").stat().st_size


def test_a_moe_of_mixed_dtypes_is_loaded_as_ever(tmp_path: Path) -> None:
    tiny_moe().to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    weights = load_file(tmp_path / "moe/model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, tmp_path / "moe/model.safetensors", metadata={"format": "pt"})
    mapped = moe_to_look_at(tmp_path / "moe")
    assert {weight.dtype for weight in mapped.parameters()} == {torch.bfloat16}
    assert torch.equal(scores(mapped), scores(load_moe(tmp_path / "moe")))


def test_shards_dtypes_and_device_maps(tmp_path: Path) -> None:
    model = tiny_moe()
    model.save_pretrained(tmp_path / "moe", max_shard_size="30KB")
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 2
    load = AutoModelForSequenceClassification.from_pretrained
    for device_map in ("cpu", "auto", {"": "cpu"}):
        assert torch.equal(scores(load(tmp_path / "moe", device_map=device_map)), scores(model))
    offloaded = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "score": "cpu"}
    offloaded["model.rotary_emb"] = "cpu"
    loaded = load(tmp_path / "moe", device_map=offloaded, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(scores(loaded), scores(model))
    half = load(tmp_path / "moe", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(scores(half), scores(model), rtol=0.1, atol=0.05)


def test_pipeline_and_base_model(saved: tuple[torch.nn.Module, Path]) -> None:
    model, folder = saved
    answer = pipeline("text-classification", str(folder), function_to_apply="none")("w1 w2 w3")
    ids = tiny_tokenizer()("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**ids).logits.item()
    assert answer[0]["score"] == pytest.approx(expected, abs=1e-6)
    backbone = AutoModel.from_pretrained(folder)
    assert any(".experts." in name for name, _ in backbone.named_parameters())


BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "moemerge":
            raise ModuleNotFoundError("No module named 'moemerge'", name=name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForSequenceClassification
for trust in (True, False):
    try:
        AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=trust)
        print(trust, "loaded")
    except Exception as error:
        print(trust, str(error).replace("\\n", " "))
"""


def test_without_moemerge_nothing_is_loaded(tmp_path: Path) -> None:
    tiny_moe().save_pretrained(tmp_path / "moe")
    call = [sys.executable, "-c", BLOCKED, str(tmp_path / "moe")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=False)
    trusted, untrusted = done.stdout.splitlines()
    assert trusted.startswith("True ") and "pip install moemerge" in trusted
    assert untrusted.startswith("False ") and "custom code" in untrusted
    assert "pip install moemerge" in (tmp_path / "moe" / "moemerge_shim.py").read_text()


TRAINER = "from transformers import Trainer"
LLAMA = "from transformers import LlamaForSequenceClassification"
REGISTRY = "from mergekit.merge_methods import registry"
KNOWN = """
import sys
assert "moemerge.models.modelling" not in sys.modules
from transformers import AutoConfig, AutoModelForSequenceClassification as Auto
config = AutoConfig.for_model("moemerge_llama")
assert config.model_type == "moemerge_llama" and type(config) in Auto._model_mapping
print(type(Auto.from_pretrained(sys.argv[1])).__name__)
from mergekit.merge_methods import registry
print(registry.get(sys.argv[2]).spec.pretty_name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("imports", [["import moemerge", TRAINER], [REGISTRY, LLAMA, "import moemerge"]])
def test_importing_moemerge_registers_in_either_order(tmp_path: Path, imports: list[str]) -> None:
    """Model types and the merge method, whatever was imported first."""
    tiny_moe().save_pretrained(tmp_path / "moe")
    command = [sys.executable, "-c", "\n".join(imports) + KNOWN, str(tmp_path / "moe"), OURS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    names = ["MoemergeLlamaForSequenceClassification", "Routing-normalised average"]
    assert done.stdout.splitlines() == names, done.stderr


def test_load_moe_refuses_what_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a MoE"):
        load_moe(save_dense(tmp_path / "dense"))
    tiny_moe().save_pretrained(tmp_path / "moe")
    path = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.down_proj"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing: .*layers.1.mlp.experts.down_proj"):
        load_moe(tmp_path / "moe")


def test_unknown_moe_field_in_config_is_refused(tmp_path: Path) -> None:
    tiny_moe().save_pretrained(tmp_path / "moe")
    path = tmp_path / "moe" / "config.json"
    config = json.loads(path.read_text())
    config["moemerge"]["future"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="future"):
        load_moe(tmp_path / "moe")


# What version 0.1 wrote into every MoE folder, here and on the hub; it must work for ever.
OLD_SHIM = '''"""This reward model is a mixture of experts made by moemerge: pip install moemerge"""
import moemerge
from moemerge import modelling

Config = modelling.config_class("llama")
Model = modelling.model_class("llama")
'''
AS_A_USER = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification

assert "moemerge" not in sys.modules
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert [name for name in sys.modules if name.endswith(".moemerge_shim")], "the folder's own code did not run"
with torch.no_grad():
    logits = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
print(json.dumps(logits[:, 0].tolist()))
"""


@pytest.mark.slow
def test_an_old_folder_loads_as_a_user_would(tmp_path: Path) -> None:
    tiny_moe().save_pretrained(tmp_path / "moe")
    (tmp_path / "moe" / "moemerge_shim.py").write_text(OLD_SHIM)
    command = [sys.executable, "-c", AS_A_USER, str(tmp_path / "moe"), json.dumps(IDS[:1].tolist())]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load_moe(tmp_path / "moe")(input_ids=IDS[:1]).logits[:, 0]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected)


def test_saving_twice_through_the_shim_keeps_one_shim(tmp_path: Path) -> None:
    tiny_moe().save_pretrained(tmp_path / "one")
    load = AutoModelForSequenceClassification.from_pretrained
    load(tmp_path / "one", trust_remote_code=True).save_pretrained(tmp_path / "two")
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {"config.json", "model.safetensors", "moemerge_layout.json", "moemerge_shim.py"}
    one, two = (json.loads((tmp_path / n / "config.json").read_text())["auto_map"] for n in ("one", "two"))
    assert one == two
    assert torch.equal(scores(load(tmp_path / "two")), scores(load(tmp_path / "one")))


def test_configs_pickle_and_know_their_dense_class() -> None:
    model = tiny_moe("gemma2")
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()
    assert dense_class(model.config).__name__ == "Gemma2ForSequenceClassification"
    assert type(AutoConfig.for_model("moemerge_gemma2")) is type(model.config)

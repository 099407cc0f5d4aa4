"""A merged model in the libraries that use reward models: they score with it as moemerge does."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hostile_files import edit_json
from small_moe import make_moe, random_pairs, write_rows
from small_policy import save_policy
from tiny_models import scores, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from venvs import installed

from moemerge.stages.fit import fit
from moemerge.stages.merge import merge
from moemerge.stages.train import train

pytestmark = pytest.mark.slow

TEXTS = ["w1 w2 w3", "w5 w7", "w9 w4 w2 w33 w21 w8"]
FOLDERS = ("llama", "bert")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder and an encoder, each merged from a mixture whose experts differ."""
    home = tmp_path_factory.mktemp("peers")
    made = {}
    for family in FOLDERS:
        moe = make_moe(home / f"moe-{family}", family)
        if family == "llama":  # positions of its own, which version 4 keeps under another name
            edit_json(moe / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 30.0})
        pairs = write_rows(home / "pairs.jsonl", random_pairs(8))
        moe = train(moe, pairs, output=home / f"trained-{family}", max_steps=1)
        fitted = fit(moe, method="uniform", output=home / f"fit-{family}")
        made[family] = merge(moe, fitted, output=home / family)
    return made


def scored(folder: Path, texts: list[str]) -> list[float]:
    """One at a time, by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


@pytest.mark.parametrize("family", FOLDERS)
def test_pipeline(merged: dict[str, Path], family: str) -> None:
    pipe = pipeline("text-classification", str(merged[family]), function_to_apply="none")
    assert [one["score"] for one in pipe(TEXTS)] == pytest.approx(scored(merged[family], TEXTS), abs=1e-6)
    assert {one["label"] for one in pipe(TEXTS)} == {"reward"}


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_trl_optimises_a_policy_against_it(merged: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The rewards that TRL logs are the merged model's of what the policy wrote."""
    import trl

    seen: list[str] = []

    def note(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.extend(prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=5,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        seed=0,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(save_policy(tmp_path / "policy")),
        reward_funcs=[str(merged["llama"]), note],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1} "} for i in range(8)]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    (name,) = [name for name in logged if re.fullmatch("rewards/.*llama/mean", name)]
    assert len(seen) == 4
    assert logged[name] == pytest.approx(sum(scored(merged["llama"], seen)) / len(seen), abs=1e-5)


def test_trl_trains_it_further(merged: dict[str, Path], tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in random_pairs(8)]
    trainer = RewardTrainer(str(merged["llama"]), args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model(str(tmp_path / "further"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "further").eval()
    before = AutoModelForSequenceClassification.from_pretrained(merged["llama"]).eval()
    assert type(again) is type(before) and (scores(again) != scores(before)).any()


def run_in(python: Path, code: str, *given: object) -> Any:
    """What `code` prints, as JSON, in another environment."""
    call = [str(python), "-c", code, *map(str, given)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


OLD = """
import json, sys, torch, transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
assert transformers.__version__.startswith("4.5"), transformers.__version__
found = {}
texts = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        alone = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    pipe = pipeline("text-classification", folder, function_to_apply="none", device="cpu")
    found[folder] = [alone, [one["score"] for one in pipe(texts)]]
print(json.dumps(found))
"""
CROSS = """
import json, sys, torch
from sentence_transformers import CrossEncoder
found = {}
for folder in sys.argv[2:]:
    encoder = CrossEncoder(folder, activation_fn=torch.nn.Identity(), device="cpu")
    found[folder] = [float(one) for one in encoder.predict(json.loads(sys.argv[1]))]
print(json.dumps(found))
"""
BENCH = """
import json, sys
from transformers import BatchEncoding
BatchEncoding.to = lambda self, device: self  # it asks for a GPU by name
from rewardbench.rewardbench import Args, rewardbench
model, pairs, out = sys.argv[1:]
rewardbench(Args(model=model, dataset=pairs, load_json=True, chat_template="raw", not_quantized=True,
                 torch_dtype="float32", batch_size=2, output_dir=out))
print(json.dumps([json.loads(line) for line in open(model + "_outputs.jsonl")]))
"""


def test_transformers_4_scores_alike(merged: dict[str, Path], tmp_path: Path) -> None:
    python = installed(tmp_path / "env", "transformers>=4.57,<5")
    if python is None:
        pytest.skip("transformers 4 cannot be installed here")
    found = run_in(python, OLD, json.dumps(TEXTS), *merged.values())
    for folder in merged.values():
        for theirs in found[str(folder)]:
            assert theirs == pytest.approx(scored(folder, TEXTS), abs=1e-5)


def test_a_cross_encoder_scores_alike(merged: dict[str, Path], tmp_path: Path) -> None:
    """sentence-transformers reads prompt and answer as a pair of texts."""
    python = installed(tmp_path / "env", "sentence-transformers>=5")
    if python is None:
        pytest.skip("sentence-transformers cannot be installed here")
    pairs = [["w1 w2", text] for text in TEXTS]
    found = run_in(python, CROSS, json.dumps(pairs), *merged.values())
    for folder in merged.values():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            expected = [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]
        assert found[str(folder)] == pytest.approx(expected, abs=1e-5)


def test_rewardbench_scores_alike(merged: dict[str, Path], tmp_path: Path) -> None:
    """The whole package, with the transformers that it wants; it pads on the left, so positions move."""
    python = installed(tmp_path / "env", "rewardbench==0.1.4", "setuptools<81")
    if python is None:
        pytest.skip("rewardbench cannot be installed here")
    chats = [[{"role": role, "content": text} for role in ("user", "assistant")] for text in TEXTS]
    rows = [{"prompt": "w1", "chosen": chats[i], "rejected": chats[i - 1]} for i in range(len(chats))]
    found = run_in(python, BENCH, merged["llama"], write_rows(tmp_path / "pairs.jsonl", rows), tmp_path)
    for side in ("chosen", "rejected"):
        expected = scored(merged["llama"], [row[f"text_{side}"] for row in found])
        assert [row[f"scores_{side}"] for row in found] == pytest.approx(expected, abs=1e-4)

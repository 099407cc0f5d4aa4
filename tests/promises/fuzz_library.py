"""Good inputs for the fuzzer, made once per process: models of each kind, tokenizers, a whole small run."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from small_moe import make_moe
from small_policy import CHAT, save_policy, write_prompts
from small_run import TINY_RUN
from tiny_models import SIZES, save_dense, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from moemerge.options.recipe import Recipe
from moemerge.run.pipeline import run_recipe

FAMILIES = ("llama", "bert", "gemma2", "gpt2")
GOLD = "def few(prompt, answer):\n    return -float(len(answer))\n"
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
WORDS = ["<pad>", "<eos>", "<unk>", "<bos>"]


@cache
def library() -> Path:
    """A folder with `dense` models by family, a `moe`, a `native` one, a `policy`, `tokenizers`, a `run`."""
    root = Path(tempfile.mkdtemp(prefix="moemerge-fuzz-library-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for family in FAMILIES:
        save_dense(root / "dense" / family, family)
    make_moe(root / "moe", gate="topk")
    _save_native(root / "native")
    save_policy(root / "policy", chat=True)
    for name, core in _tokenizers().items():
        _save_tokenizer(root / "tokenizers" / name, core)
    run_recipe(recipe(root, root / "run"))
    return root


def recipe(root: Path, output: Path) -> Recipe:
    """The recipe of the run: every section that a run's page shows something of."""
    (root / "gold.py").write_text(GOLD)
    policy: dict[str, Any] = {
        "policy": str(root / "policy"),
        "prompts": write_prompts(root / "prompts.jsonl", 12),
        "gold_function": f"{root / 'gold.py'}:few",
        "max_new_tokens": 3,
    }
    numbers = {"steps": 2, "batch_size": 8, "measure_prompts": 4, "resamples": 100}
    sections = {
        "data": {"max_length": 64},
        "strength": {"folds": 2, "orders": 1, "max_steps": 1, "fold_by": "prompt"},
        "evaluate": {"resamples": 100, "probes": ["accuracy", "best_of_n"]},
    }
    return Recipe(output=output, **TINY_RUN, **sections, optimise={**policy, **numbers})


def _save_native(folder: Path) -> None:
    """A mixture of experts of transformers."""
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("mixtral", **sizes)
    AutoModelForSequenceClassification.from_config(config).float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _tokenizers() -> dict[str, Tokenizer]:
    """One of each kind that models have, with what stands around it."""
    letters = [chr(code) for code in range(33, 127)]
    pairs = [("w", str(digit)) for digit in range(10)]
    vocabulary = {token: i for i, token in enumerate([*WORDS, *letters, "Ġ", *(a + b for a, b in pairs)])}
    bpe = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", 3)])
    scored = [(token, -float(i)) for i, token in enumerate([*WORDS, "▁", *letters, "▁w"])]
    unigram = Tokenizer(models.Unigram(scored, unk_id=2))
    unigram.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(" ", "▁"), normalizers.Prepend("▁"), normalizers.Lowercase()]
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    pieces = {token: i for i, token in enumerate([*WORDS, *letters, *(f"##{letter}" for letter in letters)])}
    wordpiece = Tokenizer(models.WordPiece(pieces, unk_token="<unk>"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.post_processor = processors.BertProcessing(("<eos>", 1), ("<bos>", 3))
    return {"bpe": bpe, "unigram": unigram, "wordpiece": wordpiece}


def _save_tokenizer(folder: Path, core: Tokenizer) -> None:
    """A folder with a tokenizer in the three files that models of older versions have, and a config."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", **SPECIAL)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<bos>", **SPECIAL}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))

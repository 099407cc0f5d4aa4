"""The stage synthetic: a preference world with a known gold reward, on disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from moemerge.artifacts.stage import Draft, stage
from moemerge.data.rows import Row, write_rows
from moemerge.data.world import REGIMES, SHIFTED, TRAINING, VOCABULARY, WIDE, candidate_rows, pair_rows
from moemerge.options.synthetic import Synthetic


@stage("synthetic", Synthetic)
def write_world(options: Synthetic, draft: Draft) -> None:
    """Write the world: a tiny untrained Llama reward model with its tokenizer, and data in every split.

    model/ loads with transformers' Auto classes. data/ is laid out as the stage data does it: train and
    validation .jsonl.gz with noisy labels, tests/in_distribution and tests/out_of_distribution with true
    ones, candidates/wide with gold scores; `subset` is the regime. For models trained apart there are
    regimes/NAME, the training pairs of one regime each, and own, pairs with true labels of all regimes but
    the last, which is left to what these models start from.
    """
    rngs = (np.random.default_rng([options.seed, part]) for part in itertools.count())
    sets: dict[str, Iterable[Row]] = {
        "train": pair_rows(next(rngs), TRAINING, options.train_pairs, options.label_noise),
        "validation": pair_rows(next(rngs), TRAINING, options.validation_pairs, options.label_noise),
        "tests/in_distribution": pair_rows(next(rngs), TRAINING, options.test_pairs, 0.0),
        "tests/out_of_distribution": pair_rows(next(rngs), SHIFTED, options.test_pairs, 0.0),
        "candidates/wide": candidate_rows(next(rngs), WIDE, options.prompts, options.candidates),
        "own": _own_pairs(next(rngs), options.own_pairs),
    }
    sets |= _by_regime(sets["train"])
    files = {name: draft.folder / "data" / f"{name}.jsonl.gz" for name in sets}
    draft.results["sizes"] = {name: write_rows(files[name], rows) for name, rows in sets.items()}
    _write_model(options, draft.folder / "model")


def _own_pairs(rng: np.random.Generator, count: int) -> list[Row]:
    """`count` pairs with true labels, of any regime but the last."""
    rows = pair_rows(rng, TRAINING, 4 * count, 0.0)
    return [row for row in rows if row["subset"] != REGIMES[-1]][:count]


def _by_regime(rows: Iterable[Row]) -> dict[str, Iterable[Row]]:
    """The rows of each regime, as the set regimes/NAME."""
    return {f"regimes/{name}": [row for row in rows if row["subset"] == name] for name in REGIMES}


def _write_model(options: Synthetic, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, LlamaForSequenceClassification

    tokenizer = _tokenizer()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(VOCABULARY),
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=_heads(options.hidden_size),
        max_position_embeddings=64,
        initializer_range=0.06,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        LlamaForSequenceClassification(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _heads(hidden_size: int) -> int:
    """Four heads or as many as divide the width into heads of even size."""
    return next(n for n in (4, 2, 1) if hidden_size % (2 * n) == 0 or n == 1)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=64,
    )

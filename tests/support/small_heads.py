"""Tiny reward models under heads of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moemerge.models.heads import HEADS
from moemerge.models.heads.saved import SavedHead
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.options.head import HeadOptions


def make_head(kind: str, inputs: int = 6, width: int = 5, seed: int = 0, **more: Any) -> Any:
    """A head by itself, float64 and in training, its weights drawn and large enough to matter."""
    given = {"dropout": 0.0, "noise": kind == "nonnegative", "origin": "", **more}
    head = HEADS.get(kind)(inputs, SavedHead(kind, width, **given)).double()
    head.draw(torch.Generator().manual_seed(seed), "positive")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(2.0)
    return head.train()


def under_head(dense: Path, output: Path, kind: str, seed: int = 0, **options: Any) -> Path:
    """The model in `dense` under a new head, drawn from `seed`, with its tokenizer."""
    chosen = HeadOptions(head=kind, **{"head_width": 8, **options} if kind != "linear" else options)
    model = load_reward_model(str(dense), "cpu", fresh_head_seed=seed, head=chosen)
    model.save_pretrained(output)
    load_tokenizer(str(dense)).save_pretrained(output)
    return output

"""The sections of a recipe that runs in seconds: a tiny world, two steps of training, the uniform merge."""

from __future__ import annotations

from typing import Any

TINY_RUN: dict[str, Any] = {
    "threads": 1,
    "device": "cpu",
    "synthetic": {
        "train_pairs": 24,
        "validation_pairs": 16,
        "test_pairs": 16,
        "prompts": 2,
        "candidates": 4,
        "hidden_size": 16,
        "num_layers": 1,
    },
    "control": {"max_steps": 2, "learning_rate": 1e-3, "patience": None},
    "train": {"max_steps": 2, "learning_rate": 1e-3, "patience": None},
    "upcycle": {"num_routed_experts": 3, "num_experts_per_tok": 2},
    "fit": {"method": "uniform"},
}

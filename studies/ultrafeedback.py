"""SmolLM2-135M on UltraFeedback with flipped labels, upcycled and merged, over seeds.

python studies/ultrafeedback.py MODELS DATA --seeds 1 2 3 --output runs/ultrafeedback --label_noise 0.3

A form for a CPU, as helpful_harmless.py: the last two of 30 layers train, and pairs are those of at most
2,000 characters and 512 tokens. MODELS: folder written by fetch_models.py. DATA: folder with
ultrafeedback_1k and tulu_human_eval. The seed draws the pairs; their flipped labels are the data set's own
(20 or 30 %). Fitting and held-out pairs have clean labels. Models are named as there: base (100 pairs),
control and moe (260 pairs), its merges, and tuned (control on the 70 fitting pairs).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from common import read
from helpful_harmless import options, run, tulu_pairs
from real_data import Dealt, longest, shuffled

LONGEST = 2000


def deal(data: Path, draw: random.Random, label_noise: float) -> Dealt:
    """What seed and data give; noisy and clean pairs are not the same ones."""
    noise = f"label_flip_{round(100 * label_noise)}" if label_noise else "train_clean"
    clean, noisy, test = (
        read(data / f"ultrafeedback_1k/{name}.jsonl.gz") for name in ("train_clean", noise, "eval_clean")
    )
    both = shuffled(((a, b) for a, b in zip(clean, noisy, strict=True) if longest(a) < LONGEST), draw)
    pairs = {
        "base": [b for _, b in both[:100]],
        "train": [b for _, b in both[100:360]],
        "held": [a for a, _ in both[360:430]],
        "fit": [a for a, _ in both[430:500]],
    }
    tests = {"ultrafeedback": [row for row in test if longest(row) < LONGEST]}
    return Dealt(pairs, tests | {"tulu": tulu_pairs(data)}, {})


if __name__ == "__main__":
    arguments = options(__doc__, Path("runs/ultrafeedback")).parse_args()
    run(argparse.Namespace(**vars(arguments), max_length=512, short=True), deal)

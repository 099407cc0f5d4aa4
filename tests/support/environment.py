"""Where tests run: no network, one thread, no waiting for disks. Import it before torch and transformers."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread per process, also in those that tests start: tests run side by side, models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
# What is tested here is not whether a disk keeps what it has taken, and waiting for it takes minutes.
FSYNC, os.fsync = os.fsync, lambda handle: None

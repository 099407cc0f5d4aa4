"""What every test has: an environment, and a model that is made once."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import environment  # noqa: F401  (before torch)
import pytest
from tiny_models import save_dense

FROZEN: set[str] = set()  # modules whose objects no collection looks at


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama reward model on disk; read only."""
    return save_dense(tmp_path_factory.mktemp("models") / "dense")


def pytest_runtest_setup() -> None:
    """Let no collection of garbage look through all that was imported: trainers and stages collect often."""
    if len(sys.modules) > 1.02 * len(FROZEN):
        gc.freeze()
        FROZEN.update(sys.modules)

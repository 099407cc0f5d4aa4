"""What every test has: an environment, and a model that is made once."""

from __future__ import annotations

from pathlib import Path

import environment  # noqa: F401  (before torch)
import pytest
from tiny_models import save_dense


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama reward model on disk; read only."""
    return save_dense(tmp_path_factory.mktemp("models") / "dense")

"""What every test has: an environment, and a model that is made once."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment  # noqa: F401  (before torch)
import pytest
from tiny_models import save_dense

FROZEN: set[str] = set()  # modules whose objects no collection looks at


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama reward model on disk; read only."""
    return save_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module", autouse=True)
def rough_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pictures are drawn whole, but small and not laid out, where a test is not of pictures."""

    def roughly(figure: Any) -> None:
        figure.set_layout_engine(None)
        figure.set_dpi(30)

    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "reports":
            patch.setattr("moemerge.reports.plotting._lay_out", roughly)
        yield


def pytest_runtest_setup() -> None:
    """Let no collection of garbage look through all that was imported: trainers and stages collect often."""
    if len(sys.modules) > 1.02 * len(FROZEN):
        gc.freeze()
        FROZEN.update(sys.modules)

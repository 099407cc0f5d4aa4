"""What every test has: an environment, and a model that is made once."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment  # noqa: F401  (before torch)
import pytest
from PIL import Image
from tiny_models import save_dense

from moemerge.reports.figures import Plot, save_plot

DRAWING = {
    "reports",
    "evaluation",
    "test_compare",
    "test_optimise",
}  # folders and modules that look at pictures
FROZEN: set[str] = set()  # modules whose objects no collection looks at


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama reward model on disk; read only."""
    return save_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module", autouse=True)
def no_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """One picture in place of all, but for tests of what is drawn: drawing is a third of a tiny stage."""

    def dot(figure: Any, path: Path, plot: Plot) -> Path:
        Image.new("L", (1, 1)).save(path, format="png")
        save_plot(plot, path)
        return path

    with pytest.MonkeyPatch.context() as patch:
        if not {request.path.parent.name, request.path.stem} & DRAWING:
            patch.setattr("moemerge.reports.plotting._save", dot)
        yield


def pytest_runtest_setup() -> None:
    """Let no collection of garbage look through all that was imported: trainers and stages collect often."""
    if len(sys.modules) > 1.02 * len(FROZEN):
        gc.freeze()
        FROZEN.update(sys.modules)

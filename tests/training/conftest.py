"""What the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_training import rows, write
from tiny_models import save_dense

from moemerge.stages.upcycle import upcycle


@pytest.fixture
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training; one test draws."""
    if request.node.name != "test_output_is_quiet_complete_and_alone":
        monkeypatch.setattr("moemerge.training.report.panels", lambda *_: None)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, MoEs made of it, and files of pairs; read only."""
    folder = tmp_path_factory.mktemp("world")
    dense = save_dense(folder / "dense")
    made = {"num_routed_experts": 4, "num_experts_per_tok": 2, "router_init_std": 0.5}
    for name, more in {
        "moe": {"balance_coefficient": 0.1},
        "free": {"balance_coefficient": 0.0},
        "upper": {"layers": "last:2"},
        "prompt": {"gate": "prompt"},
    }.items():
        upcycle(model=str(dense), output=folder / name, **made, **more)
    write(folder / "train.jsonl", rows(48, 1))
    write(folder / "held.jsonl", rows(13, 2))
    write(folder / "flipped.jsonl", rows(24, 3, flip=True))
    write(folder / "margin.jsonl", rows(8, 4, margin=True))
    return folder

"""Studies of real models: upper layers on kept states are the model (studies/frozen_layers.py)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.support.tiny_models import batch, save_dense, scores

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(STUDIES)
    yield importlib.import_module("frozen_layers")
    sys.modules.pop("frozen_layers")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of the scores' squares."""
    model.zero_grad()
    model(**batch()).logits.square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_upper_layers_on_kept_states_give_the_whole_models_scores(
    layers: Any, tmp_path: Path, family: str
) -> None:
    load = AutoModelForSequenceClassification.from_pretrained
    whole = load(save_dense(tmp_path / "whole", family)).eval()
    upper = load(layers.upper_layers(tmp_path / "whole", 2, tmp_path / "upper"), num_labels=1).eval()
    head = {
        name: weight for name, weight in whole.state_dict().items() if name.startswith(("class", "score"))
    }
    upper.load_state_dict(head, strict=False)
    lower = layers.LowerLayers(tmp_path / "whole", 2)
    wanted = scores(whole)
    with layers.install(lower):
        torch.testing.assert_close(scores(upper), wanted)
        found = gradients(upper)
    with layers.install(lower, pooled_only=True):
        torch.testing.assert_close(scores(upper), wanted)
        torch.testing.assert_close(gradients(upper), found)

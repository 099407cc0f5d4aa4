"""Attention heads, read and replaced at one token, in every decoder family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import SIZES, TINY
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moemerge.errors import CheckpointError, UnsupportedError
from moemerge.models.attention_heads import AttentionHeads
from moemerge.models.families import FAMILIES
from moemerge.models.scorers.activation import read_heads, write_heads

ENDS_2 = torch.tensor([8, 5])
IDS_2T = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def trunk_of(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(CONFIG_MAPPING[family](**{**SIZES, **TINY[family], **changes})).eval()


@torch.no_grad()
def states(trunk: Any) -> Tensor:
    found: Tensor = trunk(IDS_2T)[0]
    return found


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.causal])
def test_only_the_heads_of_a_mask_change_and_own_activations_change_nothing(family: str) -> None:
    trunk = trunk_of(family)
    heads, plain_2TD = AttentionHeads(trunk), states(trunk)
    with heads.reading(ENDS_2) as read:
        assert torch.equal(states(trunk), plain_2TD)
    own_2LHE = torch.stack(read, 1)
    layers, count, size = heads.shape
    assert own_2LHE.shape == (2, *heads.shape)
    none = torch.zeros(2, layers, count, dtype=torch.bool)
    with heads.replacing(ENDS_2, torch.ones(heads.shape), none):
        assert torch.equal(states(trunk), plain_2TD)
    for row in range(2):
        mine = none.clone()
        mine[row] = True
        with heads.replacing(ENDS_2, own_2LHE[row], mine):
            assert torch.equal(states(trunk), plain_2TD)
    # One head of the first text: the others, earlier tokens and the other text stay as they were.
    one = none.clone()
    one[0, 1, 2] = True
    with heads.replacing(ENDS_2, torch.full(heads.shape, 7.0), one), heads.reading(ENDS_2) as after:
        changed_2TD = states(trunk)
    assert torch.equal(changed_2TD[1], plain_2TD[1]) and torch.equal(changed_2TD[0, :8], plain_2TD[0, :8])
    assert not torch.equal(changed_2TD[0, 8], plain_2TD[0, 8])
    expected = own_2LHE[:, 1].clone()
    expected[0, 2] = 7.0
    assert torch.equal(after[1], expected) and torch.equal(after[0], own_2LHE[:, 0])
    assert not trunk_hooks(trunk) and size


def trunk_hooks(trunk: Any) -> list[Any]:
    return [hook for part in trunk.modules() for hook in part._forward_pre_hooks.values()]


def test_heads_of_other_sizes_than_width_over_count() -> None:
    trunk = trunk_of("qwen3", num_key_value_heads=1, head_dim=16)
    assert AttentionHeads(trunk).shape == (3, 4, 16)


def test_what_has_no_heads_of_one_size_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="an encoder"):
        AttentionHeads(trunk_of("bert"))
    trunk = trunk_of("llama")
    trunk.layers[1].self_attn.o_proj = torch.nn.Linear(24, 32)
    with pytest.raises(UnsupportedError, match="24, 32"):
        AttentionHeads(trunk)
    trunk.layers[1].self_attn.o_proj = torch.nn.Identity()
    trunk.layers[1].self_attn.other = torch.nn.Linear(4, 4)
    del trunk.layers[1].self_attn.o_proj
    with pytest.raises(UnsupportedError, match="llama"):
        AttentionHeads(trunk)


def test_heads_on_disk_round_trip(tmp_path: Path) -> None:
    mask, values = torch.rand(3, 4) > 0.5, torch.rand(3, 4, 8)
    write_heads(tmp_path / "h", mask, values)
    read_mask, read_values = read_heads(tmp_path / "h", (3, 4, 8))
    assert torch.equal(read_mask, mask) and torch.equal(read_values, values * mask[..., None])


BROKEN: dict[str, dict[str, Tensor]] = {
    "lacks": {"places": torch.tensor([[3, 0]]), "values": torch.zeros(1, 8)},
    "twice": {"places": torch.tensor([[1, 0], [1, 0]]), "values": torch.zeros(2, 8)},
    "tensors": {"places": torch.tensor([[1, 0]]), "values": torch.zeros(1, 9)},
    "12": {"places": torch.zeros(13, 2, dtype=torch.long), "values": torch.zeros(13, 8)},
    "finite": {"places": torch.tensor([[1, 0]]), "values": torch.full((1, 8), torch.nan)},
    "heads of 8": {"places": torch.tensor([[1.0, 0.0]]), "values": torch.zeros(1, 8), "more": torch.zeros(1)},
}


@pytest.mark.parametrize("said", BROKEN)
def test_broken_heads_are_refused(tmp_path: Path, said: str) -> None:
    save_file(BROKEN[said], tmp_path / "h")
    with pytest.raises(CheckpointError, match="cannot be read" if said == "12" else said):
        read_heads(tmp_path / "h", (3, 4, 8))
    (tmp_path / "h").write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_heads(tmp_path / "h", (3, 4, 8))


def test_the_trunk_alone_is_what_a_language_model_holds() -> None:
    """A head's place does not depend on how the trunk was loaded."""
    config = CONFIG_MAPPING["llama"](**{**SIZES, **TINY["llama"]})
    assert AttentionHeads(AutoModelForCausalLM.from_config(config).base_model).shape == (3, 4, 8)

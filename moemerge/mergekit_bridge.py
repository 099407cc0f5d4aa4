"""mergekit's merge method `routing_normalized_average`: dense checkpoints averaged by fitted coefficients.

In a mergekit configuration the base model is the shared expert, and gives everything that is not an expert;
each other model has the parameter `expert`, its number among the routed experts; the parameter
`coefficients` is a folder that `moemerge fit` wrote, or its file.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    OptionalTensorPolicy,
    PerNonBase,
    TensorGroup,
)
from mergekit.merge_methods.easy_define import merge_method
from pydantic import Field

from moemerge.averaging import routing_normalized_average
from moemerge.coefficients.base import FILE, Coefficients
from moemerge.errors import CheckpointError, OptionError

NAME = "routing_normalized_average"


@merge_method(  # type: ignore[untyped-decorator]
    name=NAME,
    pretty_name="Routing-normalised average",
    reference_url="https://arxiv.org/abs/2512.00724",
    contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
)
def average(
    group: TensorGroup, expert: PerNonBase[Annotated[int, Field(ge=0)]], coefficients: str
) -> torch.Tensor:
    """The average of one MLP tensor by its layer's coefficients; any other tensor is the base model's.

    Layers that the coefficients leave out are the base model's too. Raises OptionError unless the models are
    numbered 0 ... N-1, each once, CheckpointError for coefficients that cannot be read.
    """
    found = _load(coefficients)
    numbers = expert.values_for(group.non_base)
    _check_experts(numbers, found.num_experts)
    assert group.base is not None
    layer = mlp_layer(group.metadata.name or "")
    if layer is None or layer not in found.layers:
        return group.base.tensor
    place = found.layers.index(layer)
    in_order = [
        entry.tensor for _, entry in sorted(zip(numbers, group.non_base, strict=True), key=lambda p: p[0])
    ]
    return routing_normalized_average(
        group.base.tensor, in_order, found.alpha_LN[place], float(found.shared_L[place])
    )


def register() -> None:
    """Make the method known to mergekit by its name; once is enough, twice does no harm."""
    if NAME not in [method.spec.name for method in registry.registered_methods()]:
        registry.register(average)


def mlp_layer(name: str) -> int | None:
    """The layer whose MLP holds the tensor `name` of a dense checkpoint; None if it is no MLP's."""
    match = _mlp_pattern().search(name)
    return int(match.group(1)) if match else None


@cache
def _mlp_pattern() -> re.Pattern[str]:
    """Names of MLP tensors in the families that moemerge knows."""
    from moemerge.families import FAMILIES

    families = [FAMILIES.get(name) for name in FAMILIES]
    layers = {family.layers.rpartition(".")[2] for family in families}
    matrices = {path for family in families for _, path in family.matrices}
    either = [f"(?:{'|'.join(map(re.escape, sorted(names)))})" for names in (layers, matrices)]
    return re.compile(rf"(?:^|\.){either[0]}\.(\d+)\.{either[1]}\.(?:weight|bias)$")


def _load(source: str) -> Coefficients:
    path = Path(source)
    file = path / FILE if path.is_dir() else path
    try:
        return _load_version(str(file), file.stat().st_mtime_ns)
    except OSError as error:
        raise CheckpointError(
            "coefficients cannot be read",
            given=f"{source} ({error.strerror})",
            expected="a folder that `moemerge fit` wrote, or its file",
            fix="correct the parameter coefficients; relative paths start at the working directory",
        ) from error


@lru_cache(maxsize=8)
def _load_version(file: str, mtime_ns: int) -> Coefficients:
    return Coefficients.load(file)


def _check_experts(numbers: list[int], count: int) -> None:
    if sorted(numbers) != list(range(count)):
        raise OptionError(
            "models and coefficients do not match",
            given=f"models with expert: {', '.join(map(str, numbers))}",
            expected=f"{count} models besides the base, with expert: 0 to {count - 1}, each once",
            fix="correct the parameter expert of each model, or give the coefficients of this merge",
        )


register()

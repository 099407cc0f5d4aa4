"""What a MoE's config says about its tensors, kept beside its weights: then a merge needs no model classes.

Importing those takes longer than merging a gigabyte.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moemerge.families.base import ExpertTensor
from moemerge.provenance import package_version

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "moemerge_layout.json"
FORMAT = "moemerge layout 1"


@dataclass(frozen=True)
class Layout:
    """A function of a MoE's config: the MoE's tensors, the dense model's, and the dense model's config.

    `class_name` is the MoE's class and `moe` its tensors' shapes by name, of which `tied` may be missing in a
    checkpoint; `dense` are the names of the dense model's tensors in its own order, `experts` those of its
    MLPs; `dense_config` is what stands in its config.json.
    """

    class_name: str
    moe: dict[str, tuple[int, ...]]
    tied: list[str]
    dense: list[str]
    experts: list[ExpertTensor]
    dense_config: dict[str, Any]


def layout_of(config: PretrainedConfig) -> Layout:
    """The layout that follows from a MoE's config; builds both models without weights."""
    from moemerge.families import family_of
    from moemerge.families.dense import dense_config, skeleton
    from moemerge.modelling import model_class

    family = family_of(config)
    with torch.device("meta"):
        model = model_class(family.model_type)(config)
    return Layout(
        class_name=type(model).__name__,
        moe={name: tuple(value.shape) for name, value in model.state_dict().items()},
        tied=list(getattr(model, "all_tied_weights_keys", None) or {}),
        dense=list(skeleton(config).state_dict()),
        experts=family.expert_tensors(config),
        dense_config=json.loads(dense_config(config).to_json_string()),
    )


def write_layout(folder: str | Path) -> None:
    """Keep the layout of the MoE in `folder` there."""
    from transformers import AutoConfig

    values = asdict(layout_of(AutoConfig.from_pretrained(folder)))
    for tensor in values["experts"]:
        tensor["rows"] = [tensor["rows"].start, tensor["rows"].stop]
    text = json.dumps({"for": _key(Path(folder)), **values})
    (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")


def read_layout(folder: Path) -> Layout | None:
    """The layout kept in `folder`; None if there is none for its config.json by the versions at hand."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if values.pop("for") == _key(folder):
            values["moe"] = {name: tuple(shape) for name, shape in values["moe"].items()}
            values["experts"] = [_expert_tensor(**tensor) for tensor in values["experts"]]
            return Layout(**values)
    return None


def _expert_tensor(rows: list[int], shape: list[int], **values: Any) -> ExpertTensor:
    return ExpertTensor(rows=slice(*rows), shape=tuple(shape), **values)


def _key(folder: Path) -> str:
    """Changes with everything that a layout follows from."""
    versions = f"{FORMAT} {package_version()} {metadata.version('transformers')}\n"
    return hashlib.sha256(versions.encode() + (folder / "config.json").read_bytes()).hexdigest()

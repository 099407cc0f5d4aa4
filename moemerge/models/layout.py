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
from typing import Any

from moemerge.artifacts.environment import package_version
from moemerge.artifacts.json_file import read_object
from moemerge.models.families.base import ExpertTensor

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


def write_layout(folder: str | Path, layout: Layout) -> None:
    """Keep the layout of the MoE in `folder` there."""
    values = asdict(layout)
    for tensor in values["experts"]:
        tensor["rows"] = [tensor["rows"].start, tensor["rows"].stop]
    text = json.dumps({"for": _key(Path(folder)), **values})
    (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")


def read_layout(folder: Path) -> Layout | None:
    """The layout kept in `folder`; None if there is none for its config.json by the versions at hand."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        values = read_object(folder / FILE)
        if values.pop("for") == _key(folder):
            values["moe"] = {name: tuple(shape) for name, shape in values["moe"].items()}
            values["experts"] = [_expert_tensor(**tensor) for tensor in values["experts"]]
            layout = Layout(**values)
            return layout if _sound(layout) else None
    return None


def _sound(layout: Layout) -> bool:
    """Whether values are of their types, and tensors, shapes and rows agree with each other."""
    texts = [layout.class_name, *layout.moe, *layout.tied, *layout.dense]
    shapes = [*layout.moe.values(), *(tensor.shape for tensor in layout.experts)]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(size) is int and size >= 0 for shape in shapes for size in shape)
        and isinstance(layout.tied, list)
        and isinstance(layout.dense, list)
        and isinstance(layout.dense_config, dict)
        and bool(layout.experts)
        and all(_fits(tensor, layout) for tensor in layout.experts)
    )


def _fits(tensor: ExpertTensor, layout: Layout) -> bool:
    """Whether a tensor is the dense model's, and its copy is where it is said to be in the stack."""
    stack, rows = layout.moe[tensor.stacked], tensor.rows
    return (
        tensor.dense in layout.dense
        and type(tensor.layer) is int
        and type(tensor.transposed) is bool
        and type(rows.start) is int
        and type(rows.stop) is int
        and 0 <= rows.start < rows.stop <= stack[1]
        and tensor.stored_shape == (rows.stop - rows.start, *stack[2:])
        and layout.moe.get(tensor.shared, tensor.shape) == tensor.shape
    )


def _expert_tensor(rows: list[int], shape: list[int], **values: Any) -> ExpertTensor:
    return ExpertTensor(rows=slice(*rows), shape=tuple(shape), **values)


def _key(folder: Path) -> str:
    """Changes with everything that a layout follows from."""
    versions = f"{FORMAT} {package_version()} {metadata.version('transformers')}\n"
    return hashlib.sha256(versions.encode() + (folder / "config.json").read_bytes()).hexdigest()

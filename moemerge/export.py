"""Stage export: each expert of a MoE as an ordinary dense reward model, and the merge as plain mergekit YAML.

Letters: N routed experts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm

from moemerge import runtime
from moemerge.artifacts import Draft, stage
from moemerge.checkpoint import copy_side_files, link_checkpoint, write_checkpoint
from moemerge.coefficients.base import Coefficients
from moemerge.families.dense import dense_config
from moemerge.model_guards import finite
from moemerge.moe_checkpoint import MoeCheckpoint
from moemerge.recipe import Export

LINEAR = "linear.yml"
COMMENT = """# The routing-normalised average of these experts, for stock mergekit (moemerge is not needed):
#   mergekit-yaml {file} merged
# MLP tensors are weighted layer by layer; all the rest is the same in every model and comes from the first.
"""


@stage("export", Export)
def export(options: Export, draft: Draft) -> None:
    """Write shared/ (if there is one), expert-0/ ... expert-{N-1}/, and linear.yml if coefficients are given.

    Each folder is a checkpoint of the dense architecture: config, tokenizer and, in shards with an index, the
    expert's MLPs and everything else. The latter is stored once and hard-linked, or copied where that cannot
    be; so rewrite such a file as a new one, not in place. Weights keep the MoE's dtype. Raises
    CheckpointError for what is no whole MoE and for coefficients of another model.
    """
    runtime.use(options)
    source = MoeCheckpoint(options.model)
    found = Coefficients.load(options.coefficients) if options.coefficients else None
    if found is not None:
        source.check_fit(found)
    names = expert_names(source)
    parts = draft.folder / ".parts"
    _write_part(parts / "backbone", _backbone(source), options.shard_size)
    for name, index in tqdm(names.items(), desc="export", leave=False, disable=None):
        _write_part(parts / name, _mlps(source, index), options.shard_size)
        _write_model(draft.folder / name, source, [parts / "backbone", parts / name])
    shutil.rmtree(parts)
    if found is not None:
        config = linear_config(source, found, options.output.absolute())
        text = yaml.safe_dump(config, default_flow_style=None, sort_keys=False, width=200)
        head = COMMENT.format(file=options.output / LINEAR)
        (draft.folder / LINEAR).write_text(head + text, encoding="utf-8")
    draft.results |= {"models": list(names), "mlp_tensors": len(source.tensors)}


def expert_names(source: MoeCheckpoint) -> dict[str, int | None]:
    """Folder names of the experts, the shared one (None) first, then routed expert 0 ... N-1."""
    shared: dict[str, int | None] = {"shared": None} if source.settings.shared_expert else {}
    return {**shared, **{f"expert-{i}": i for i in range(source.settings.num_routed_experts)}}


def linear_config(source: MoeCheckpoint, coefficients: Coefficients, folder: Path) -> dict[str, Any]:
    """A mergekit configuration, method linear, of the models that were exported to `folder`.

    In MLP tensors each model has its coefficient, by layer; elsewhere the first model has 1, the others 0.
    """
    names = expert_names(source)
    rows = zip(
        coefficients.layers, coefficients.shared_L.tolist(), coefficients.alpha_LN.tolist(), strict=True
    )
    weights = {
        layer: [shared] * source.settings.shared_expert + [(1 - shared) * a for a in alpha_N]
        for layer, shared, alpha_N in rows
    }
    filters = {layer: _filters(source, layer) for layer in weights}
    models = []
    for place, name in enumerate(names):
        by_layer = [{"filter": f, "value": weights[n][place]} for n in weights for f in filters[n]]
        weight = [*by_layer, {"value": 0.0 if place else 1.0}]
        models.append({"model": _reference(folder / name), "parameters": {"weight": weight}})
    kept = source.settings.dense_dtype
    cast = {} if getattr(torch, kept) == source.dtype else {"out_dtype": kept}
    base = {"merge_method": "linear", "base_model": _reference(folder / next(iter(names)))}
    return {**base, **cast, "parameters": {"normalize": False}, "models": models}


def _filters(source: MoeCheckpoint, layer: int) -> list[str]:
    """Texts that the names of this layer's MLP tensors contain, and no other name: mergekit's filters."""
    own = {tensor.dense for tensor in source.tensors if tensor.layer == layer}
    names = [*source.backbone, *(tensor.dense for tensor in source.tensors)]
    prefix = os.path.commonprefix(sorted(own)).rpartition(".")[0] + "."
    return [prefix] if {name for name in names if prefix in name} == own else sorted(own)


def _reference(folder: Path) -> str | dict[str, Any]:
    """A model in mergekit's syntax, in which @ and + within a plain path have a meaning."""
    path = str(folder)
    return {"model": {"path": path}} if set("@+") & set(path) else path


def _backbone(source: MoeCheckpoint) -> Iterator[tuple[str, Tensor]]:
    return ((name, finite(source.weights.tensor(name), name)) for name in source.backbone)


def _mlps(source: MoeCheckpoint, index: int | None) -> Iterator[tuple[str, Tensor]]:
    for tensor in source.tensors:
        copy = source.weights.tensor(tensor.shared) if index is None else source.weights.expert(tensor, index)
        yield tensor.dense, finite(copy, f"an expert's {tensor.dense}")


def _write_part(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_size: int) -> None:
    folder.mkdir(parents=True)
    write_checkpoint(folder, tensors, shard_size)


def _write_model(folder: Path, source: MoeCheckpoint, parts: list[Path]) -> None:
    folder.mkdir()
    link_checkpoint(folder, parts)
    config = dense_config(source.config)
    config.dtype = source.dtype
    config.save_pretrained(folder)
    copy_side_files(source.folder, folder)

"""Stage export: each expert of a MoE, or each model of a list, as an ordinary dense reward model, and the
merge as plain mergekit YAML; or a whole MoE as stock Qwen2-MoE.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from tqdm.auto import tqdm

from moemerge.artifacts.origin import with_base
from moemerge.artifacts.progress import hidden
from moemerge.artifacts.stage import Draft, stage
from moemerge.errors import CheckpointError
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.sources.base import MergeSource
from moemerge.merging.sources.open import open_source
from moemerge.models.checkpoint import link_checkpoint, write_checkpoint
from moemerge.models.device import use_device
from moemerge.models.finite import finite
from moemerge.models.folder import ModelFolder
from moemerge.models.portable import make_portable
from moemerge.options.export import Export

LINEAR = "linear.yml"
COMMENT = """# Written by moemerge export. Stock mergekit merges it, started in this folder:
#   mergekit-yaml linear.yml OUTPUT
# What is merged is weighted block by block; all the rest comes from the first model.
"""


@stage("export", Export, complete=with_base)
def export(options: Export, draft: Draft) -> None:
    """Write the members as dense checkpoints, and linear.yml if coefficients are given.

    Of a MoE: shared/ (if there is one), expert-0/ ... expert-{N-1}/. What they have in common is stored once
    and hard-linked, or copied where that cannot be; so rewrite such a file as a new one, not in place. Of a
    list of models: those that are not the reward models which take part in the merge (a language model, or a
    model whose vocabulary is not the common one), as base/, model-0/ ...; linear.yml names the others where
    they are. Weights keep their dtype. With `form` qwen2_moe there is one checkpoint instead, the whole MoE
    for stock transformers (see qwen2_moe); with linear a dense model under a stock head (see linear_head).
    Raises CheckpointError for what is not whole and for coefficients of another source, UnsupportedError for
    a model that the form cannot express.
    """
    use_device(options)
    if options.form == "qwen2_moe":
        from moemerge.merging.qwen2_moe import write_native  # imports transformers

        write_native(options, draft)
    elif options.form == "linear":
        from moemerge.fitting.linear_head import write_linear  # likewise

        write_linear(options, draft)
    else:
        _write_experts(options, draft)


def _write_experts(options: Export, draft: Draft) -> None:
    coefficients = Coefficients.load(options.coefficients) if options.coefficients else None
    source = open_source(options, coefficients)
    if coefficients is not None:
        source.check_fit(coefficients)
        ModelFolder(source.folder).require_stock_head("stock mergekit would lose or misread its head")
    to_write = [member for member, folder in enumerate(source.references()) if folder is None]
    draft.reserve(source.size(source.dtype, copies=len(to_write)) if to_write else 0)
    _write_members(draft.folder, source, to_write, options.shard_size)
    if coefficients is not None:
        home = options.output.absolute()
        config = linear_config(source, coefficients, home)
        text = yaml.safe_dump(config, default_flow_style=None, sort_keys=False, width=200)
        (draft.folder / LINEAR).write_text(COMMENT + text, encoding="utf-8")
    names = [source.member_names[member] for member in to_write]
    draft.results |= {"models": names, "merged_tensors": len(source.tensors)}


def linear_config(source: MergeSource, coefficients: Coefficients, folder: Path) -> dict[str, Any]:
    """A mergekit configuration, method linear, of the members, `folder` being where export writes it.

    In merged tensors each model has its coefficient, by block; elsewhere the first model has 1, the others 0.
    """
    names = source.member_names
    folders = [
        _seen_from(folder, known or folder / name)
        for known, name in zip(source.references(), names, strict=True)
    ]
    filters = _filters(source, coefficients)
    models = []
    for member, member_folder in enumerate(folders):
        by_block = [
            {"filter": text, "value": coefficients.weights(row, source.has_shared)[member]}
            for text, row in filters.items()
        ]
        # Without a filter: all that no filter above has caught.
        weight = [*by_block, {"value": 0.0 if member else 1.0}]
        models.append({"model": _reference(member_folder), "parameters": {"weight": weight}})
    kept = source.dense_dtype
    cast = {} if kept == source.dtype else {"out_dtype": str(kept).removeprefix("torch.")}
    base = {"merge_method": "linear", "base_model": _reference(folders[0])}
    return {**base, **cast, "parameters": {"normalize": False}, "models": models}


def _filters(source: MergeSource, coefficients: Coefficients) -> dict[str, int]:
    """mergekit's filters, in order, with the row of coefficients of the tensors whose names contain them.

    The first filter that a name contains counts, so whole names stand last, long ones first.
    """
    rows = source.rows(coefficients.blocks)
    names = [*source.backbone, *rows]
    short: dict[str, int] = {}
    whole: dict[str, int] = {}
    for row in range(len(coefficients.blocks)):
        own = {name for name in rows if rows[name] == row}
        # What all names of the row begin with, up to a dot: their filter, if no other tensor's name contains
        # it.
        prefix = os.path.commonprefix(sorted(own)).rpartition(".")[0] + "."
        alone = {name for name in names if prefix in name} == own
        (short if alone else whole).update({prefix: row} if alone else dict.fromkeys(own, row))
    filters = short | {name: whole[name] for name in sorted(whole, key=len, reverse=True)}
    _check_filters(filters, rows, names)
    return filters


def _check_filters(filters: dict[str, int], rows: dict[str, int], names: list[str]) -> None:
    for name in names:
        row = next((row for text, row in filters.items() if text in name), None)
        if row != rows.get(name):
            raise CheckpointError(
                "the merge cannot be said in mergekit's filters",
                given=f"{name} is caught by the filter of another block",
                expected="names of which no whole one is a part of another",
                fix="merge with moemerge merge",
            )


def _seen_from(folder: Path, model: Path) -> str:
    """The path of a model for a mergekit that is started in `folder`.

    That of a model in it or beside it is relative, so that they can be moved together.
    """
    model = model.absolute()
    if not model.is_relative_to(folder.parent):
        return str(model)
    path = os.path.relpath(model, folder)
    return path if path.startswith("..") else f"./{path}"  # a bare name could be one on the hub


def _reference(path: str) -> str | dict[str, Any]:
    """A model in mergekit's syntax, in which @ and + within a plain path have a meaning."""
    return {"model": {"path": path}} if set("@+") & set(path) else path


def _write_members(folder: Path, source: MergeSource, members: list[int], shard_size: int) -> None:
    """Each of `members` as a checkpoint: the backbone's files are common to all."""
    parts = folder / ".parts"
    if members:
        _write_part(parts / "backbone", ((n, finite(source.kept(n), n)) for n in source.backbone), shard_size)
    for member in tqdm(members, desc="export", leave=False, disable=hidden()):
        name = source.member_names[member]
        _write_part(parts / name, _tensors_of(source, member), shard_size)
        _write_model(folder / name, source, [parts / "backbone", parts / name])
    if members:
        shutil.rmtree(parts)


def _tensors_of(source: MergeSource, member: int) -> Iterator[tuple[str, Tensor]]:
    whose = f"of {source.found_in(member)}"
    return ((t.dense, finite(source.matrix(t, member), f"{t.dense} {whose}")) for t in source.tensors)


def _write_part(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_size: int) -> None:
    folder.mkdir(parents=True)
    write_checkpoint(folder, tensors, shard_size)


def _write_model(folder: Path, source: MergeSource, parts: list[Path]) -> None:
    folder.mkdir()
    link_checkpoint(folder, parts)
    source.write_config(folder, source.dtype)
    source.write_side_files(folder)
    make_portable(folder)

"""Stage changes: how far several models' changes from their common base agree."""

from __future__ import annotations

from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.stage import Draft, stage
from moemerge.merging.changes import measure_changes, numbers_of, tables_of
from moemerge.merging.sources.models import ModelList
from moemerge.options.changes import ChangesOptions
from moemerge.reports import plotting

PICTURE = "cosine.png"


@stage("changes", ChangesOptions)
def changes(options: ChangesOptions, draft: Draft) -> None:
    """Write sizes, cosines and sign conflicts of the models' changes: changes.json, changes.md, cosine.png.

    One tensor of each model is in memory at a time. Raises UnsupportedError for models that do not go
    together, CheckpointError for one that is not whole. Source: TIES (arXiv 2306.01708).
    """
    source = ModelList(list(options.models.values()), options.base, coordinates="sum")
    measured = measure_changes(source)
    names = list(options.models)
    numbers = numbers_of(measured, names)
    write_json(draft.folder / "changes.json", numbers)
    plotting.heat_map(
        measured.cosine_GNN[0], draft.folder / PICTURE, "Cosine of changes", "model", "model", names, names
    )
    tables = [table.markdown() for table in tables_of(numbers)]
    (draft.folder / "changes.md").write_text(
        "\n".join(["# Changes from the base\n", *tables]), encoding="utf-8"
    )
    draft.results |= numbers["groups"]["all"]

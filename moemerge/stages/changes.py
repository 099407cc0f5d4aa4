"""Stage changes: how far several models' changes from their common base agree."""

from __future__ import annotations

from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.stage import Draft, stage
from moemerge.data.draw import first
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import encode_pairs
from moemerge.merging.changes import by_pair, measure_changes, numbers_of, tables_of
from moemerge.merging.experts.diversity import barriers
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.models import ModelList
from moemerge.models.device import use_device
from moemerge.options.changes import ChangesOptions
from moemerge.reports import plotting

PICTURE = "cosine.png"


@stage("changes", ChangesOptions)
def changes(options: ChangesOptions, draft: Draft) -> None:
    """Write sizes, cosines and sign conflicts of the models' changes: changes.json, changes.md, cosine.png.

    With `pairs` also the loss barriers between models, on the straight line from one to another: for M models
    3/2 M (M - 1) + M passes of one of them over the pairs, and all are in memory; without, one tensor of each
    is at a time. Raises UnsupportedError for models that do not go together, CheckpointError for one that is
    not whole, DataError for unusable pairs. Source: TIES (arXiv 2306.01708); barriers: linear mode
    connectivity (arXiv 1912.05671).
    """
    source = ModelList(list(options.models.values()), options.base, coordinates="sum")
    measured = measure_changes(source)
    names = list(options.models)
    numbers = numbers_of(measured, names)
    if options.pairs is not None:
        numbers["barriers"] = _barriers(options, options.pairs)
    write_json(draft.folder / "changes.json", numbers)
    plotting.heat_map(
        measured.cosine_GNN[0], draft.folder / PICTURE, "Cosine of changes", "model", "model", names, names
    )
    tables = [table.markdown() for table in tables_of(numbers)]
    (draft.folder / "changes.md").write_text(
        "\n".join(["# Changes from the base\n", *tables]), encoding="utf-8"
    )
    draft.results |= numbers["groups"]["all"]


def _barriers(options: ChangesOptions, pairs: str) -> dict[str, float]:
    """The loss barrier between each pair of models, in nats."""
    device = use_device(options)
    source = ModelList(list(options.models.values()))
    merged = MergedModel.at_average(source, device)
    tokenizer = source.tokenizer()
    read, report = read_pairs(pairs, options)
    encoded = encode_pairs(tokenizer, first(read, options.max_pairs, report), options, report)
    return by_pair(barriers(merged, tokenizer, encoded, options.batch_tokens), list(options.models))

"""What an evaluation scores: rows of each set as texts for every model; and what probes get of the scores."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moemerge.data import reading as data
from moemerge.data.draw import draw
from moemerge.data.pairs import CandidateSet, Pair, numbered, prompt_key, value_of
from moemerge.data.rewardbench import Choice, encode_choices, is_choice, read_choices
from moemerge.data.rmbench import is_styled, read_styles
from moemerge.data.rows import RowReport, RowSummary, Text, read_rows
from moemerge.data.tokenise import Encoded, Reader, encode_candidates, encode_pairs
from moemerge.errors import OptionError
from moemerge.evaluation.probes.base import (
    CandidateScores,
    ChoiceScores,
    Edited,
    EditScores,
    PairScores,
    Probe,
)
from moemerge.evaluation.probes.edits import encode_edits, make_edits, some_pairs
from moemerge.options.evaluate import Evaluate
from moemerge.reports.statistics import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
OF_FILES = ("pairs", "candidates", "rewardbench", "rmbench")  # the kinds that are read, not made


@dataclass(frozen=True)
class EvaluationSet:
    """One test set, candidate set or benchmark, or one edit of a test set.

    kind: a key of KINDS. items: the rows that every model's tokenizer takes. texts: per model, the tokens of
    the items' texts, one item after the other. report: what became of all rows.
    """

    kind: str
    name: str
    items: Sequence[Any]
    texts: dict[str, list[Encoded]]
    report: RowSummary


def by_kind(options: Evaluate) -> Evaluate:
    """The options with each set of `data` put among the kinds of sets by its columns.

    Raises OptionError if that kind has another set of its name, DataError for a source that cannot be read.
    """
    sorted_sets = {kind: dict(getattr(options, kind)) for kind in OF_FILES}
    for name, source in options.data.items():
        kind = _kind_of(source, options)
        if name in sorted_sets[kind]:
            raise OptionError(
                f"two sets of {kind} have one name",
                given=f"{name}={sorted_sets[kind][name]} and {name}={source}",
                expected="a name for each set",
                fix=f"give another name, as in data {name}-2={source}",
            )
        log.info("%s is read as %s", source, kind)
        sorted_sets[kind][name] = source
    return options.model_copy(update=sorted_sets)


def _kind_of(source: str, options: Evaluate) -> str:
    rows = (row for _, row in read_rows(source) if isinstance(row, dict))
    first = next(rows, {})
    if value_of(first, "candidates", options) is not None:
        return "candidates"
    if is_styled(first):
        return "rmbench"
    return "rewardbench" if is_choice(first) else "pairs"


def read_sets(options: Evaluate, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> list[EvaluationSet]:
    """Every set that the options name. Raises DataError for unusable rows."""
    candidates = partial(data.read_candidates, scored=not options.has_gold)
    readers: list[Any] = [data.read_pairs, candidates, read_choices, read_styles]
    sets = []
    for kind, reader in zip(OF_FILES, readers, strict=True):
        for name, source in getattr(options, kind).items():
            items, report = reader(source, options)
            if kind == "pairs":
                items = _drawn(items, report, tokenizers, options)
            kept, texts = _encode(kind, items, report, tokenizers, options)
            sets.append(EvaluationSet(kind, name, kept, texts, report.told()))
    return sets


def _drawn(
    pairs: Sequence[Pair],
    report: RowReport,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    options: Evaluate,
) -> Sequence[Pair]:
    """As many pairs as are wanted, all of which every tokenizer can encode."""
    if options.max_pairs is None:
        return pairs

    def usable(some: Sequence[Pair]) -> Sequence[Pair]:
        return _encode("pairs", some, report, tokenizers, options)[0]

    return draw(pairs, options.max_pairs, options.seed, usable, report)


def edited_sets(
    options: Evaluate,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    probes: Mapping[str, Probe],
    sets: Sequence[EvaluationSet],
) -> list[EvaluationSet]:
    """The edited answers that the probes ask for, one set per test set, probe and edit."""
    made_sets = []
    for tested in sets:
        numbers = some_pairs(tested.items, options.bias_pairs, options.seed)
        for name, probe in probes.items():
            if tested.kind == "pairs" and probe.edits is not None:
                made = make_edits(tested.items, numbers, probe.edits, tested.name, options.seed)
                for edit, (items, report) in made.items():
                    kept, texts = _encode("edits", items, report, tokenizers, options)
                    key = f"{tested.name}/{name}/{edit}"
                    made_sets.append(EvaluationSet("edits", key, kept, texts, report.summary()))
    return made_sets


def probe_inputs(
    sets: Sequence[EvaluationSet], scores: Mapping[str, Sequence[Tensor]]
) -> dict[str, dict[str, Any]]:
    """What probes get, by kind and set; `scores` has per model a tensor for each set. Edits go with pairs."""
    inputs: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for number, scored in enumerate(sets):
        values = {model: of_sets[number].double().numpy() for model, of_sets in scores.items()}
        gathered = KINDS[scored.kind].scores(scored, values)
        if scored.kind == "edits":
            owner, probe, edit = scored.name.rsplit("/", 2)
            inputs["pairs"][owner] = inputs["pairs"][owner].with_edit(f"{probe}/{edit}", gathered)
        else:
            inputs[scored.kind][scored.name] = gathered
    return inputs


def score_tensors(sets: Sequence[EvaluationSet], scores: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """What scores.safetensors holds: KIND/SET/rows, source rows by text, and KIND/SET/model/MODEL, scores."""
    tensors = {}
    for number, scored in enumerate(sets):
        name = f"{scored.kind}/{scored.name}"
        rows = [item.row for item in scored.items for _ in range(KINDS[scored.kind].count(item))]
        tensors[f"{name}/rows"] = torch.tensor(rows, dtype=torch.long)
        for model, of_sets in scores.items():
            tensors[f"{name}/model/{model}"] = of_sets[number]
        if scored.kind == "candidates":
            tensors[f"{name}/gold"] = torch.tensor([score for item in scored.items for score in item.gold])
    return tensors


def _encode(
    kind: str,
    items: Sequence[Any],
    report: RowReport,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    options: Evaluate,
) -> tuple[Sequence[Any], dict[str, list[Encoded]]]:
    """The items that every tokenizer can encode, and their texts by model; equal tokenizers work once."""
    done: dict[str, dict[int, list[Encoded]]] = {}
    keys = {model: _identity(tokenizer) for model, tokenizer in tokenizers.items()}
    for model, key in keys.items():
        if key not in done:
            # Each tokenizer gets what those before it could encode, so the last list is what all can.
            encoded = KINDS[kind].encode(tokenizers[model], items, options, report)
            items = [item for item, _ in encoded]
            done[key] = {item.row: texts for item, texts in encoded}
    texts = {model: [text for item in items for text in done[key][item.row]] for model, key in keys.items()}
    return items, texts


def _identity(tokenizer: Any) -> str:
    """Equal for tokenizers that encode alike; a slow tokenizer only equals itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = str(id(tokenizer)) if backend is None else backend.to_str()
    wording = tokenizer.wording if isinstance(tokenizer, Reader) else ""
    return json.dumps([core, str(tokenizer.chat_template), str(tokenizer.eos_token), wording])


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


class _Kind(Protocol):
    """What sets of a kind are to the stage: items that become texts, and texts that become a probe's input.

    Each item has its texts' scores one after the other; a set has its items so.
    """

    def encode(
        self, tokenizer: Any, items: Sequence[Any], options: Evaluate, report: RowReport
    ) -> list[tuple[Any, list[Encoded]]]:
        """The items that can be encoded, each with its texts; the others go into `report`."""

    def count(self, item: Any) -> int:
        """How many texts an item has."""

    def scores(self, scored: EvaluationSet, values: dict[str, Floats]) -> Any:
        """What probes get of a set and its texts' scores by model."""


class _Pairs:
    def encode(
        self, tokenizer: Any, items: Sequence[Pair], options: Evaluate, report: RowReport
    ) -> list[tuple[Pair, list[Encoded]]]:
        encoded = encode_pairs(tokenizer, items, options, report)
        return [(pair.pair, [pair.chosen, pair.rejected]) for pair in encoded]

    def count(self, item: Pair) -> int:
        return 2

    def scores(self, scored: EvaluationSet, values: dict[str, Floats]) -> PairScores:
        pairs: Sequence[Pair] = scored.items
        lengths = [[_characters(pair.chosen), _characters(pair.rejected)] for pair in pairs]
        return PairScores(
            scores={model: scores_T.reshape(-1, 2) for model, scores_T in values.items()},
            subsets=np.array([pair.subset for pair in pairs], dtype=np.str_),
            prompts=np.array(numbered(map(prompt_key, pairs))),
            lengths=np.array(lengths),
        )


class _Candidates:
    def encode(
        self, tokenizer: Any, items: Sequence[CandidateSet], options: Evaluate, report: RowReport
    ) -> list[tuple[CandidateSet, list[Encoded]]]:
        encoded = encode_candidates(tokenizer, items, options, report)
        return [(item.candidates, list(item.answers)) for item in encoded]

    def count(self, item: CandidateSet) -> int:
        return len(item.texts)

    def scores(self, scored: EvaluationSet, values: dict[str, Floats]) -> CandidateScores:
        sets: Sequence[CandidateSet] = scored.items
        return CandidateScores(
            scores=values,
            gold=np.array([score for item in sets for score in item.gold], dtype=np.float64),
            lengths=np.array([_characters(text) for item in sets for text in item.texts]),
            sizes=np.array([len(item.texts) for item in sets]),
        )


class _Benchmark:
    def encode(
        self, tokenizer: Any, items: Sequence[Choice], options: Evaluate, report: RowReport
    ) -> list[tuple[Choice, list[Encoded]]]:
        encoded = encode_choices(tokenizer, items, options, report)
        return [(item.choice, list(item.answers)) for item in encoded]

    def count(self, item: Choice) -> int:
        return len(item.texts)

    def scores(self, scored: EvaluationSet, values: dict[str, Floats]) -> ChoiceScores:
        choices: Sequence[Choice] = scored.items
        return ChoiceScores(
            version=choices[0].version,
            scores=values,
            lengths=np.array([len(text) for choice in choices for text in choice.texts]),
            sizes=np.array([len(choice.texts) for choice in choices]),
            num_correct=np.array([choice.num_correct for choice in choices]),
            subsets=np.array([choice.subset for choice in choices], dtype=np.str_),
            ids=np.array([choice.id for choice in choices], dtype=np.str_),
            prompts=np.array(numbered(json.dumps(choice.turns) for choice in choices)),
        )


class _Edits:
    def encode(
        self, tokenizer: Any, items: Sequence[Edited], options: Evaluate, report: RowReport
    ) -> list[tuple[Edited, list[Encoded]]]:
        encoded = encode_edits(tokenizer, items, options, report)
        return [(item.edited, [item.answer]) for item in encoded]

    def count(self, item: Edited) -> int:
        return 1

    def scores(self, scored: EvaluationSet, values: dict[str, Floats]) -> EditScores:
        left_out = {why: bad["count"] for why, bad in scored.report["bad"].items()}
        return EditScores(list(scored.items), values, left_out)


KINDS: dict[str, _Kind] = {
    "pairs": _Pairs(),
    "candidates": _Candidates(),
    "rewardbench": _Benchmark(),
    "rmbench": _Benchmark(),
    "edits": _Edits(),
}

"""What an evaluation scores: rows of each set as texts for every model; and what probes get of the scores."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moemerge.data import reading as data
from moemerge.data.pairs import CandidateSet, Pair, numbered, prompt_key, value_of
from moemerge.data.rewardbench import Choice, encode_choices, is_choice, read_choices
from moemerge.data.rows import RowReport, RowSummary, Text, read_rows
from moemerge.data.tokenise import Encoded, encode_candidates, encode_pairs
from moemerge.errors import OptionError
from moemerge.evaluation.probes.base import CandidateScores, ChoiceScores, EditScores, PairScores, Probe
from moemerge.evaluation.probes.edits import encode_edits, make_edits, some_pairs
from moemerge.options.evaluate import Evaluate

log = logging.getLogger(__name__)


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
    """The options with each set of `data` among pairs, candidates or rewardbench, as its columns tell.

    Raises OptionError if that kind has another set of its name, DataError for a source that cannot be read.
    """
    sorted_sets = {kind: dict(getattr(options, kind)) for kind in ("pairs", "candidates", "rewardbench")}
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
    return "rewardbench" if is_choice(first) else "pairs"


def read_sets(options: Evaluate, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> list[EvaluationSet]:
    """Every set that the options name. Raises DataError for unusable rows."""
    candidates = partial(data.read_candidates, scored=not options.has_gold)
    read: dict[str, Any] = {"pairs": data.read_pairs, "candidates": candidates, "rewardbench": read_choices}
    found = []
    for kind, reader in read.items():
        for name, source in getattr(options, kind).items():
            items, report = reader(source, options)
            kept, texts = _encode(kind, items, report, tokenizers, options)
            log.info("%s %s: %d of %d rows usable by every model", kind, name, len(kept), report.total)
            found.append(EvaluationSet(kind, name, kept, texts, report.summary()))
    return found


def edited_sets(
    options: Evaluate,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    probes: Mapping[str, Probe],
    sets: Sequence[EvaluationSet],
) -> list[EvaluationSet]:
    """The edited answers that the probes ask for, one set per test set, probe and edit."""
    found = []
    for one in sets:
        places = some_pairs(one.items, options.bias_pairs, options.seed)
        for name, probe in probes.items():
            if one.kind == "pairs" and probe.edits is not None:
                made = make_edits(one.items, places, probe.edits, one.name, options.seed)
                for edit, (items, report) in made.items():
                    kept, texts = _encode("edits", items, report, tokenizers, options)
                    place = f"{one.name}/{name}/{edit}"
                    found.append(EvaluationSet("edits", place, kept, texts, report.summary()))
    return found


def probe_inputs(
    sets: Sequence[EvaluationSet], scores: Mapping[str, Sequence[Tensor]]
) -> dict[str, dict[str, Any]]:
    """What probes get, by kind and set; `scores` has per model a tensor for each set. Edits go with pairs."""
    inputs: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for place, one in enumerate(sets):
        values = {model: found[place].double().numpy() for model, found in scores.items()}
        if one.kind == "edits":
            owner, probe, edit = one.name.rsplit("/", 2)
            edited = inputs["pairs"][owner].with_edit(f"{probe}/{edit}", _edit_scores(one, values))
            inputs["pairs"][owner] = edited
        else:
            inputs[one.kind][one.name] = KINDS[one.kind].gather(one, values)
    return inputs


def score_tensors(sets: Sequence[EvaluationSet], scores: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """What scores.safetensors holds: KIND/SET/rows, source rows by text, and KIND/SET/model/MODEL, scores."""
    found = {}
    for place, one in enumerate(sets):
        rows = [item.row for item in one.items for _ in range(KINDS[one.kind].count(item))]
        found[f"{one.kind}/{one.name}/rows"] = torch.tensor(rows, dtype=torch.long)
        for model, values in scores.items():
            found[f"{one.kind}/{one.name}/model/{model}"] = values[place]
        if one.kind == "candidates":
            found[f"{one.kind}/{one.name}/gold"] = torch.tensor([g for item in one.items for g in item.gold])
    return found


def _encode(
    kind: str,
    items: Sequence[Any],
    report: RowReport,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    options: Evaluate,
) -> tuple[Sequence[Any], dict[str, list[Encoded]]]:
    """The items that every tokenizer can encode, and their texts by model; equal tokenizers work once."""
    what = KINDS[kind]
    done: dict[str, dict[int, list[Encoded]]] = {}
    keys = {model: _identity(tokenizer) for model, tokenizer in tokenizers.items()}
    for model, key in keys.items():
        if key not in done:
            encoded = what.encode(tokenizers[model], items, options, report)
            items = [what.item(one) for one in encoded]
            done[key] = {item.row: what.texts(one) for item, one in zip(items, encoded, strict=True)}
    texts = {model: [text for item in items for text in done[key][item.row]] for model, key in keys.items()}
    return items, texts


def _identity(tokenizer: Any) -> str:
    """Equal for tokenizers that encode alike; a slow tokenizer only equals itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = str(id(tokenizer)) if backend is None else backend.to_str()
    return json.dumps([core, str(tokenizer.chat_template), str(tokenizer.eos_token)])


def _pair_scores(one: EvaluationSet, values: Mapping[str, Any]) -> PairScores:
    pairs: Sequence[Pair] = one.items
    lengths = [[_characters(pair.chosen), _characters(pair.rejected)] for pair in pairs]
    return PairScores(
        scores={model: found.reshape(-1, 2) for model, found in values.items()},
        subsets=np.array([pair.subset for pair in pairs], dtype=np.str_),
        prompts=np.array(numbered(map(prompt_key, pairs))),
        lengths=np.array(lengths),
    )


def _edit_scores(one: EvaluationSet, values: Mapping[str, Any]) -> EditScores:
    left_out = {why: bad["count"] for why, bad in one.report["bad"].items()}
    return EditScores(list(one.items), dict(values), left_out)


def _candidate_scores(one: EvaluationSet, values: Mapping[str, Any]) -> CandidateScores:
    sets: Sequence[CandidateSet] = one.items
    return CandidateScores(
        scores=dict(values),
        gold=np.array([score for one in sets for score in one.gold], dtype=np.float64),
        lengths=np.array([_characters(text) for one in sets for text in one.texts]),
        sizes=np.array([len(one.texts) for one in sets]),
    )


def _choice_scores(one: EvaluationSet, values: Mapping[str, Any]) -> ChoiceScores:
    choices: Sequence[Choice] = one.items
    return ChoiceScores(
        version=choices[0].version,
        scores=dict(values),
        lengths=np.array([len(text) for one in choices for text in one.texts]),
        sizes=np.array([len(one.texts) for one in choices]),
        num_correct=np.array([one.num_correct for one in choices]),
        subsets=np.array([one.subset for one in choices], dtype=np.str_),
        ids=np.array([one.id for one in choices], dtype=np.str_),
        prompts=np.array(numbered(json.dumps(one.turns) for one in choices)),
    )


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


@dataclass(frozen=True)
class _Kind:
    """How sets of a kind become tokens: encode(tokenizer, items, options, report) gives what can be encoded,
    of which `item` and `texts` are taken; `count` texts belong to an item; `gather` makes a probe's input."""

    encode: Callable[..., Sequence[Any]]
    item: Callable[[Any], Any]
    texts: Callable[[Any], list[Encoded]]
    count: Callable[[Any], int]
    gather: Callable[[EvaluationSet, Mapping[str, Any]], Any]


KINDS = {
    "pairs": _Kind(
        encode_pairs, lambda e: e.pair, lambda e: [e.chosen, e.rejected], lambda _: 2, _pair_scores
    ),
    "candidates": _Kind(
        encode_candidates,
        lambda e: e.candidates,
        lambda e: e.answers,
        lambda item: len(item.texts),
        _candidate_scores,
    ),
    "rewardbench": _Kind(
        encode_choices, lambda e: e.choice, lambda e: e.answers, lambda item: len(item.texts), _choice_scores
    ),
    "edits": _Kind(encode_edits, lambda e: e.edited, lambda e: [e.answer], lambda _: 1, _edit_scores),
}

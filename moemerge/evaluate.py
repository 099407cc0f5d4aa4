"""Stage `evaluate`: several reward models measured on the same data, side by side."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge import data, runtime
from moemerge.artifacts import Draft, stage, write_json
from moemerge.cost import cost
from moemerge.ensembles import check_ensembles, ensemble_facts, ensemble_scores
from moemerge.environment import hardware, versions
from moemerge.errors import OptionError, suggest
from moemerge.evaluation_page import evaluation_sections
from moemerge.html_report import write_report
from moemerge.probes import PROBES, expand
from moemerge.probes.base import CandidateScores, EditScores, PairScores, Probe
from moemerge.probes.edits import EncodedEdit, encode_edits, make_edits, some_pairs
from moemerge.provenance_page import provenance_section
from moemerge.recipe import Evaluate
from moemerge.scoring import load_reward_model, load_tokenizer, score

log = logging.getLogger(__name__)


@stage("evaluate", Evaluate)
def evaluate(options: Evaluate, draft: Draft) -> None:
    """Score every model on every set, once, and run the probes on the scores.

    One model is in memory at a time. A row that is too long for one model's tokenizer is left out for all,
    so that comparisons stay paired. Writes scores.safetensors, report.json, report.html, report.md and plots.
    Raises OptionError if nothing can be measured or the baseline is no model, DataError for unusable rows.
    """
    check_ensembles(options)
    probes = _probes(options)
    device = runtime.use(options)
    tokenizers = {
        name: load_tokenizer(path, options.trust_remote_code) for name, path in options.models.items()
    }
    sets = _read_sets(options, tokenizers)
    sets += _edited_sets(options, tokenizers, probes, sets)
    scores, models = {}, {}
    for name, path in options.models.items():
        model = load_reward_model(path, device, trust_remote_code=options.trust_remote_code)
        models[name] = {"source": path, "class": type(model).__name__, **cost(model)}
        started = time.perf_counter()
        scores[name] = _score_sets(name, model, tokenizers[name], sets, options.batch_tokens)
        models[name]["seconds"] = time.perf_counter() - started
        models[name]["tokens"] = sum(len(text.ids) for one in sets for text in one.texts[name])
        del model
        _free_memory()
    scores |= ensemble_scores(options, scores)
    models |= ensemble_facts(options, models)
    results = _measure(probes, sets, scores, options)
    _write(draft, options, probes, results, models, sets)
    save_file(_tensors(sets, scores), draft.folder / "scores.safetensors")


@dataclass(frozen=True)
class _Set:
    """One test or candidate set, or one edit of a test set: its usable items, their tokens by model."""

    kind: str
    name: str
    items: Sequence[Any]
    texts: dict[str, list[data.Encoded]]
    report: dict[str, Any]


def _probes(options: Evaluate) -> dict[str, Probe]:
    """The probes asked for that have data; faults in the options are found here, before any work."""
    known = [*options.models, *options.combinations()]
    if options.baseline is not None and options.baseline not in known:
        raise OptionError(
            "the baseline is none of the models",
            given=options.baseline,
            expected=f"one of: {', '.join(known)}",
            fix=suggest(options.baseline, known),
        )
    asked = {name: PROBES.get(name) for name in expand(options.probes)}
    probes = {name: probe for name, probe in asked.items() if getattr(options, probe.needs)}
    for name in asked.keys() - probes.keys():
        log.warning("%s is left out: no %s are given", name, asked[name].needs)
    if not probes or not options.models:
        raise OptionError(
            "nothing to evaluate",
            given=f"{len(options.models)} models; probes {', '.join(asked) or 'none'} without data",
            expected="models, and pairs or candidates that a probe needs",
            fix="give models, pairs and candidates as name=path",
        )
    return probes


def _read_sets(options: Evaluate, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> list[_Set]:
    read: dict[str, Any] = {"pairs": data.read_pairs, "candidates": data.read_candidates}
    found = []
    for kind, reader in read.items():
        for name, source in getattr(options, kind).items():
            items, report = reader(source, options)
            kept, texts = _encode(kind, items, report, tokenizers, options)
            log.info("%s %s: %d of %d rows usable by every model", kind, name, len(kept), report.total)
            found.append(_Set(kind, name, kept, texts, report.summary()))
    return found


def _edited_sets(
    options: Evaluate,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    probes: Mapping[str, Probe],
    sets: Sequence[_Set],
) -> list[_Set]:
    """The edited answers that the probes ask for, one set per test set, probe and edit."""
    found = []
    for one in sets:
        places = some_pairs(one.items, options.bias_pairs, options.seed)
        for name, probe in probes.items():
            if one.kind == "pairs" and probe.edits is not None:
                made = make_edits(one.items, places, probe.edits, one.name, options.seed)
                for edit, (items, report) in made.items():
                    kept, texts = _encode("edits", items, report, tokenizers, options)
                    found.append(_Set("edits", f"{one.name}/{name}/{edit}", kept, texts, report.summary()))
    return found


def _encode(
    kind: str,
    items: Sequence[Any],
    report: data.RowReport,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    options: Evaluate,
) -> tuple[Sequence[Any], dict[str, list[data.Encoded]]]:
    """The items that every tokenizer can encode, and their texts by model; equal tokenizers work once."""
    encoders: dict[str, Any] = {
        "pairs": data.encode_pairs,
        "candidates": data.encode_candidates,
        "edits": encode_edits,
    }
    done: dict[str, dict[int, list[data.Encoded]]] = {}
    keys = {model: _identity(tokenizer) for model, tokenizer in tokenizers.items()}
    for model, key in keys.items():
        if key not in done:
            encoded = encoders[kind](tokenizers[model], items, options, report)
            items = [_item(one) for one in encoded]
            done[key] = {item.row: _texts(one) for item, one in zip(items, encoded, strict=True)}
    texts = {model: [text for item in items for text in done[key][item.row]] for model, key in keys.items()}
    return items, texts


def _identity(tokenizer: Any) -> str:
    """Equal for tokenizers that encode alike; a slow tokenizer only equals itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = str(id(tokenizer)) if backend is None else backend.to_str()
    return json.dumps([core, str(tokenizer.chat_template), str(tokenizer.eos_token)])


def _item(one: data.EncodedPair | data.EncodedCandidates | EncodedEdit) -> Any:
    if isinstance(one, data.EncodedPair):
        return one.pair
    return one.edited if isinstance(one, EncodedEdit) else one.candidates


def _texts(one: data.EncodedPair | data.EncodedCandidates | EncodedEdit) -> list[data.Encoded]:
    if isinstance(one, data.EncodedPair):
        return [one.chosen, one.rejected]
    return [one.answer] if isinstance(one, EncodedEdit) else one.answers


def _score_sets(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[_Set],
    batch_tokens: int,
) -> list[Tensor]:
    """Scores of each set's texts, one after the other."""
    found = []
    for one in sets:
        found.append(score(model, tokenizer, one.texts[name], batch_tokens, f"{name} on {one.name}"))
    return found


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure(
    probes: Mapping[str, Probe], sets: Sequence[_Set], scores: Mapping[str, list[Tensor]], options: Evaluate
) -> dict[str, dict[str, Any]]:
    inputs: dict[str, dict[str, Any]] = {"pairs": {}, "candidates": {}}
    for place, one in enumerate(sets):
        values = {model: found[place].double().numpy() for model, found in scores.items()}
        if one.kind == "edits":
            owner, probe, edit = one.name.rsplit("/", 2)
            pairs = inputs["pairs"][owner]
            inputs["pairs"][owner] = pairs.with_edit(f"{probe}/{edit}", _edit_scores(one, values))
        else:
            gather = _pair_scores if one.kind == "pairs" else _candidate_scores
            inputs[one.kind][one.name] = gather(one.items, values)
    return {name: probe.measure(inputs[probe.needs], options, options.seed) for name, probe in probes.items()}


def _pair_scores(pairs: Sequence[data.Pair], values: Mapping[str, Any]) -> PairScores:
    numbers: dict[str, int] = {}
    keys = [json.dumps(pair.prompt) if pair.prompt else f"row {pair.row}" for pair in pairs]
    prompts = [numbers.setdefault(key, len(numbers)) for key in keys]
    lengths = [[_characters(pair.chosen), _characters(pair.rejected)] for pair in pairs]
    return PairScores(
        scores={model: found.reshape(-1, 2) for model, found in values.items()},
        subsets=np.array([pair.subset for pair in pairs], dtype=np.str_),
        prompts=np.array(prompts),
        lengths=np.array(lengths),
    )


def _edit_scores(edit: _Set, values: Mapping[str, Any]) -> EditScores:
    left_out = {why: bad["count"] for why, bad in edit.report["bad"].items()}
    return EditScores(list(edit.items), dict(values), left_out)


def _candidate_scores(sets: Sequence[data.CandidateSet], values: Mapping[str, Any]) -> CandidateScores:
    return CandidateScores(
        scores=dict(values),
        gold=np.array([gold for one in sets for gold in one.gold], dtype=np.float64),
        lengths=np.array([_characters(text) for one in sets for text in one.texts]),
        sizes=np.array([len(one.texts) for one in sets]),
    )


def _characters(text: data.Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


def _tensors(sets: Sequence[_Set], scores: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """What scores.safetensors holds: KIND/SET/rows, source rows by text, and KIND/SET/model/MODEL, scores."""
    found = {}
    for place, one in enumerate(sets):
        rows = [item.row for item in one.items for _ in range(_texts_of(one.kind, item))]
        found[f"{one.kind}/{one.name}/rows"] = torch.tensor(rows, dtype=torch.long)
        for model, values in scores.items():
            found[f"{one.kind}/{one.name}/model/{model}"] = values[place]
        if one.kind == "candidates":
            found[f"{one.kind}/{one.name}/gold"] = torch.tensor([g for item in one.items for g in item.gold])
    return found


def _texts_of(kind: str, item: Any) -> int:
    return {"pairs": 2, "edits": 1}.get(kind) or len(item.texts)


def _write(
    draft: Draft,
    options: Evaluate,
    probes: Mapping[str, Probe],
    results: Mapping[str, dict[str, Any]],
    models: Mapping[str, dict[str, Any]],
    sets: Sequence[_Set],
) -> None:
    plots = {name: probe.plot(results[name], draft.folder) for name, probe in probes.items()}
    rows = {f"{one.kind}/{one.name}": one.report for one in sets}
    timeless = {name: {k: v for k, v in facts.items() if k != "seconds"} for name, facts in models.items()}
    report = {
        "models": timeless,  # evaluated again, the same models give the same report
        "baseline": options.baseline or next(iter(models)),
        "rows": rows,
        "probes": results,
        "plots": [plot for names in plots.values() for plot in names],
        "plots_by_probe": plots,
    }
    write_json(draft.folder / "report.json", report)
    made = {**draft.provenance, "versions": versions(), "hardware": hardware()}
    sections = [*evaluation_sections(report, draft.folder), provenance_section({"evaluate": made})]
    write_report(draft.folder, "Evaluation", sections)
    draft.results |= {"models": models, "rows": rows, "main": _main_numbers(results)}


def _main_numbers(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by set and model, gold score at the largest n by set and model."""
    found: dict[str, Any] = {}
    for name, measured in results.get("accuracy", {}).get("sets", {}).items():
        models = cast(dict[str, Any], measured["all"]["models"])
        found.setdefault("accuracy", {})[name] = {model: n["accuracy"] for model, n in models.items()}
    for name, measured in results.get("best_of_n", {}).get("sets", {}).items():
        last = {model: curve["gold"][-1] for model, curve in measured["models"].items()}
        found.setdefault("best_of_n_gold", {})[name] = {"n": measured["n"][-1], **last}
    return found

"""Stage `evaluate`: several reward models measured on the same data, side by side."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge import data, protocol, runtime
from moemerge.artifacts import Draft, stage, write_json
from moemerge.errors import OptionError, suggest
from moemerge.moe import moe_layers
from moemerge.probes import PROBES
from moemerge.probes.accuracy import check_sections
from moemerge.probes.base import CandidateScores, ChoiceScores, PairScores, Probe, Table
from moemerge.recipe import Evaluate, EvaluateSettings
from moemerge.rewardbench import Choice, EncodedChoice, encode_choices, read_choices
from moemerge.scoring import load_reward_model, load_tokenizer, score

log = logging.getLogger(__name__)
_Encoded = data.EncodedPair | data.EncodedCandidates | EncodedChoice


@stage("evaluate", Evaluate)
def evaluate(options: Evaluate, draft: Draft) -> None:
    """Score every model on every set, once, and run the probes on the scores.

    One model is in memory at a time. A row that is too long for one model's tokenizer is left out for all,
    so that comparisons stay paired. Writes scores.safetensors, report.json, report.md and plots.
    Raises OptionError if nothing can be measured or the baseline is no model, DataError for unusable rows.
    """
    probes = _probes(options)
    device = runtime.use(options)
    tokenizers = {
        name: load_tokenizer(path, options.trust_remote_code) for name, path in options.models.items()
    }
    sets = _read_sets(options, tokenizers)
    check_sections(options, {item.subset for one in sets if one.kind == "pairs" for item in one.items})
    scores, models = {}, {}
    for name, path in options.models.items():
        model = load_reward_model(path, device, trust_remote_code=options.trust_remote_code)
        models[name] = {"source": path, "class": type(model).__name__, **parameters(model)}
        scores[name] = _score_sets(name, model, tokenizers[name], sets, options.batch_tokens)
        del model
        _free_memory()
    results = _measure(probes, sets, scores, options)
    _write(draft, options, probes, results, models, sets, protocol.describe(options, tokenizers, sets))
    save_file(_tensors(sets, scores), draft.folder / "scores.safetensors")


@dataclass(frozen=True)
class _Set:
    """One test or candidate set or benchmark: its usable items, and their texts' tokens per tokenizer."""

    kind: str
    name: str
    items: Sequence[Any]
    texts: dict[str, list[data.Encoded]]
    report: dict[str, Any]


def _probes(options: Evaluate) -> dict[str, Probe]:
    """The probes asked for that have data; faults in the options are found here, before any work."""
    if options.baseline is not None and options.baseline not in options.models:
        raise OptionError(
            "the baseline is none of the models",
            given=options.baseline,
            expected=f"one of: {', '.join(options.models)}",
            fix=suggest(options.baseline, options.models),
        )
    asked = {name: PROBES.get(name) for name in options.probes}
    probes = {name: probe for name, probe in asked.items() if getattr(options, probe.needs)}
    chosen = options.probes != EvaluateSettings().probes
    for name in asked.keys() - probes.keys() if chosen else ():
        log.warning("%s is left out: no %s are given", name, asked[name].needs)
    if not probes or not options.models:
        raise OptionError(
            "nothing to evaluate",
            given=f"{len(options.models)} models; probes {', '.join(asked) or 'none'} without data",
            expected="models, and pairs, candidates or rewardbench, whatever a probe needs",
            fix="give models, pairs, candidates and rewardbench as name=path",
        )
    return probes


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Weights in `model`, and those that one token uses: without the routed experts it is not sent to."""
    total = sum(weight.numel() for weight in model.parameters())
    routed = sum(w.numel() for layer in moe_layers(model).values() for w in layer.experts.parameters())
    moe = getattr(model.config, "moemerge", None) or {}
    idle = routed - routed * moe["num_experts_per_tok"] // moe["num_routed_experts"] if routed else 0
    return {"parameters": total, "active_parameters": total - idle}


def _read_sets(options: Evaluate, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> list[_Set]:
    read: dict[str, Any] = {
        "pairs": data.read_pairs,
        "candidates": data.read_candidates,
        "rewardbench": read_choices,
    }
    found = []
    for kind, reader in read.items():
        for name, source in getattr(options, kind).items():
            items, report = reader(source, options)
            kept, texts = _encode(kind, items, report, tokenizers, options)
            log.info("%s %s: %d of %d rows usable by every model", kind, name, len(kept), report.total)
            found.append(_Set(kind, name, kept, texts, report.summary()))
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
        "rewardbench": encode_choices,
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


def _item(one: _Encoded) -> data.Pair | data.CandidateSet | Choice:
    if isinstance(one, data.EncodedPair):
        return one.pair
    return one.candidates if isinstance(one, data.EncodedCandidates) else one.choice


def _texts(one: _Encoded) -> list[data.Encoded]:
    return [one.chosen, one.rejected] if isinstance(one, data.EncodedPair) else one.answers


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
    inputs: dict[str, dict[str, Any]] = {"pairs": {}, "candidates": {}, "rewardbench": {}}
    gather: dict[str, Any] = {
        "pairs": _pair_scores,
        "candidates": _candidate_scores,
        "rewardbench": _choice_scores,
    }
    for place, one in enumerate(sets):
        values = {model: found[place].double().numpy() for model, found in scores.items()}
        inputs[one.kind][one.name] = gather[one.kind](one.items, values)
    return {name: probe.measure(inputs[probe.needs], options, options.seed) for name, probe in probes.items()}


def _pair_scores(pairs: Sequence[data.Pair], values: Mapping[str, Any]) -> PairScores:
    prompts = _numbered([json.dumps(pair.prompt) if pair.prompt else f"row {pair.row}" for pair in pairs])
    lengths = [[_characters(pair.chosen), _characters(pair.rejected)] for pair in pairs]
    return PairScores(
        scores={model: found.reshape(-1, 2) for model, found in values.items()},
        subsets=np.array([pair.subset for pair in pairs], dtype=np.str_),
        prompts=np.array(prompts),
        lengths=np.array(lengths),
    )


def _numbered(keys: Sequence[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _choice_scores(choices: Sequence[Choice], values: Mapping[str, Any]) -> ChoiceScores:
    return ChoiceScores(
        version=choices[0].version,
        scores=dict(values),
        lengths=np.array([len(text) for one in choices for text in one.texts]),
        sizes=np.array([len(one.texts) for one in choices]),
        num_correct=np.array([one.num_correct for one in choices]),
        subsets=np.array([one.subset for one in choices], dtype=np.str_),
        ids=np.array([one.id for one in choices], dtype=np.str_),
        prompts=np.array(_numbered([json.dumps(one.turns) for one in choices])),
    )


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
        counts = [2 if one.kind == "pairs" else len(item.texts) for item in one.items]
        rows = torch.tensor([item.row for item in one.items])
        found[f"{one.kind}/{one.name}/rows"] = rows.repeat_interleave(torch.tensor(counts))
        for model, values in scores.items():
            found[f"{one.kind}/{one.name}/model/{model}"] = values[place]
        if one.kind == "candidates":
            found[f"{one.kind}/{one.name}/gold"] = torch.tensor([g for item in one.items for g in item.gold])
    return found


def _write(
    draft: Draft,
    options: Evaluate,
    probes: Mapping[str, Probe],
    results: Mapping[str, dict[str, Any]],
    models: Mapping[str, dict[str, Any]],
    sets: Sequence[_Set],
    read: dict[str, Any],
) -> None:
    plots = [plot for name, probe in probes.items() for plot in probe.plot(results[name], draft.folder)]
    tables = [table for name, probe in probes.items() for table in probe.tables(results[name])]
    rows = {f"{one.kind}/{one.name}": one.report for one in sets}
    report = {
        "models": models,
        "baseline": options.baseline or next(iter(models)),
        "rows": rows,
        "protocol": read,
        "probes": results,
        "plots": plots,
    }
    write_json(draft.folder / "report.json", report)
    _write_markdown(
        draft.folder / "report.md", [_model_table(models), *protocol.tables(read), *tables], plots
    )
    draft.results |= {"models": models, "rows": rows, "main": _main_numbers(results)}


def _model_table(models: Mapping[str, dict[str, Any]]) -> Table:
    rows = [
        [name, facts["class"], f"{facts['parameters']:,}", f"{facts['active_parameters']:,}"]
        for name, facts in models.items()
    ]
    return Table("Models", ["model", "class", "parameters", "used per token"], rows)


def _write_markdown(path: Path, tables: Sequence[Table], plots: Sequence[str]) -> None:
    parts = ["# Evaluation\n", *(table.markdown() for table in tables), *(f"![{p}]({p})\n" for p in plots)]
    path.write_text("\n".join(parts), encoding="utf-8")


def _main_numbers(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Accuracy, gold score at the largest n, and overall scores of RewardBench, by set and model."""
    found: dict[str, Any] = {}
    for name, measured in results.get("accuracy", {}).get("sets", {}).items():
        models = cast(dict[str, Any], measured["all"]["models"])
        found.setdefault("accuracy", {})[name] = {model: n["accuracy"] for model, n in models.items()}
    for name, measured in results.get("best_of_n", {}).get("sets", {}).items():
        last = {model: curve["gold"][-1] for model, curve in measured["models"].items()}
        found.setdefault("best_of_n_gold", {})[name] = {"n": measured["n"][-1], **last}
    for name, measured in results.get("rewardbench", {}).get("sets", {}).items():
        for part, numbers in measured["overall"].items():
            values = {model: of_model["score"] for model, of_model in numbers["models"].items()}
            found.setdefault("rewardbench", {}).setdefault(name, {})[part] = values
    return found

"""Stage train: a reward model, MoE or dense, on preference pairs with TRL's RewardTrainer.

A run is one trial, or a grid of them (`search`): training/trials.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.artifacts.disk import flush_and_forget, flush_tree
from moemerge.artifacts.read_back import require_as_meant, tensor_digest
from moemerge.artifacts.stage import Draft, stage
from moemerge.artifacts.workspace import workspace
from moemerge.data.pairs import Pair, margins_of
from moemerge.data.reading import read_candidates, read_pairs
from moemerge.data.tokenise import EncodedCandidates, EncodedPair, encode_candidates, encode_pairs, texts_of
from moemerge.errors import together
from moemerge.models.cost import flops_ratio
from moemerge.models.device import use_training_device
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.token_limits import check_config
from moemerge.options.train import Train
from moemerge.training.lookahead import check_candidates
from moemerge.training.losses import LOSSES
from moemerge.training.report import logged_rows, results, write_history
from moemerge.training.trials import Bench, best_model, trials_of

log = logging.getLogger(__name__)


@stage("train", Train, rows=logged_rows)
def train(options: Train, draft: Draft) -> None:
    """Train a MoE or dense reward model, or a base model under a fresh head; write an ordinary HF folder.

    Weights train and are saved in float32 (bfloat16 is for autocast only). With validation pairs the weights
    that stand best by `choose_by` are kept, which may be those of the start (best_step 0). A killed run,
    started again with equal options, goes on from its last checkpoint, and on CPU ends with the very same
    weights. Also writes history.json and history.png. Losses are in nats, `seconds` those since the last
    start.
    Raises OptionError, DataError, CheckpointError or UnsupportedError.
    """
    options, ratio = _budgeted(options)
    trials = trials_of(options)
    bench = _bench(options, draft)
    with workspace(options) as folder:
        model, reports, best = best_model(bench, trials, folder)
        model.save_pretrained(draft.folder)
        bench.tokenizer.save_pretrained(draft.folder)
        _read_back(model, draft.folder, options.trust_remote_code)
    write_history(reports[best]["history"], draft.folder)
    draft.results |= results(options, reports, best) | ({"flops_ratio": ratio} if ratio else {})
    draft.results |= {"fresh_head": bench.model.drawn_head} if bench.model.drawn_head else {}


def _budgeted(options: Train) -> tuple[Train, float | None]:
    """The options with the steps that spend as many FLOPs as the model `flops_of` would, and their ratio."""
    if options.flops_of is None:
        return options, None
    trust = options.trust_remote_code
    ratio = flops_ratio(ModelFolder(options.flops_of, trust), ModelFolder(options.model, trust))
    log.info("training %.3g times as long, for as many FLOPs as %s", ratio, options.flops_of)
    return options.scaled(ratio), ratio


def _bench(options: Train, draft: Draft) -> Bench:
    for name in options.objectives:
        LOSSES.get(name)  # raises for an unknown one
    if options.trainer:
        from moemerge.training.arguments import trainer_faults

        if faults := trainer_faults(options.trainer):
            raise together("options", faults)
    device = use_training_device(options)
    model = ModelFolder(options.model, options.trust_remote_code, options.fresh_head)
    tokenizer = load_tokenizer(model)
    sides = {"pairs": options.pairs, "validation": options.validation}
    read = {name: _read(source, options, model, tokenizer, name, draft) for name, source in sides.items()}
    _check_margins(options, [pair.pair for pair in read["pairs"]])
    candidates = _candidates(options, model, tokenizer, draft)
    return Bench(device, model, tokenizer, read["pairs"], read["validation"], draft, candidates)


def _read(
    source: str | None,
    options: Train,
    model: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    draft: Draft,
) -> list[EncodedPair]:
    if source is None:
        return []
    pairs, report = read_pairs(source, options)
    encoded = encode_pairs(tokenizer, pairs, options, report)
    check_config(model.config, texts_of(encoded))
    draft.results.setdefault("rows", {})[name] = report.summary()
    return encoded


def _candidates(
    options: Train, model: ModelFolder, tokenizer: PreTrainedTokenizerBase, draft: Draft
) -> list[EncodedCandidates]:
    """The answers that the lookahead tells apart."""
    if options.lookahead is None:
        return []
    sets, report = read_candidates(options.lookahead, options, scored=False)
    encoded = encode_candidates(tokenizer, sets, options, report)
    check_candidates(encoded)
    check_config(model.config, [answer for candidates in encoded for answer in candidates.answers])
    draft.results["rows"]["lookahead"] = report.summary()
    return encoded


def _check_margins(options: Train, pairs: Sequence[Pair]) -> None:
    """Raise DataError for margins that are to be used and lack; tell of margins that are not to be used."""
    if options.margin == "column":
        margins_of(pairs)
    elif any(pair.margin is not None for pair in pairs):
        log.warning("%s has margins, which are not used: margin column uses them", options.pairs)


def _read_back(model: PreTrainedModel, folder: Path, trust_remote_code: bool) -> None:
    """Load what was saved from the disk, and compare it with `model`, bit for bit."""
    flush_tree(folder)
    for path in folder.glob("*.safetensors"):
        flush_and_forget(path)
    meant = {name: tensor_digest(tensor) for name, tensor in model.state_dict().items()}
    saved = load_reward_model(ModelFolder(folder, trust_remote_code), "cpu", torch.float32)
    require_as_meant(folder, meant, saved.state_dict().items())

"""What a training needs before it begins: model, tokenizer and pairs, read and checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerBase

from moemerge.artifacts.ranks import require_several
from moemerge.artifacts.stage import Draft
from moemerge.data.pairs import Pair, doubts_of, margins_of
from moemerge.data.reading import read_candidates, read_pairs
from moemerge.data.tokenise import EncodedCandidates, EncodedPair, encode_candidates, encode_pairs, texts_of
from moemerge.errors import DataError, together
from moemerge.models.device import use_training_device
from moemerge.models.folder import ModelFolder
from moemerge.models.heads import HEADS
from moemerge.models.loading import load_tokenizer
from moemerge.models.token_limits import check_config
from moemerge.options.train import Train
from moemerge.training.lookahead import check_candidates
from moemerge.training.losses import LOSSES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """What all trials share."""

    device: torch.device
    model: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    pairs: list[EncodedPair]
    held_out: list[EncodedPair]
    draft: Draft
    candidates: Sequence[EncodedCandidates] = ()


def open_bench(options: Train, draft: Draft) -> Bench:
    """What `options` name, read and checked; what became of the rows is in the draft's results.

    Raises OptionError, DataError, CheckpointError or UnsupportedError.
    """
    for name in options.objectives:
        LOSSES.get(name)  # raises for an unknown one
    if options.head is not None:
        HEADS.get(options.head)
    if options.trainer:
        from moemerge.training.arguments import trainer_faults

        if faults := trainer_faults(options.trainer):
            raise together("options", faults)
    if options.sharded:
        require_several()
    device = use_training_device(options)
    model = ModelFolder(options.model, options.trust_remote_code, options.fresh_head)
    tokenizer = load_tokenizer(model)
    sides = {"pairs": options.pairs, "validation": options.validation}
    read = {
        name: read_encoded(source, options, model, tokenizer, name, draft) for name, source in sides.items()
    }
    more = {
        name: read_encoded(source, options, model, tokenizer, name, draft)
        for name, source in options.more_pairs.items()
    }
    pairs = mixed(read["pairs"], more, options.shares, options.seed)
    _check_columns(options, [pair.pair for pair in pairs])
    candidates = _candidates(options, model, tokenizer, draft)
    return Bench(device, model, tokenizer, pairs, read["validation"], draft, candidates)


def mixed(
    pairs: Sequence[EncodedPair],
    more: Mapping[str, Sequence[EncodedPair]],
    shares: Mapping[str, float],
    seed: int,
) -> list[EncodedPair]:
    """`pairs` and those of `more`: each once, or as many as make up their share of all.

    With a share they are drawn in a random order, all of them before any comes again. Raises DataError for
    a source without a pair.
    """
    free = {name: rows for name, rows in more.items() if name not in shares}
    result = [*pairs, *(pair for rows in free.values() for pair in rows)]
    whole = len(result) / (1 - sum(shares.values()))
    for name, share in shares.items():
        if not more[name]:
            raise DataError(
                f"more_pairs: {name} has no pair",
                given=f"share {share}",
                expected="one usable pair or more",
                fix=f"leave {name} out, or give pairs: an attack without success has none",
            )
        draw, count, rows = Random(f"{seed} {name}"), round(share * whole), more[name]
        rounds = (draw.sample(rows, len(rows)) for _ in range(-(-count // len(rows))))
        result += [pair for order in rounds for pair in order][:count]
    return result


def read_encoded(
    source: str | None,
    options: Train,
    model: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    draft: Draft,
) -> list[EncodedPair]:
    """The pairs of `source`, if any, as tokens; the draft's results tell of its rows as `name`."""
    if source is None:
        return []
    pairs, report = read_pairs(source, options)
    encoded = encode_pairs(tokenizer, pairs, options, report)
    check_config(model.config, texts_of(encoded))
    draft.results.setdefault("rows", {})[name] = report.told()
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
    draft.results["rows"]["lookahead"] = report.told()
    return encoded


def _check_columns(options: Train, pairs: Sequence[Pair]) -> None:
    """Raise DataError for margins and doubts that are to be used and lack; tell of those not to be used."""
    if options.margin == "column":
        margins_of(pairs)
    elif any(pair.margin is not None and "strength" not in pair.source for pair in pairs):
        log.warning("%s has margins, which are not used: margin column uses them", options.pairs)
    if options.label_smoothing == "column":
        doubts_of(pairs)
    elif any(pair.doubt is not None for pair in pairs):
        log.warning("%s has doubts, which are not used: label_smoothing column uses them", options.pairs)

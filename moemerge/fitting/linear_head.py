"""A stock linear head in place of one that only moemerge knows: least squares on the states that it reads.

N texts, D width of a state, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from moemerge.artifacts.stage import Draft
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import encode_pairs, texts_of
from moemerge.errors import UnsupportedError
from moemerge.fitting.ridge import ridge
from moemerge.fitting.splits import hold_out
from moemerge.models.checkpoint import copy_side_files, write_checkpoint
from moemerge.models.device import use_device
from moemerge.models.families.dense import skeleton, stock_config
from moemerge.models.folder import ModelFolder
from moemerge.models.head_tensors import output_names, replaced_names
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.pooled_states import states_and_scores
from moemerge.models.scoring import score_pairs
from moemerge.options.export import Export
from moemerge.reports.statistics import Floats, wilson

CONFIDENCE = 0.95
STRENGTHS = tuple(10.0**power for power in range(-8, 3))  # hardly any: a head may be all but linear


@dataclass(frozen=True)
class LinearHead:
    """score = weight_D . state + constant."""

    weight_D: Floats
    constant: float


def write_linear(options: Export, draft: Draft) -> None:
    """Write `options.model` as a stock model with a linear head, and how far that head says the same.

    The head is fitted to what the model's own says of the texts of four fifths of the prompts, and both are
    compared on the pairs of the others, the new one as transformers loads it. Raises UnsupportedError for a
    model whose head is linear already, for a MoE, and where the two agree on fewer pairs than
    options.least_agreement; DataError for unusable pairs, or pairs of a single prompt.
    """
    device, source = use_device(options), ModelFolder(str(options.model))
    source.require_dense()
    _require_own_head(source)
    tokenizer, (pairs, report) = load_tokenizer(source), read_pairs(str(options.pairs), options)
    encoded = encode_pairs(tokenizer, pairs, options, report)
    parts = hold_out(encoded, options.holdout, options.seed)
    seen, held_out = ([encoded[number] for number in numbers] for numbers in parts)
    model = load_reward_model(source, device)
    head = fit_linear_head(*states_and_scores(model, texts_of(seen), options.batch_tokens))
    before_P2 = score_pairs(model, tokenizer, held_out, options.batch_tokens).double().numpy()
    del model
    _write(options, source, head, draft)
    stock = load_reward_model(draft.folder, device)
    after_P2 = score_pairs(stock, tokenizer, held_out, options.batch_tokens).double().numpy()
    numbers = likeness(before_P2, after_P2)
    _require_agreement(numbers, options)
    draft.results |= {"form": options.form, "rows": report.told(), "fitted_pairs": len(seen), **numbers}


def fit_linear_head(states_ND: Floats, scores_N: Floats) -> LinearHead:
    """argmin over v, c of sum (v . h + c - r)^2 + s |v|^2, s chosen by errors of texts that are left out."""
    center_D, mean = states_ND.mean(0), float(scores_N.mean())
    targets_N1 = (scores_N - mean)[:, None]
    fitted = ridge(states_ND - center_D, targets_N1, np.ones(len(scores_N)), STRENGTHS)
    weight_D: Floats = fitted.weight_ND[0]
    return LinearHead(weight_D, mean - float(weight_D @ center_D))


def likeness(before_P2: Floats, after_P2: Floats) -> dict[str, Any]:
    """How far two models' scores of the same pairs say the same.

    agreement: share of pairs of which both say the same answer is better, with its interval (Wilson).
    rank_correlation: Spearman's, of their differences; of_scores: of all texts' scores. r2: the share of
    the first one's variance that is not left between the two, but for a constant. accuracy: share of pairs
    whose chosen answer scores higher.
    """
    before_P, after_P = (scores_P2[:, 0] - scores_P2[:, 1] for scores_P2 in (before_P2, after_P2))
    same_P = np.sign(before_P) == np.sign(after_P)
    rest = float(np.var(before_P2 - after_P2) / np.var(before_P2))
    correlations = (
        spearmanr(before_P, after_P).statistic,
        spearmanr(before_P2.ravel(), after_P2.ravel()).statistic,
    )
    of_pairs, of_scores = (float(found) if np.isfinite(found) else None for found in correlations)
    return {
        "held_out_pairs": len(before_P),
        "agreement": float(same_P.mean()),
        "agreement_interval": list(wilson(float(same_P.sum()), len(same_P), CONFIDENCE)),
        "rank_correlation": of_pairs,
        "rank_correlation_of_scores": of_scores,
        "r2": 1 - rest,
        "accuracy": {"before": float((before_P > 0).mean()), "after": float((after_P > 0).mean())},
    }


def _write(options: Export, source: ModelFolder, head: LinearHead, draft: Draft) -> None:
    """The stock checkpoint: all but the head as it lies in the folder."""
    draft.reserve(sum(path.stat().st_size for path in source.folder.glob("*.safetensors")))
    write_checkpoint(draft.folder, _tensors(source, head), options.shard_size)
    config = stock_config(source.config)
    config.dtype = source.config.dtype
    config.save_pretrained(draft.folder)
    copy_side_files(source.folder, draft.folder)


def _tensors(source: ModelFolder, head: LinearHead) -> Iterator[tuple[str, torch.Tensor]]:
    own = skeleton(source.config)
    replaced = replaced_names(own)
    dtype = source.weights.dtype(replaced[0])
    yield from ((name, source.weights.tensor(name)) for name in source.weights.names if name not in replaced)
    stock = skeleton(stock_config(source.config))
    # A head without a bias drops the constant: no difference of scores shows it.
    for name in output_names(stock):
        values = [head.constant] if name.endswith("bias") else [head.weight_D.tolist()]
        yield name, torch.tensor(values, dtype=torch.float64).to(dtype)


def _require_own_head(source: ModelFolder) -> None:
    if not source.has_own_head:
        raise UnsupportedError(
            f"{source.source} is a stock model already",
            given="a linear head",
            expected="a model under a head of ours, such as train --head mlp writes",
            fix="use it as it is",
        )


def _require_agreement(numbers: dict[str, Any], options: Export) -> None:
    if numbers["agreement"] < options.least_agreement:
        correlation = numbers["rank_correlation"]
        raise UnsupportedError(
            f"a linear head disagrees too often with that of {options.model}",
            given=f"the same answer is better on {numbers['agreement']:.3f} of "
            f"{numbers['held_out_pairs']} pairs that it was not fitted to"
            + (f", rank correlation {correlation:.3f}" if correlation is not None else ""),
            expected=f"agreement on {options.least_agreement:g} of them at least (least_agreement)",
            fix="give more pairs, or a lower least_agreement; or keep the model, which needs moemerge",
        )

"""What a training costs in FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moemerge.data.tokenise import Encoded, EncodedPair, texts_of
from moemerge.models.cost import Cost, cost_of
from moemerge.models.folder import ModelFolder
from moemerge.options.layers import parse_layers
from moemerge.options.train import Train
from moemerge.training.bench import Bench
from moemerge.training.losses import THROUGH_LANGUAGE_HEAD

FLOPS = "flops"  # in the results of stages that train
BACKWARD = 2  # a backward pass takes twice the FLOPs of the forward pass


@dataclass(frozen=True)
class _Tokens:
    """Tokens of texts, and those that are answers'."""

    all: int
    answers: int

    @classmethod
    def of(cls, texts: Sequence[Encoded]) -> _Tokens:
        return cls(sum(len(t.ids) for t in texts), sum(len(t.ids) - max(1, t.prompt_length) for t in texts))


def training_flops(bench: Bench, options: Train, steps: int | None = None) -> float:
    """FLOPs of so many updates of one trial; None: of all that `options` ask for.

    A token takes those of the forward pass (models.cost), and twice as many again in each layer from the
    lowest that trains; a language head as many per answer token that it is given. `policy` looks at all pairs
    once before it begins, `lookahead` at its sets in each update, there and back. Held-out pairs, the
    products of attention and what padding costs are left out.
    """
    cost = cost_of(bench.model)
    steps = options.total_steps(len(bench.pairs)) if steps is None else steps
    passes = steps * options.batch_size * options.gradient_accumulation / len(bench.pairs)
    both_ways = 1 + BACKWARD * _share_of_layers(options.train_layers, cost.layers)
    flops = passes * both_ways * cost.flops_per_token * _Tokens.of(texts_of(bench.pairs)).all
    if options.lookahead is not None:
        flops += steps * both_ways * cost.flops_per_token * _tokens_ahead(bench, options)
    return flops + _through_language_head(bench.pairs, options, cost, passes)


def scoring_flops(model: ModelFolder, texts: Sequence[Encoded]) -> float:
    """FLOPs of scoring texts once."""
    return float(cost_of(model).flops_per_token * _Tokens.of(texts).all)


def _share_of_layers(train_layers: str, layers: int) -> float:
    """The share of the layers through which gradients go."""
    return 1 - (min(parse_layers(train_layers, layers)) if train_layers != "all" else 0) / layers


def _tokens_ahead(bench: Bench, options: Train) -> float:
    """Tokens of the candidate sets that an update looks at, on average."""
    texts = [text for candidates in bench.candidates for text in candidates.answers]
    sets = min(options.lookahead_sets, len(bench.candidates))
    return sets * _Tokens.of(texts).all / len(bench.candidates)


def _through_language_head(pairs: Sequence[EncodedPair], options: Train, cost: Cost, passes: float) -> float:
    """FLOPs of the language head; and of the pass over all pairs before training, trunk and head."""
    found = 0.0
    for name in options.minimised:
        read = THROUGH_LANGUAGE_HEAD.get(name)
        if read is None:
            continue
        texts = [pair.chosen for pair in pairs] if read.chosen_only else texts_of(pairs)
        tokens = _Tokens.of(texts)
        found += (passes * (1 + BACKWARD) + read.before) * cost.language_head_flops * tokens.answers
        found += read.before * cost.flops_per_token * tokens.all
    return found

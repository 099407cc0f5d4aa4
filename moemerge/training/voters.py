"""Voters: models trained on folds of preference pairs, each scoring the pairs of a fold that it has not seen.

Shapes: V voters per pair, X pairs that are scored.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moemerge.artifacts.ranks import leads
from moemerge.artifacts.workspace import once
from moemerge.data.pairs import swapped
from moemerge.data.tokenise import EncodedPair, texts_of
from moemerge.models import processes
from moemerge.models.device import free_memory
from moemerge.models.scoring import score_pairs
from moemerge.options.train import Train
from moemerge.reports.statistics import Floats
from moemerge.training.bench import Bench
from moemerge.training.flops import FLOPS, scoring_flops
from moemerge.training.trials import best_model, trials_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Election:
    """Who trains on what and scores what.

    bench: has the pairs to train on. others: pairs that are only scored. fold_X: the fold of each of the
    bench's pairs, then of the others. planted: places of the pairs that are turned round in training.
    """

    options: Train
    bench: Bench
    others: Sequence[EncodedPair]
    fold_X: Sequence[int]
    planted: Sequence[int]
    orders: int
    batch_tokens: int

    def differences(self, folder: Path) -> tuple[Floats, float]:
        """Score of chosen minus score of rejected by each voter of a pair's fold, [V, X]; V is `orders`.

        And the FLOPs of training and asking them all.
        What a voter said is kept in `folder`, and so is how far its training is: a killed run goes on there.
        """
        found_VX, flops = np.empty((self.orders, len(self.fold_X))), 0.0
        folds = sorted(set(self.fold_X))
        for fold in folds:
            mine_X = np.array(self.fold_X) == fold
            for order in range(self.orders):
                log.info("voter %d of %d, for fold %d of %d", order + 1, self.orders, fold + 1, len(folds))
                name = f"fold-{fold}-order-{order}"
                kept = once(folder / f"{name}.json", partial(self._vote, fold, order, folder / name))
                found_VX[order, mine_X] = kept["differences"]
                flops += kept[FLOPS]
        return found_VX, flops

    def training_pairs(self, fold: int) -> list[EncodedPair]:
        """What the voters of `fold` are trained on: all pairs of other folds, planted ones turned round."""
        turned = set(self.planted)
        return [
            EncodedPair(pair.rejected, pair.chosen, swapped(pair.pair)) if place in turned else pair
            for place, pair in enumerate(self.bench.pairs)
            if self.fold_X[place] != fold
        ]

    def _vote(self, fold: int, order: int, home: Path) -> dict[str, Any]:
        """Train a voter in `home`, and score its fold's pairs."""
        home.mkdir(exist_ok=True)
        # Seeds far apart: no voter has the order, or the fresh head, of another one.
        seed = int(np.random.SeedSequence([self.options.seed, fold, order]).generate_state(1)[0])
        named = self.options.output.with_name(
            f"{self.options.output.name}-{home.name}"
        )  # in what trackers show
        trials = trials_of(self.options.model_copy(update={"seed": seed, "output": named}))
        bench = replace(self.bench, pairs=self.training_pairs(fold))
        model, reports, _ = best_model(bench, trials, home)
        scored = [
            pair
            for pair, its in zip([*self.bench.pairs, *self.others], self.fold_X, strict=True)
            if its == fold
        ]
        model.to(bench.device).eval()  # type: ignore[arg-type]  # transformers wraps `to`
        scores_X2 = score_pairs(model, bench.tokenizer, scored, self.batch_tokens).double()
        del model
        free_memory()
        processes.wait()  # until all have loaded the voter
        if leads():
            shutil.rmtree(home)
        flops = sum(report[FLOPS] for report in reports) + scoring_flops(bench.model, texts_of(scored))
        return {"differences": (scores_X2[:, 0] - scores_X2[:, 1]).tolist(), FLOPS: flops}

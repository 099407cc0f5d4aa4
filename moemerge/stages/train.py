"""Stage train: a reward model, MoE or dense, on preference pairs with TRL's RewardTrainer.

A run is one trial, or a grid of them (`search`): training/trials.py.
"""

from __future__ import annotations

from moemerge.artifacts.ranks import leads
from moemerge.artifacts.stage import Draft, stage
from moemerge.artifacts.workspace import workspace
from moemerge.models.heads.saved import head_result
from moemerge.options.train import Train
from moemerge.training.bench import open_bench
from moemerge.training.budget import budgeted
from moemerge.training.report import logged_rows, results, write_history
from moemerge.training.saving import write_finished
from moemerge.training.trials import compete, trials_of


@stage("train", Train, shares_work=True, rows=logged_rows)
def train(options: Train, draft: Draft) -> None:
    """Train a MoE or dense reward model, or a base model under a fresh head; write an ordinary HF folder.

    Weights train and are saved as `weights` says, moments in float32. With validation pairs the weights
    that stand best by `choose_by` are kept, which may be those of the start (best_step 0). A killed run,
    started again with equal options, goes on from its last checkpoint, and on CPU ends with the very same
    weights. Several processes share each step's pairs (DDP). Also writes history.json and history.png. Losses
    are in nats, `seconds` those since the last start.
    Raises OptionError, DataError, CheckpointError or UnsupportedError.
    """
    bench = open_bench(options, draft)
    options, ratio = budgeted(options, bench)
    trials = trials_of(options)
    with workspace(options) as folder:
        reports, best = compete(bench, trials, folder)
        home, step = folder / f"trial-{best}", reports[best]["best_step"]
        write_finished(bench, trials[best], home, step, draft.folder)
        if leads():
            draft.results |= head_result(draft.folder)
    write_history(reports[best]["history"], draft.folder)
    draft.results |= results(options, reports, best) | ({"flops_ratio": ratio} if ratio else {})
    draft.results |= {"fresh_head": bench.model.drawn_head} if bench.model.drawn_head else {}

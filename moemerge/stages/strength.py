"""Stage strength: models vote on the labels of preference pairs, and doubtful labels are treated.

After Secrets of RLHF II (arXiv 2401.06080, section 2), with voters that have not seen what they score, and
with a measure of how often the vote is right.

Shapes: V voters, P pairs, T trusted pairs, X pairs and then trusted pairs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moemerge.artifacts.inputs import digests, fingerprints
from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.manifest import expect_stage, holds_manifest, read_manifest, written_by_stages
from moemerge.artifacts.stage import Draft, stage
from moemerge.artifacts.workspace import once, workspace
from moemerge.data.folds import folds_of
from moemerge.data.pairs import Pair, swapped
from moemerge.data.reading import read_pairs
from moemerge.data.rows import BadRow, Row, RowReport, read_rows, write_rows
from moemerge.data.tokenise import encode_pairs, texts_of
from moemerge.errors import ArtifactError, CheckpointError, DataError, OptionError
from moemerge.evaluation.vote import draw_planted
from moemerge.evaluation.vote_report import DROPPED, FLIPPED, Poll, sentence, write_page
from moemerge.models import processes
from moemerge.models.device import free_memory, use_device
from moemerge.models.scorers import open_scorer
from moemerge.options.base import COLUMNS, TextFormat
from moemerge.options.parse import parse_options
from moemerge.options.strength import RELABELS, Strength
from moemerge.options.train import Train
from moemerge.training.bench import open_bench, read_encoded
from moemerge.training.flops import FLOPS
from moemerge.training.voters import Election

PAIRS, VOTES, TRUSTED = "pairs.jsonl.gz", "votes.jsonl.gz", "trusted.jsonl.gz"

log = logging.getLogger(__name__)


def vote_rows(folder: Path) -> list[Row]:
    """What was said of each pair: a row for each that was voted on. ValueError for a broken file."""
    found = []
    for _, row in read_rows(str(folder / VOTES)):
        if isinstance(row, BadRow):
            raise ValueError(f"{VOTES}: {row}")
        found.append(row)
    return found


@stage("strength", Strength, shares_work=True, rows=vote_rows)
def strength(options: Strength, draft: Draft) -> None:
    """Write the pairs with strength, spread and margin, treated as asked, and what the vote is worth.

    Voters are trained here, F folds x `orders`, none on a prompt that it scores; or are models that are
    given; or their votes are those of an earlier output. Writes pairs.jsonl.gz (to train on: `margin` is the
    strength, `doubt` there with treat soft), votes.jsonl.gz and trusted.jsonl.gz (what each voter said),
    strength.json, report.html, report.md and plots. A killed run goes on with the voter that it was at.
    Several processes train each voter together (DDP), and share the texts that it scores. A flipped label's
    strength and margin have the sign of the new label. Raises OptionError, DataError, CheckpointError,
    UnsupportedError or ArtifactError.
    """
    if options.votes:
        _write(options, *read_votes(options, options.votes), draft)
        draft.results[FLOPS] = read_manifest(options.votes)["results"].get(FLOPS)
        return
    vote = _trained if options.model else _given
    with workspace(options) as folder:
        votes = vote(options, draft, folder)
        processes.wait()  # until all have read what is kept in the folder, which goes
        _write(options, *votes, draft)


def _trained(options: Strength, draft: Draft, folder: Path) -> tuple[Poll, list[int] | None]:
    """The votes of models that are trained here, each on all folds but the one that it scores."""
    fields = {name: getattr(options, name) for name in Train.model_fields if name in Strength.model_fields}
    training = parse_options(Train, fields)
    bench = open_bench(training, draft)
    trusted = read_encoded(options.trusted, training, bench.model, bench.tokenizer, "trusted", draft)
    pairs, others = ([item.pair for item in items] for items in (bench.pairs, trusted))
    fold_X = folds_of(pairs, others, options.fold_by, options.folds, options.seed)
    _tell_large_folds(fold_X[: len(pairs)], options)
    planted = draw_planted(len(pairs), options.planted, options.seed)
    election = Election(training, bench, trusted, fold_X, planted, options.orders, options.batch_tokens)
    differences_VX, draft.results[FLOPS] = election.differences(folder)
    return Poll(pairs, others, differences_VX, planted, options), fold_X[: len(pairs)]


def _tell_large_folds(fold_P: Sequence[int], options: Strength) -> None:
    largest = max(np.bincount(fold_P)) / len(fold_P)
    if largest > 2 / options.folds:
        log.warning(
            "one of %d folds has %.0f %% of the pairs, which fold_by %s ties to each other: its voters train "
            "on the others only",
            options.folds, 100 * largest, options.fold_by,
        )  # fmt: skip


def _given(options: Strength, draft: Draft, folder: Path) -> tuple[Poll, None]:
    """The votes of models that are given, all of one weight: differences over their root mean square."""
    _tell_of_pairs_seen(options)
    sets = {"pairs": _read(options.pairs, options, draft, "pairs")}
    if options.trusted:
        sets["trusted"] = _read(options.trusted, options, draft, "trusted")
    device = use_device(options)
    said_V = [
        once(folder / f"voter-{number}.json", partial(_said, options, model, sets, device))
        for number, model in enumerate(options.voters)
    ]
    differences_VX = np.array([said["differences"] for said in said_V])
    draft.results[FLOPS] = sum(said[FLOPS] for said in said_V)
    pairs, trusted = sets["pairs"], sets.get("trusted", [])
    scale_V = np.sqrt((differences_VX[:, : len(pairs)] ** 2).mean(axis=1))
    for model, scale in zip(options.voters, scale_V, strict=True):
        if not scale > 0:
            raise _judges_nothing(model, len(pairs))
    planted = draw_planted(len(pairs), options.planted, options.seed)
    return Poll(pairs, trusted, differences_VX / scale_V[:, None], planted, options), None


def _tell_of_pairs_seen(options: Strength) -> None:
    """Warn of voters that were trained on these very pairs, as far as their manifests say."""
    mine = digests(fingerprints(options.pairs))
    for model in options.voters:
        folder = Path(model)
        if holds_manifest(folder) and digests(read_manifest(folder)["inputs"].get("pairs", {})) == mine:
            log.warning(
                "%s was trained on %s: it has learned these labels, right or wrong, and its vote is no news",
                model, options.pairs,
            )  # fmt: skip


def _read(source: str, options: Strength, draft: Draft, name: str) -> list[Pair]:
    """The pairs of `source` that all voters' tokenizers can encode."""
    pairs, report = read_pairs(source, options)
    for model in options.voters:
        reader = open_scorer(model, options.trust_remote_code).reader()
        pairs = [encoded.pair for encoded in encode_pairs(reader, pairs, options, report)]
    draft.results.setdefault("rows", {})[name] = report.told()
    return pairs


def _said(options: Strength, model: str, sets: dict[str, list[Pair]], device: Any) -> dict[str, Any]:
    """Score differences of all pairs by one model that is given, and the FLOPs of scoring them."""
    voter = open_scorer(model, options.trust_remote_code)
    loaded = voter.load(device)
    pairs = [pair for some in sets.values() for pair in some]
    encoded = encode_pairs(voter.reader(), pairs, options, RowReport(model, total=len(pairs)))
    texts = texts_of(encoded)
    scores_X2 = loaded.score(texts, options.batch_tokens, model).view(-1, 2).double()
    flops = float(loaded.facts["flops_per_token"] * sum(len(text.ids) for text in texts))
    del loaded
    free_memory()
    differences_X: list[float] = (scores_X2[:, 0] - scores_X2[:, 1]).tolist()
    return {"differences": differences_X, FLOPS: flops}


def _judges_nothing(model: str, pairs: int) -> CheckpointError:
    return CheckpointError(
        f"{model} has no vote",
        given=f"the same score for both answers of all {pairs} pairs",
        expected="a reward model that tells answers apart",
        fix="take it out of voters, or look at what is wrong with it",
    )


def read_votes(options: Strength, votes: str) -> tuple[Poll, list[int] | None]:
    """The votes that the folder `votes`, an earlier output, has on the pairs of `options`, and their folds.

    Raises ArtifactError if they were given on other pairs or no stage wrote them, OptionError if it has to be
    known how often they err, and nothing tells it.
    """
    fix = "let the models vote again: give model or voters in place of votes"
    with written_by_stages(f"votes cannot be read from {votes}", fix):
        manifest = expect_stage(votes, "strength")
        recorded = digests(manifest["inputs"]["pairs"]), manifest["options"]["fields"]
        if (digests(fingerprints(options.pairs)), options.fields) != recorded:
            raise _of_other_pairs(votes, options.pairs)
        poll, folds = _kept_votes(options, Path(votes))
    if options.treat in RELABELS and not (poll.trusted or options.noise):
        raise OptionError(
            f"nothing tells how often the votes in {votes} err",
            given=f"treat {options.treat}, votes without trusted pairs, no noise",
            expected="votes on trusted pairs too, or noise",
            fix="give noise; or model and trusted in place of votes, so that trusted pairs are voted on too",
        )
    return poll, folds


def _of_other_pairs(votes: str, pairs: str) -> ArtifactError:
    return ArtifactError(
        "the votes were given on other pairs",
        given=f"{votes}: its pairs are not {pairs}",
        expected="the very file that was voted on, and the same fields",
        fix="give that file as pairs, or let models vote on this one: give model or voters",
    )


def _kept_votes(options: Strength, folder: Path) -> tuple[Poll, list[int] | None]:
    """What _write wrote of votes. ValueError, KeyError and the like for what it did not write."""
    said, file = vote_rows(folder), folder / TRUSTED
    by_row = {pair.row: pair for pair in read_pairs(options.pairs, options)[0]}
    pairs = [by_row[row["row"]] for row in said]
    trusted = read_pairs(str(file), TextFormat())[0] if file.exists() else []
    rows = [*said, *(pair.source for pair in trusted)]
    differences_VX = np.array([row["differences"] for row in rows], dtype=np.float64).T
    if not said or differences_VX.ndim != 2 or not np.isfinite(differences_VX).all():
        raise ValueError("differences that are no finite numbers, of each voter for each pair")
    planted = [place for place, row in enumerate(said) if row["planted"]]
    folds = [int(row["fold"]) for row in said if row["fold"] is not None]
    return Poll(pairs, trusted, differences_VX, planted, options), folds or None


def _write(options: Strength, poll: Poll, fold_P: Sequence[int] | None, draft: Draft) -> None:
    """The pairs as they are treated, what each voter said, and the page."""
    left = write_rows(draft.folder / PAIRS, _treated(options, poll))
    if not left:
        raise DataError(
            "no pair would be left",
            given=f"{len(poll.pairs)} pairs, treat {options.treat}",
            expected="a pair at least to train on",
            fix="lower share, or treat the pairs otherwise",
        )
    write_rows(draft.folder / VOTES, _said_of_pairs(poll, fold_P))
    if poll.trusted:
        rows = zip(poll.trusted, poll.differences_VX.T[len(poll.pairs) :].tolist(), strict=True)
        write_rows(draft.folder / TRUSTED, (pair.plain() | {"differences": said} for pair, said in rows))
    numbers = poll.numbers()
    write_json(draft.folder / "strength.json", numbers)
    write_page(poll, numbers, draft.folder)
    kept = ("pairs", "prompts", "against", "flips", "treated", "doubt", "most_noise")
    draft.results |= {name: numbers[name] for name in kept} | {"sentence": sentence(numbers)}
    log.debug("strength: %s", sentence(numbers))


def _treated(options: Strength, poll: Poll) -> Iterator[Row]:
    """The rows to train on."""
    for place, (pair, treatment) in enumerate(zip(poll.pairs, poll.treatments, strict=True)):
        if treatment == DROPPED:
            continue
        strength, row = float(poll.votes.strength_P[place]), _own_columns(pair, options)
        if treatment == FLIPPED:
            pair, strength = swapped(pair), -strength
        row |= pair.plain() | {
            "strength": strength,
            "spread": float(poll.spread_P[place]),
            "margin": strength,
        }
        yield row | ({"doubt": float(poll.doubts_P[place])} if poll.doubts_P is not None else {})


def _own_columns(pair: Pair, format: TextFormat) -> Row:
    """What a row holds besides the pair, as far as JSON has it."""
    read = {format.fields.get(name, name) for name in COLUMNS}
    return {name: value for name, value in pair.source.items() if name not in read and _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _said_of_pairs(poll: Poll, fold_P: Sequence[int] | None) -> Iterator[Row]:
    """What was said of each pair, dropped ones too, by its row in the source."""
    planted = set(poll.planted)
    for place, pair in enumerate(poll.pairs):
        yield {
            "row": pair.row,
            "subset": pair.subset,
            "fold": None if fold_P is None else int(fold_P[place]),
            "planted": place in planted,
            "differences": poll.differences_VX[:, place].tolist(),
            "strength": float(poll.votes.strength_P[place]),
            "spread": float(poll.spread_P[place]),
            "treatment": poll.treatments[place],
        }

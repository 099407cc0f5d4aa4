"""Stage `attack`: search for answers that a reward model puts on the wrong side of their pair.

After REFORM (arXiv 2507.06419), which lets the reward model itself guide the search for answers of the
rejected class that it overrates, and patches it with them: by small edits, greedily or with a beam, or by
tokens of a language model's decoding. What keeps the class is the kind of edit, a gold function, or which of
two language models finds the answer likelier.

P pairs, chosen and rejected scores in [P, 2].
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import torch

from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.stage import Draft, stage
from moemerge.artifacts.workspace import workspace
from moemerge.data import reading as data
from moemerge.data.draw import draw
from moemerge.data.pairs import Pair
from moemerge.data.rows import BadRow, RowReport, Text, write_rows
from moemerge.data.tokenise import Encoded, EncodedPair, Item, encode_all, encode_pairs, texts_of
from moemerge.errors import DataError
from moemerge.evaluation import gold as gold_scores
from moemerge.evaluation.attack_edits import chosen_edits
from moemerge.evaluation.attack_page import COLOURS, heat_texts
from moemerge.evaluation.attack_report import leading, summary, tables
from moemerge.evaluation.attack_search import (
    Gold,
    Scorer,
    Search,
    keeps_class,
    search,
    search_written,
)
from moemerge.evaluation.probes.base import Edit
from moemerge.evaluation.probes.edits import apply, last_message
from moemerge.models.device import use_device
from moemerge.models.scorers import Loaded, open_scorer
from moemerge.models.scorers.classifier import LoadedClassifier, classifier_of
from moemerge.options.attack import Attack, AttackSettings
from moemerge.reports import plotting
from moemerge.reports.figures import Figure, Line
from moemerge.reports.heat_text import HeatText
from moemerge.reports.html import Section, write_report
from moemerge.reports.statistics import Floats
from moemerge.training.answer_writer import AnswerWriter

log = logging.getLogger(__name__)


def _gold(options: Attack, device: torch.device) -> Gold | None:
    """The gold score of one answer, by the function or reward model that the options name.

    Each answer is asked about once: a gold function may be slow, or cost money.
    """
    reward = gold_scores.load_gold(options, device, options, options.trust_remote_code)
    if reward is None:
        return None
    known: dict[str, float] = {}

    def gold(prompt: Text, text: Text) -> float:
        key = json.dumps([prompt, text])
        if key not in known:
            known[key] = float(reward([(prompt, text)])[0])
        return known[key]

    return gold


@stage("attack", Attack, shares_work=True)
def attack(options: Attack, draft: Draft) -> None:
    """Search for rejected answers, edited or newly written, that the model scores above the chosen answer.

    Of side chosen: for good answers that it scores below the rejected one. Only pairs that the model judges
    rightly are attacked and, with gold, whose rejected answer is the worse one. Writes attacks.jsonl.gz
    (what came of each; pairs ranked wrongly too, as right: false), patch.jsonl (the found pairs as training
    data for `train`: prompt, chosen, rejected), report.json, report.html, report.md and attack.png. Of a
    decoder the page also shows what each word of the worst cases adds. What search decode has written is
    kept: a killed run, started again, goes on. Raises DataError if no pair can be attacked, OptionError for
    unknown edits or an unusable gold function, CheckpointError for an unusable model or policy.
    """
    device = use_device(options)
    gold = _gold(options, device)
    edits = chosen_edits(options.edits, options.words, gold is not None)
    attacked = open_scorer(options.model, options.trust_remote_code)
    decodes = options.search == "decode"
    if decodes:
        classifier_of(attacked, "search decode")
    reader, loaded = attacked.reader(), attacked.load(device)
    writer = AnswerWriter(options, device) if decodes else None
    encoded, rows = _read(options, reader, writer)
    texts = texts_of(encoded)
    scores_P2 = loaded.score(texts, options.batch_tokens, "pairs").view(-1, 2).double().numpy()
    right_P = scores_P2[:, 0] > scores_P2[:, 1]
    agreed_P = np.array([keeps_class(text.pair, gold)(text.pair.rejected) for text in encoded])
    if not (right_P & agreed_P).any():
        raise _nothing_to_attack(len(encoded), int(right_P.sum()), int(agreed_P.sum()))
    pairs = [text.pair for text, kept in zip(encoded, right_P & agreed_P, strict=True) if kept]
    wrong = [text.pair for text, kept in zip(encoded, ~right_P & agreed_P, strict=True) if kept]
    scorer, spread = _scorer(loaded, reader, options), float(scores_P2.std()) or 1.0
    attacked_P2 = scores_P2[right_P & agreed_P]
    told: dict[str, Any] = {}
    if writer is None:
        attempts = search(pairs, attacked_P2, edits, scorer, options, gold, options.seed)
    else:
        assert isinstance(loaded, LoadedClassifier)
        attempts, told = _decode(options, writer, loaded, texts, pairs, attacked_P2, gold)
    found = _found(attempts, options)
    patches = [_row_of(attempt.pair, **{attempt.side: attempt.best.text}) for attempt in found]
    if options.patch == "both":
        patches += _edited_chosen(found, edits, scorer, gold, options.seed)
    report = {
        "pairs": len(encoded),
        "judged_wrongly_before": int((~right_P).sum()),
        "label_not_shared_by_gold": int((right_P & ~agreed_P).sum()),
        **summary(attempts, spread, options, options.seed),
        **told,
    }
    heat = heat_texts(loaded, leading(attempts), options.batch_tokens, spread)
    _write(draft, attempts, wrong, patches, report | {"rows": rows.told()}, options.confidence, heat)


def _read(
    options: Attack, tokenizer: Any, writer: AnswerWriter | None
) -> tuple[list[EncodedPair], RowReport]:
    pairs, rows = data.read_pairs(options.pairs, options)

    def usable(some: Sequence[Pair]) -> list[EncodedPair]:
        fitting = writer.fitting(some, rows) if writer else some
        return encode_pairs(tokenizer, fitting, options, rows)

    return draw(pairs, options.max_pairs, options.seed, usable, rows), rows


def _scorer(loaded: Loaded, reader: Any, options: Attack, alone: bool = False) -> Scorer:
    def scores(items: Sequence[Item]) -> Floats:
        encoded = dict(enumerate(encode_all(reader, items)))
        usable = {
            number: text
            for number, text in encoded.items()
            if not isinstance(text, BadRow) and len(text.ids) <= options.max_length
        }
        values, texts = np.full(len(items), np.nan), list(usable.values())
        values[list(usable)] = loaded.score(texts, options.batch_tokens, alone=alone).numpy()
        return values

    return scores


def _decode(
    options: Attack,
    writer: AnswerWriter,
    loaded: LoadedClassifier,
    texts: Sequence[Encoded],
    pairs: Sequence[Pair],
    scores_P2: Floats,
    gold: Gold | None,
) -> tuple[list[Search], dict[str, Any]]:
    """Answers that the policy writes to each pair, those of their class scored whole; and what to report."""
    model, tokenizer = loaded.model, loaded.tokenizer
    alone = _scorer(loaded, tokenizer, options, alone=True)
    make_guide, read = writer.guide(model, tokenizer, texts, alone, pairs)
    with workspace(options) as folder:
        written = writer.write(pairs, make_guide, folder)
        rows = [(n, answer) for n, answers in enumerate(written) for answer in answers]
        usable = [(n, answer.text) for n, answer in rows if last_message(answer.text).strip()]
        kept = _of_class(options, writer, pairs, usable, gold)
    answers = [[text for n, text in kept if n == number] for number in range(len(pairs))]
    queries = [sum(answer.queries for answer in of_pair) for of_pair in written]
    scorer = _scorer(loaded, tokenizer, options)
    attempts = search_written(pairs, scores_P2, answers, queries, scorer, options)
    told = {
        "side": options.side,
        "answers": len(rows),
        "kept_class": len(kept),
        "class_by": gold_scores.source_of_gold(options) if gold else "likelihood ratio of the two policies",
        "ended": float(np.mean([answer.ended for _, answer in rows])),
        "mean_tokens": float(np.mean([answer.tokens for _, answer in rows])),
        "read": read if options.is_guided else "not at all",
    }
    return attempts, {"decoding": told}


def _of_class(
    options: Attack,
    writer: AnswerWriter,
    pairs: Sequence[Pair],
    answers: Sequence[tuple[int, Text]],
    gold: Gold | None,
) -> list[tuple[int, Text]]:
    """The answers, with their pairs' numbers, that are still the worse (of side chosen: the better) ones."""
    if gold is None:
        ratios = writer.likelier([(pairs[n].prompt, text) for n, text in answers])
        return [answer for answer, ratio in zip(answers, ratios, strict=True) if ratio > 0]
    judges = [keeps_class(pair, gold, options.side) for pair in pairs]
    return [(n, text) for n, text in answers if judges[n](text)]


def _nothing_to_attack(pairs: int, right: int, agreed: int) -> DataError:
    return DataError(
        "there is no pair to attack",
        given=f"{pairs} pairs, of which the model judges {right} rightly, and gold {agreed}",
        expected="pairs whose chosen answer scores higher",
        fix="give other pairs, or the model that was trained for them",
    )


def _write(
    draft: Draft,
    attempts: Sequence[Search],
    wrong: Sequence[Pair],
    patches: Sequence[dict[str, Any]],
    report: dict[str, Any],
    confidence: float,
    heat: Sequence[HeatText],
) -> None:
    unattacked = [{**pair.plain(), "row": pair.row, "right": False, "succeeded": False} for pair in wrong]
    write_rows(draft.folder / "attacks.jsonl.gz", [*map(_row, attempts), *unattacked])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in patches)
    (draft.folder / "patch.jsonl").write_text(lines, encoding="utf-8")
    write_json(draft.folder / "report.json", report)
    curve = report["by_queries"]
    line = Line(curve["queries"], curve["success"], curve["low"], curve["high"])
    title = f"{report['attacked']} pairs attacked"
    plotting.lines(
        {"success": line}, draft.folder / "attack.png", title, "queries (scores) per pair", "success"
    )
    figures = [Figure.load(draft.folder / "attack.png")]
    sections = [Section("Attack", tables=tables(report, confidence), figures=figures)]
    sections += [Section("Where the worst cases score", [COLOURS], texts=heat)] if heat else []
    write_report(draft.folder, "Attack", sections)
    reported = ("attacked", "succeeded", "success_rate", "interval", "queries", "rows")
    draft.results |= {key: report[key] for key in reported}
    if not patches:
        log.warning("no attack succeeded: patch.jsonl is empty")


def _row(attempt: Search) -> dict[str, Any]:
    outcome = {"edited": attempt.best.text, "edits": list(attempt.best.edits), "succeeded": attempt.succeeded}
    other = "chosen" if attempt.side == "rejected" else "rejected"
    scores = {f"score_{other}": attempt.goal, "score_edited": attempt.best.score, "queries": attempt.queries}
    return {**attempt.pair.plain(), "row": attempt.pair.row, "right": True, **outcome, **scores}


def _row_of(pair: Pair, **edited: Text) -> dict[str, Any]:
    """The pair with an edited answer; its margin was for another one."""
    return {**replace(pair, margin=None).plain(), **edited}


def _found(attempts: Sequence[Search], settings: AttackSettings) -> list[Search]:
    """The attempts whose answers go into the patch: successes, or without guidance all that changed."""
    if not settings.is_guided:
        return [attempt for attempt in attempts if attempt.best.edits]
    return [attempt for attempt in attempts if attempt.succeeded]


def _edited_chosen(
    found: Sequence[Search], edits: Mapping[str, Edit], scorer: Scorer, gold: Gold | None, seed: int
) -> list[dict[str, Any]]:
    """The pairs with their chosen answers edited as their rejected ones were.

    Not those that get too long, nor those that gold does not put above the rejected answer any more.
    """
    made = []
    for attempt in found:
        pair, draw = attempt.pair, Random(f"{seed} {attempt.pair.row} chosen")
        text = pair.chosen
        for name in attempt.best.edits:
            text = apply(edits[name], pair.prompt, text, "", draw) or text
        better = gold is None or gold(pair.prompt, text) > gold(pair.prompt, pair.rejected)
        if text != pair.chosen and better:
            made.append((pair, text))
    scores = scorer([(pair.prompt, text) for pair, text in made])
    return [
        _row_of(pair, chosen=text)
        for (pair, text), score in zip(made, scores, strict=True)
        if np.isfinite(score)
    ]

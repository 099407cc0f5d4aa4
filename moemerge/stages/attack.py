"""Stage `attack`: search for edits of rejected answers that a reward model scores above the chosen ones.

After REFORM (arXiv 2507.06419), which lets the reward model itself guide the search for answers of the
rejected class that it overrates, and patches it with them. There a language model's decoding is guided; here
small edits are, by greedy or beam search. What keeps the class is the kind of edit, or a gold function.

P pairs, chosen and rejected scores in [P, 2].
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import torch

from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.stage import Draft, stage
from moemerge.data import reading as data
from moemerge.data.draw import draw
from moemerge.data.pairs import Pair, prompt_key
from moemerge.data.rows import BadRow, RowReport, Text, write_rows
from moemerge.data.tokenise import EncodedPair, Item, encode_all, encode_pairs
from moemerge.errors import DataError
from moemerge.evaluation import gold as gold_scores
from moemerge.evaluation.attack_edits import chosen_edits
from moemerge.evaluation.attack_page import COLOURS, heat_texts
from moemerge.evaluation.attack_search import Gold, Scorer, Search, search, still_worse
from moemerge.evaluation.probes.base import Edit
from moemerge.evaluation.probes.edit_effects import excerpt
from moemerge.evaluation.probes.edits import apply, last_message
from moemerge.models.device import use_device
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.scoring import score, score_pairs
from moemerge.options.attack import Attack, AttackSettings
from moemerge.reports import plotting
from moemerge.reports.figures import Figure, Line
from moemerge.reports.heat_text import HeatText
from moemerge.reports.html import Section, write_report
from moemerge.reports.statistics import Floats, bootstrap_means, cluster_sums, percentile_interval, wilson
from moemerge.reports.table import Table, percent

log = logging.getLogger(__name__)
SHOWN = 10


def _gold(options: Attack, device: torch.device) -> Gold | None:
    """The gold score of one answer, by the function or reward model that the options name."""
    reward = gold_scores.load_gold(options, device, options, options.trust_remote_code)
    return None if reward is None else lambda prompt, text: float(reward([(prompt, text)])[0])


@stage("attack", Attack, shares_work=True)
def attack(options: Attack, draft: Draft) -> None:
    """Search among edits of rejected answers for some that the model scores above the chosen answer.

    Only pairs that the model judges rightly are attacked and, with gold, whose rejected answer is the worse
    one. Writes attacks.jsonl.gz (what came of each; pairs judged wrongly too, as right: false), patch.jsonl
    (the found pairs as training data for `train`: prompt, chosen, rejected), report.json, report.html,
    report.md and attack.png. Of a decoder the page also shows what each word of the worst cases adds. Raises
    DataError if no pair can be attacked, OptionError for unknown edits or an unusable gold function.
    """
    device = use_device(options)
    gold = _gold(options, device)
    edits = chosen_edits(options.edits, options.words, gold is not None)
    folder = ModelFolder(options.model, options.trust_remote_code)
    tokenizer, model = load_tokenizer(folder), load_reward_model(folder, device)
    encoded, rows = _read(options, tokenizer)
    scores_P2 = score_pairs(model, tokenizer, encoded, options.batch_tokens, "pairs").double().numpy()
    right_P = scores_P2[:, 0] > scores_P2[:, 1]
    agreed_P = np.array([still_worse(text.pair, gold)(text.pair.rejected) for text in encoded])
    if not (right_P & agreed_P).any():
        raise _nothing_to_attack(len(encoded), int(right_P.sum()), int(agreed_P.sum()))
    pairs = [text.pair for text, kept in zip(encoded, right_P & agreed_P, strict=True) if kept]
    wrong = [text.pair for text, kept in zip(encoded, ~right_P & agreed_P, strict=True) if kept]
    scorer, spread = _scorer(model, tokenizer, options), float(scores_P2.std()) or 1.0
    attempts = search(pairs, scores_P2[right_P & agreed_P], edits, scorer, options, gold, options.seed)
    found = _found(attempts, options)
    patches = [_row_of(attempt.pair, rejected=attempt.best.text) for attempt in found]
    if options.patch == "both":
        patches += _edited_chosen(found, edits, scorer, gold, options.seed)
    report = {
        "pairs": len(encoded),
        "judged_wrongly_before": int((~right_P).sum()),
        "label_not_shared_by_gold": int((right_P & ~agreed_P).sum()),
        **summary(attempts, spread, options, options.seed),
    }
    heat = heat_texts(model, tokenizer, _leading(attempts), options.batch_tokens, spread)
    _write(draft, attempts, wrong, patches, report | {"rows": rows.told()}, options.confidence, heat)


def _read(options: Attack, tokenizer: Any) -> tuple[list[EncodedPair], RowReport]:
    pairs, rows = data.read_pairs(options.pairs, options)

    def usable(some: Sequence[Pair]) -> list[EncodedPair]:
        return encode_pairs(tokenizer, some, options, rows)

    return draw(pairs, options.max_pairs, options.seed, usable, rows), rows


def _scorer(model: Any, tokenizer: Any, options: Attack) -> Scorer:
    def scores(items: Sequence[Item]) -> Floats:
        encoded = dict(enumerate(encode_all(tokenizer, items)))
        usable = {
            number: text
            for number, text in encoded.items()
            if not isinstance(text, BadRow) and len(text.ids) <= options.max_length
        }
        values = np.full(len(items), np.nan)
        values[list(usable)] = score(model, tokenizer, list(usable.values()), options.batch_tokens).numpy()
        return values

    return scores


def _nothing_to_attack(pairs: int, right: int, agreed: int) -> DataError:
    return DataError(
        "there is no pair to attack",
        given=f"{pairs} pairs, of which the model judges {right} rightly, and gold {agreed}",
        expected="pairs whose chosen answer scores higher",
        fix="give other pairs, or the model that was trained for them",
    )


def summary(attempts: Sequence[Search], spread: float, settings: AttackSettings, seed: int) -> dict[str, Any]:
    """Success rate with interval (Wilson's, or a bootstrap over prompts where prompts repeat), and its cost.

    `by_queries`: share of pairs on which so many scores at most were enough. `edits`: in how many of the
    successes each took part. `worst`: the largest leads over the chosen answer, divided by `spread`.
    """
    hits = [attempt for attempt in attempts if attempt.succeeded]
    clusters_P = np.unique([prompt_key(attempt.pair) for attempt in attempts], return_inverse=True)[1]
    curve = _success_by_queries(attempts, clusters_P, settings, seed)
    num_prompts = len(np.unique(clusters_P))
    repeated = num_prompts < len(attempts)
    # At the last point of the curve every query has been asked: its interval is that of the success rate.
    interval = (curve["low"][-1], curve["high"][-1]) if repeated else None
    used = Counter(name for attempt in hits for name in sorted(set(attempt.best.edits)))
    return {
        "attacked": len(attempts),
        "prompts": num_prompts,
        "succeeded": len(hits),
        "success_rate": len(hits) / len(attempts),
        "interval": interval or wilson(len(hits), len(attempts), settings.confidence),
        "interval_kind": "bootstrap over prompts" if repeated else "wilson",
        "queries": _queries(attempts, hits),
        "by_queries": curve,
        "edits": dict(used.most_common()),
        "worst": [_case(attempt, spread) for attempt in _leading(attempts)],
    }


def _leading(attempts: Sequence[Search]) -> list[Search]:
    """The successes whose edited answers lead by most."""
    hits = (attempt for attempt in attempts if attempt.succeeded)
    return sorted(hits, key=lambda attempt: attempt.goal - attempt.best.score)[:SHOWN]


def _success_by_queries(
    attempts: Sequence[Search], clusters_P: Any, settings: AttackSettings, seed: int
) -> dict[str, list[Any]]:
    """The share of pairs that were overrated within G numbers of scores, with a bootstrap over prompts."""
    most = max(1, *(attempt.queries for attempt in attempts))
    grid_G = np.unique(np.linspace(1, most, 25).round()).astype(int)
    success_PG = np.array(
        [[attempt.succeeded and attempt.queries <= limit for limit in grid_G] for attempt in attempts]
    )
    sums = cluster_sums(success_PG.astype(np.float64), clusters_P)
    draws_RG = bootstrap_means(sums, settings.resamples, seed)
    low_G, high_G = percentile_interval(draws_RG, settings.confidence)
    success_G = success_PG.mean(axis=0)
    curves = {"queries": grid_G, "success": success_G, "low": low_G, "high": high_G}
    return {name: values_G.tolist() for name, values_G in curves.items()}


def _queries(attempts: Sequence[Search], hits: Sequence[Search]) -> dict[str, Any]:
    counts = [attempt.queries for attempt in attempts]
    median = float(np.median([attempt.queries for attempt in hits])) if hits else None
    return {"total": sum(counts), "per_pair": float(np.mean(counts)), "median_of_successes": median}


def _case(attempt: Search, spread: float) -> dict[str, Any]:
    text, before = last_message(attempt.best.text), last_message(attempt.pair.rejected)
    change = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(before))
    return {
        "row": attempt.pair.row,
        "lead": (attempt.best.score - attempt.goal) / spread,
        "edits": list(attempt.best.edits),
        "prompt": excerpt(last_message(attempt.pair.prompt), -1),
        "chosen": excerpt(last_message(attempt.pair.chosen)),
        "rejected": excerpt(before, change),
        "edited": excerpt(text, change),
    }


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
        {"success": line}, draft.folder / "attack.png", title, "scores asked for, per pair", "success"
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
    scores = {"score_chosen": attempt.goal, "score_edited": attempt.best.score, "queries": attempt.queries}
    return {**attempt.pair.plain(), "row": attempt.pair.row, "right": True, **outcome, **scores}


def _row_of(pair: Pair, **edited: Text) -> dict[str, Any]:
    """The pair with an edited answer; its margin was for another one."""
    return {**replace(pair, margin=None).plain(), **edited}


def _found(attempts: Sequence[Search], settings: AttackSettings) -> list[Search]:
    """The attempts whose answers go into the patch: successes, or at random all that changed."""
    if settings.search == "random":
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


def tables(report: dict[str, Any], confidence: float) -> list[Table]:
    """Success and its price, the edits that took part, and the worst cases to read."""
    low, high = report["interval"]
    queries = report["queries"]
    median = queries["median_of_successes"]
    facts = {
        "pairs": report["pairs"],
        "judged wrongly before": report["judged_wrongly_before"],
        "label not shared by gold": report["label_not_shared_by_gold"],
        "attacked": report["attacked"],
        "succeeded": report["succeeded"],
        "success rate": f"{report['success_rate']:.1%} ({low:.1%} to {high:.1%})",
        "scores asked for, per pair": f"{queries['per_pair']:.1f}",
        "of successes, median": "" if median is None else f"{median:g}",
    }
    note = f"{percent(confidence)} interval: {report['interval_kind']}. Success: the edited rejected answer "
    note += "scores above the chosen one, though it is still the worse answer."
    shown = [
        Table("Attack success", ["", "value"], [[name, str(value)] for name, value in facts.items()], note)
    ]
    if report["worst"]:
        edits = [[name, str(count)] for name, count in report["edits"].items()]
        shown += [Table("Edits in successes", ["edit", "successes"], edits), _worst(report["worst"])]
    return shown


def _worst(cases: Sequence[dict[str, Any]]) -> Table:
    texts = ("prompt", "chosen", "rejected", "edited")
    rows = [
        [str(case["row"]), f"{case['lead']:+.2f}", ", ".join(case["edits"]), *(case[name] for name in texts)]
        for case in cases
    ]
    note = "Lead: score of the edited answer minus that of the chosen one, in standard deviations of scores."
    return Table("Worst cases", ["row", "lead (SD)", "edits", *texts], rows, note)

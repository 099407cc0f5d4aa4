"""Stage explain: what each token of answers adds to their scores (RED, arXiv 2411.08302), and what pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import read_object, write_json
from moemerge.artifacts.stage import Draft, stage
from moemerge.data.pairs import Pair
from moemerge.data.reading import read_pairs
from moemerge.data.rows import Row, RowReport, write_rows
from moemerge.data.tokenise import EncodedPair, encode_pairs, texts_of
from moemerge.evaluation.explanation import Explained, sections, sentence
from moemerge.evaluation.factors import Factor, factor_table, factors, parts_of
from moemerge.evaluation.page import row_table
from moemerge.evaluation.probes.edits import some_pairs
from moemerge.evaluation.token_rewards import rewards_of
from moemerge.models.device import use_device
from moemerge.models.folder import ModelFolder
from moemerge.models.heads.base import head_of
from moemerge.models.heads.mlp import MlpHead
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.pooled_states import states_and_scores
from moemerge.options.explain import Explain
from moemerge.reports.html import Section, write_report

FILE, TOKENS = "explanation.json", "tokens.jsonl.gz"


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The phrases, highest first."""
    phrases: list[dict[str, Any]] = read_object(folder / FILE)["phrases"]
    return phrases


@stage("explain", Explain, rows=_rows)
def explain(options: Explain, draft: Draft) -> None:
    """Write what each token adds to answers' scores, which phrases pay, and how early pairs are decided.

    Writes tokens.jsonl.gz (each answer's tokens with their rewards, in units of the score), explanation.json,
    report.html, report.md and decided.png; of a head with factors, what each does. The result's table are the
    phrases. Raises UnsupportedError for an encoder, whose tokens see later ones.
    """
    device = use_device(options)
    folder = ModelFolder(options.model, options.trust_remote_code)
    tokenizer, model = load_tokenizer(folder), load_reward_model(folder, device)
    encoded, rows = _read(options, tokenizer)
    pairs = [item.pair for item in encoded]
    items = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    answers = rewards_of(model, tokenizer, items, texts_of(encoded), options.batch_tokens)
    explained = Explained(pairs, answers[::2], answers[1::2], options)
    write_rows(draft.folder / TOKENS, _tokens(explained))
    numbers, found = explained.numbers(), _factors(model, encoded, options.batch_tokens)
    write_json(draft.folder / FILE, numbers | {"factors": [asdict(factor) for factor in found]})
    data = Section("Data", tables=[row_table({"pairs": rows.summary()})])
    lit = [Section("Factors", tables=[factor_table(found, pairs)])] if found else []
    page = [*sections(explained, numbers, draft.folder), *lit, data]
    write_report(draft.folder, f"What pays in {Path(options.model).name}", page)
    draft.results |= {"pairs": len(pairs), "rows": rows.summary(), "sentence": sentence(numbers)}


def _factors(model: Any, encoded: Sequence[EncodedPair], batch_tokens: int) -> list[Factor]:
    """Of a head with factors each that moves scores; of any other head none."""
    head, texts = head_of(model), texts_of(encoded)
    if not isinstance(head, MlpHead):
        return []
    states_ND, _ = states_and_scores(model, texts, batch_tokens)
    return factors(*parts_of(head, states_ND), [len(text.ids) - text.prompt_length for text in texts])


def _read(options: Explain, tokenizer: Any) -> tuple[list[EncodedPair], RowReport]:
    pairs, rows = read_pairs(options.pairs, options)
    encoded = encode_pairs(tokenizer, pairs, options, rows)
    chosen = some_pairs(encoded, options.max_pairs or len(encoded), options.seed)
    return [encoded[number] for number in chosen], rows


def _tokens(explained: Explained) -> Iterator[Row]:
    sides = {"chosen": explained.chosen, "rejected": explained.rejected}
    for number, pair in enumerate(explained.pairs):
        for side, answers in sides.items():
            yield _row(pair, side, answers[number])


def _row(pair: Pair, side: str, answer: Any) -> Row:
    scores = {"prompt_score": answer.prompt_score, "score": answer.score}
    return {"row": pair.row, "side": side, **scores, "tokens": answer.tokens, "rewards": answer.rewards}

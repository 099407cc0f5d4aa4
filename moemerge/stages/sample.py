"""Stage `sample`: a policy's answers to prompts, as candidate sets for evaluate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.artifacts.progress import hidden
from moemerge.artifacts.stage import Draft, stage
from moemerge.artifacts.workspace import workspace
from moemerge.data.pairs import CandidateSet, as_answer
from moemerge.data.reading import distinct, read_prompts
from moemerge.data.rows import write_rows
from moemerge.evaluation import gold
from moemerge.models import processes
from moemerge.models.device import free_memory, use_device
from moemerge.models.folder import ModelFolder
from moemerge.models.language_model import load_language_model
from moemerge.models.scoring import batches
from moemerge.options.sample import Sample
from moemerge.training.policy import batch_seed, prompt_ids, sample_answers, short_prompts

Drawn = dict[str, list[Any]]

log = logging.getLogger(__name__)


@stage("sample", Sample, shares_work=True)
def sample(options: Sample, draft: Draft) -> None:
    """Draw `per_prompt` answers to every prompt; write candidates.jsonl.gz, which evaluate reads.

    Answers get gold scores if gold_model or gold_function is given, else evaluate must be given one of them.
    Answers without text are left out and counted, and so are prompts with fewer than two answers. Each batch
    has a seed of its own and is kept as soon as it is drawn: a killed run, started again, goes on and ends
    with the same answers. Raises DataError for unusable rows, CheckpointError for an unusable policy,
    OptionError if there is no such gold function.
    """
    device = use_device(options)
    gold_reward = gold.load_gold(options, device, options, options.trust_remote_code)
    policy, tokenizer = load_language_model(ModelFolder(options.model, options.trust_remote_code), device)
    prompts, report = read_prompts(options.prompts, options)
    prompts = distinct(short_prompts(prompts, report, tokenizer, options))[: options.max_prompts]
    with workspace(options) as folder:
        drawn = _draw(options, policy, tokenizer, prompts, folder)
        sets, results = _gather(prompts, drawn)
        del policy
        free_memory()
        sets = gold.regrade(sets, gold_reward) if gold_reward else sets
        write_rows(draft.folder / "candidates.jsonl.gz", (candidates.plain() for candidates in sets))
    draft.results |= {**results, "gold": gold.source_of_gold(options), "rows": report.told()}


def _draw(
    options: Sample,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[CandidateSet],
    folder: Path,
) -> list[Drawn]:
    """Batches of answers, each read from `folder` if it is there: the numbers of their prompts, and texts.

    Several processes each draw some of the batches, and read the others' when all are drawn.
    """
    numbers = [number for number in range(len(prompts)) for _ in range(options.per_prompt)]
    ids = prompt_ids(tokenizer, [item.prompt for item in prompts])
    lengths = [len(ids[number]) + options.max_new_tokens for number in numbers]
    groups = [[numbers[row] for row in rows] for rows in batches(lengths, options.batch_tokens)]

    mine = processes.share(len(groups))
    total = sum(len(groups[batch]) for batch in mine)
    with tqdm(total=total, desc="answers", unit="answer", leave=False, disable=hidden()) as bar:

        def drawn(batch: int) -> Drawn:
            bar.update(len(groups[batch]))
            return _batch(options, policy, tokenizer, prompts, groups[batch], batch)

        return processes.once_each(folder, len(groups), drawn)


def _batch(
    options: Sample,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[CandidateSet],
    numbers: list[int],
    batch: int,
) -> Drawn:
    answers = sample_answers(
        policy,
        tokenizer,
        [prompts[number].prompt for number in numbers],
        batch_seed(options.seed, batch),
        options.max_new_tokens,
        options.temperature,
        options.top_p,
    )
    tokens_B = answers.mask_BT[:, answers.start :].sum(dim=1)
    ended, tokens = answers.ended_B.tolist(), tokens_B.tolist()
    return {"places": numbers, "texts": answers.texts, "ended": ended, "tokens": tokens}


def _gather(
    prompts: Sequence[CandidateSet], drawn: Sequence[Drawn]
) -> tuple[list[CandidateSet], dict[str, Any]]:
    """The candidate sets, and the counts and means to report."""
    texts: list[list[str]] = [[] for _ in prompts]
    for part in drawn:
        for number, text in zip(part["places"], part["texts"], strict=True):
            texts[number].append(text)
    full = [
        replace(item, texts=_with_text(item, of_prompt))
        for item, of_prompt in zip(prompts, texts, strict=True)
    ]
    sets = [candidates for candidates in full if len(candidates.texts) > 1]
    every = [text for of_prompt in texts for text in of_prompt]
    blank = sum(not text.strip() for text in every)
    if blank:
        log.warning("%d of %d answers have no text and are left out", blank, len(every))
    return sets, {
        "prompts": len(sets),
        "answers": sum(len(candidates.texts) for candidates in sets),
        "left_out": {"prompts": len(full) - len(sets), "answers": blank},
        "different": sum(len(set(of_prompt)) for of_prompt in texts) / len(every),
        "ended": float(np.mean([ended for part in drawn for ended in part["ended"]])),
        "mean_tokens": float(np.mean([tokens for part in drawn for tokens in part["tokens"]])),
    }


def _with_text(item: CandidateSet, texts: Sequence[str]) -> list[Any]:
    return [as_answer(item.prompt, text) for text in texts if text.strip()]

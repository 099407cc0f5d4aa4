"""Scoring texts with a reward model.

P pairs, B batch, T tokens.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moemerge.artifacts import ranks
from moemerge.artifacts.progress import PROGRESS, hidden
from moemerge.data.tokenise import Encoded, EncodedPair, texts_of
from moemerge.errors import CheckpointError, DataError
from moemerge.models import processes
from moemerge.models.pooling import padding
from moemerge.models.token_limits import check_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

OnBatch: TypeAlias = Callable[[list[int]], None]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    batch_tokens: int,
    progress: str = "",
    on_batch: OnBatch | None = None,
    alone: bool = False,
) -> Tensor:
    """Scores of `encoded` texts, float32 on CPU, in the order given; shape [len(encoded)].

    Texts of like length go together, at most `batch_tokens` tokens a batch with padding counted (a longer
    text goes alone). Batching does not change scores beyond rounding. `progress` names a progress bar;
    `on_batch` gets the rows of each batch before it runs, in the batch's order (none where its scores do not
    count). Several processes share the batches, and all have all scores in the end, the very same as one
    would; `alone`: this one runs them all, and others need not call. Raises DataError for a text without
    tokens, CheckpointError if a score is not finite.
    """
    refuse_empty(encoded)
    check_texts(model, encoded)
    if not encoded:
        return torch.zeros(0)
    in_step = processes.is_sharded(model)
    quickly = torch.no_grad if in_step else torch.inference_mode
    with padding(model, encoded) as pad:

        def run(texts: Sequence[Encoded]) -> Tensor:
            with quickly():
                return forward(model, texts, pad)[:, 0]

        scores = in_batches(encoded, batch_tokens, run, progress, on_batch, alone, in_step)
    processes.part_again(model)
    return scores


def in_batches(
    encoded: Sequence[Encoded],
    batch_tokens: int,
    run: Callable[[Sequence[Encoded]], Tensor],
    progress: str = "",
    on_batch: OnBatch | None = None,
    alone: bool = False,
    in_step: bool = False,
) -> Tensor:
    """As `score`, with `run` in place of a model: it gives the scores of one batch of texts, [B].

    in_step: several processes have to run as many batches each.
    """
    groups = list(batches([len(text.ids) for text in encoded], batch_tokens))
    mine = groups if alone else [groups[number] for number in processes.share(len(groups))]
    done: list[Tensor] = []
    scored = [row for rows in mine for row in rows]
    with _bar(len(scored), progress) as bar:
        for rows in mine:
            if on_batch is not None:
                on_batch(rows)
            done.append(run([encoded[row] for row in rows]).float())
            bar.update(len(rows))
            if progress:
                PROGRESS.words = f", {progress}: {sum(map(len, done))} of {len(scored)} texts"
        if not alone and in_step:
            # Each layer is put together out of all processes' parts, so all run as many batches.
            for _ in range(-(-len(groups) // ranks.count()) - len(mine)):
                if on_batch is not None:
                    on_batch([])
                run([encoded[row] for row in groups[-1]])
    # Only now to the CPU: a copy would wait for each batch to end.
    scores_S = torch.cat([scores_B.cpu() for scores_B in done]) if done else torch.zeros(0)
    scores = torch.zeros(len(encoded)).index_copy(0, torch.tensor(scored, dtype=torch.long), scores_S)
    if not alone:
        scores = processes.summed(scores)
    _refuse_non_finite(scores, progress)
    return scores


def forward(model: PreTrainedModel, texts: Sequence[Encoded], pad: int) -> Tensor:
    """What the model says of one batch of texts, padded on the right with `pad`; [B, 1]."""
    takes = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in takes else {}
    # Embeddings that stay in their file are on no device; accelerate moves the texts to where it puts them.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    logits_B1: Tensor = model(**collate(texts, pad, gates_by_prompt(model), device), **extra).logits
    return logits_B1


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows grouped by falling length, `rows x longest <= batch_tokens` (or one row), ties in order."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def gates_by_prompt(model: PreTrainedModel) -> bool:
    """Whether a MoE's gates look at prompts only: it has to be told where these end."""
    return (getattr(model.config, "moemerge", None) or {}).get("gate") == "prompt"


def collate(texts: Sequence[Encoded], pad: int, prompts: bool, device: torch.device) -> dict[str, Tensor]:
    """A batch of texts padded on the right with `pad`; `prompt_lengths` too if `prompts` asks for them."""
    longest = max(len(text.ids) for text in texts)
    ids_BT = torch.tensor([text.ids + [pad] * (longest - len(text.ids)) for text in texts])
    lengths_B = torch.tensor([len(text.ids) for text in texts])
    inputs = {"input_ids": ids_BT, "attention_mask": (torch.arange(longest) < lengths_B[:, None]).long()}
    if prompts:
        inputs["prompt_lengths"] = torch.tensor([text.prompt_length for text in texts])
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def _bar(total: int, text: str) -> tqdm[Any]:
    return tqdm(total=total, desc=text, unit="text", leave=False, disable=hidden() or not text)


def refuse_empty(encoded: Sequence[Encoded]) -> None:
    """Raise DataError for a text without tokens."""
    empty = [row for row, text in enumerate(encoded) if not text.ids]
    if empty:
        raise DataError(
            "a text without tokens cannot be scored",
            given=f"{len(empty)} of {len(encoded)} texts, first at position {empty[0]}",
            expected="at least one token",
            fix="drop empty answers, or use a tokenizer that adds an end token",
        )


def _refuse_non_finite(scores: Tensor, progress: str) -> None:
    bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise CheckpointError(
            "the model gives scores that are not finite",
            given=f"{progress}{': ' * bool(progress)}{len(bad)} of {len(scores)} texts, first at position "
            f"{bad[0]}: {scores[bad[0]].item()}",
            expected="finite scores",
            fix="check the checkpoint for NaN, or load it in float32 or bfloat16 in place of float16",
        )


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    batch_tokens: int,
    progress: str = "",
    alone: bool = False,
) -> Tensor:
    """Scores of pairs, [len(pairs), 2]: chosen, rejected. As `score`, over both sides at once."""
    texts = texts_of(pairs)
    return score(model, tokenizer, texts, batch_tokens, progress, alone=alone).view(-1, 2)


def bradley_terry(scores_P2: Tensor) -> tuple[float, float]:
    """Mean of -log sigmoid(chosen - rejected) in nats, and the share of pairs with chosen > rejected.

    A tie is an error. Raises DataError without pairs.
    """
    if not len(scores_P2):
        raise DataError(
            "no pairs to compare",
            given="0 pairs",
            expected="at least one",
            fix="give a file with usable pairs",
        )
    return loss_and_accuracy(scores_P2[:, 0].double() - scores_P2[:, 1].double())


def loss_and_accuracy(margins_P: Tensor) -> tuple[float, float]:
    """As `bradley_terry`, of the differences chosen - rejected, one at least."""
    loss_P = -torch.nn.functional.logsigmoid(margins_P)
    return loss_P.mean().item(), (margins_P > 0).double().mean().item()

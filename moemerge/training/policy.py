"""Language models as policies: sampling answers, and how far one has gone from another.

B sequences, T tokens, V words of the vocabulary.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moemerge.data.pairs import CandidateSet
from moemerge.data.rows import SHORTEN, BadRow, RowReport, Text
from moemerge.data.tokenise import begins_with_bos, ids_of, render, tell_untemplated
from moemerge.errors import DataError, UnsupportedError
from moemerge.options.optimise import Optimise
from moemerge.options.sample import Sample

SHORT_PROMPTS = "prompts that the policy takes, with room for max_new_tokens within max_length"


@dataclass(frozen=True)
class Answers:
    """Sampled answers: their texts, and prompts (padded on the left) and answers as tokens.

    ids_BT and mask_BT hold both; from `start` on they are answers, the end token included in the mask and
    nothing after it. ended_B: whether an answer came to its end before max_new_tokens.
    """

    texts: list[str]
    ids_BT: Tensor
    mask_BT: Tensor
    start: int
    ended_B: Tensor


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> list[list[int]]:
    """Each prompt as tokens after which an answer begins: chats by the template, with its generation prompt.

    Raises DataError for chats without a template and for prompts without tokens, UnsupportedError for a
    tokenizer that puts its end token behind a prompt, BadRow for a chat that the template refuses.
    """
    ids_by_prompt = [_ids(tokenizer, prompt) for prompt in prompts]
    for ids, prompt in zip(ids_by_prompt, prompts, strict=True):
        if not ids:
            raise DataError(
                "an empty prompt cannot be answered",
                given=repr(prompt)[:200],
                expected="at least one token",
                fix="leave such rows out",
            )
        if isinstance(prompt, str) and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
            raise UnsupportedError(
                "the policy's tokenizer ends every prompt",
                given=f"{tokenizer.name_or_path} puts {tokenizer.eos_token} last",
                expected="a tokenizer that leaves prompts open",
                fix="switch this off in tokenizer_config.json, e.g. add_eos_token: false",
            )
    return ids_by_prompt


def _ids(tokenizer: Any, prompt: Text) -> list[int]:
    if isinstance(prompt, str):
        bare = begins_with_bos(tokenizer, prompt)  # rendered beforehand
        return ids_of(tokenizer, [prompt], add_special_tokens=not bare)[0]
    if tokenizer.chat_template is None:
        raise DataError(
            "chat prompts cannot be encoded",
            given=f"a policy without a chat template ({tokenizer.name_or_path})",
            expected="a policy with a chat template, or prompts as text",
            fix="use a chat model as policy, or give prompts as text",
        )
    text = render(tokenizer, prompt, add_generation_prompt=True)
    if isinstance(text, BadRow):
        raise text
    return ids_of(tokenizer, [text], add_special_tokens=False)[0]


def short_prompts(
    prompts: Sequence[CandidateSet],
    report: RowReport,
    tokenizer: PreTrainedTokenizerBase,
    options: Sample | Optimise,
) -> list[CandidateSet]:
    """The prompts that leave room for max_new_tokens within max_length; others are bad rows in `report`.

    Raises DataError if bad rows are refused, or if none is left; else as prompt_ids does.
    """
    room = options.max_length - options.max_new_tokens
    tell_untemplated(tokenizer, [item.prompt for item in prompts[:1]], report)
    kept = []
    for item in prompts:
        try:
            if len(prompt_ids(tokenizer, [item.prompt])[0]) <= room:
                kept.append(item)
            else:
                reason = f"longer than {room} tokens, which is max_length - max_new_tokens"
                report.add(reason, item.row, SHORTEN)
        except BadRow as bad:
            report.add(str(bad), item.row, bad.fix)
    report.check(options.bad_rows, SHORT_PROMPTS)
    return kept


def sample_answers(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Answers:
    """One answer to each prompt, all in one batch, drawn from `seed`; other draws go on as if nothing was.

    Plain sampling: the policy's own generation config only says which tokens end an answer. Raises as
    prompt_ids does.
    """
    device, ends = policy.device, end_tokens(policy, tokenizer)
    ids_BT, mask_BT = _pad_left(prompt_ids(tokenizer, prompts), int(tokenizer.pad_token_id), device)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
    )
    with _seeded(seed, device), torch.inference_mode():
        whole_BT = policy.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)
    start = ids_BT.shape[1]
    real_BT, ended_B = _until_end(whole_BT[:, start:], ends)
    mask_BT = torch.cat([mask_BT, real_BT], dim=1)
    texts = [
        answer_text(tokenizer, prompt, ids_T[mask_T.bool()].tolist())
        for prompt, ids_T, mask_T in zip(prompts, whole_BT[:, start:], real_BT, strict=True)
    ]
    return Answers(texts, whole_BT.clone(), mask_BT, start, ended_B)


def _pad_left(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    return ids_BT, mask_BT


def end_tokens(policy: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the policy's generation config.

    What the policy's vocabulary lacks is never drawn, and ends nothing.
    """
    own, size = policy.generation_config.eos_token_id, policy.config.get_text_config().vocab_size
    named = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in named if type(token) is int and 0 <= token < size))


def _until_end(answer_BT: Tensor, ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """1 up to and including the first end token of each answer, and whether there is one."""
    end_BT = torch.isin(answer_BT, torch.tensor(ends, dtype=answer_BT.dtype, device=answer_BT.device))
    before_BT = end_BT.cumsum(dim=1) - end_BT.long()  # how many end tokens stand before this one
    return (before_BT == 0).long(), end_BT.any(dim=1)


def answer_text(tokenizer: Any, prompt: Text, ids: Sequence[int]) -> str:
    """The text of an answer so that prompt + answer, if they are plain, are what the policy wrote.

    Decoded by themselves many tokenizers lose the space between the two.
    """
    alone = str(tokenizer.decode(ids, skip_special_tokens=True))
    if not isinstance(prompt, str):
        return alone
    before = _ids(tokenizer, prompt)
    start = str(tokenizer.decode(before, skip_special_tokens=True))
    whole = str(tokenizer.decode([*before, *ids], skip_special_tokens=True))
    if not whole.startswith(start):
        return alone
    rest = whole[len(start) :]
    # Decoding may drop the prompt's last space, which then stands before the answer a second time.
    return rest[1:] if prompt[-1:].isspace() and not start[-1:].isspace() and rest[:1].isspace() else rest


def token_ends(tokenizer: Any, prompt: Text, ids: Sequence[int]) -> list[int]:
    """Where each token of an answer ends in its `answer_text`; a token of half a letter ends before it."""
    whole = answer_text(tokenizer, prompt, ids)
    begun = (answer_text(tokenizer, prompt, ids[:count]) for count in range(1, len(ids) + 1))
    return list(accumulate((len(os.path.commonprefix([whole, text])) for text in begun), max))


@torch.inference_mode()
def kl_from(
    reference: PreTrainedModel, policy: PreTrainedModel, answers: Answers, temperature: float
) -> Tensor:
    """KL of `policy` from `reference`, in nats, estimated on each answer that `policy` gave; [B] float32.

    The sum over an answer's tokens of the KL between the two next-token distributions, both at `temperature`:
    unbiased for the KL of whole answers, never negative, with less variance than the log ratio of the answer
    (Amini et al., arXiv 2504.10637).
    """
    policy_BTV, reference_BTV = (
        _log_probabilities(model, answers, temperature) for model in (policy, reference)
    )
    kl_BT = (policy_BTV.exp() * (policy_BTV - reference_BTV)).sum(dim=-1).clamp(min=0)  # rounding
    return (kl_BT * answers.mask_BT[:, answers.start :]).sum(dim=1).cpu()


def _log_probabilities(model: PreTrainedModel, answers: Answers, temperature: float) -> Tensor:
    """Of every word at every token of the answers, [B, T, V] float32."""
    inputs = {"input_ids": answers.ids_BT, "attention_mask": answers.mask_BT, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        # Prompts are padded on the left: positions count from the first real token.
        inputs["position_ids"] = (answers.mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    logits_BTV = model(**inputs).logits[:, answers.start - 1 : -1]  # each token's stand one before it
    return (logits_BTV.float() / temperature).log_softmax(dim=-1)


def batch_seed(seed: int, *numbers: int) -> int:
    """A seed for one part of the work, unlike those of all others."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

"""A reward model that learns, while a policy trains, from pairs of its answers that a rule has judged.

After Cooper (arXiv 2508.05613): of the answers to a prompt one that is certainly right against one that is
certainly wrong.

Shapes: B pairs of a micro-batch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.data.pairs import Pair, as_answer
from moemerge.data.rows import BadRow, Row, Text
from moemerge.data.tokenise import EncodedPair, Item, encode_all, texts_of
from moemerge.models.head_tensors import in_head
from moemerge.models.pooling import padding
from moemerge.models.roles import roles_of
from moemerge.models.scoring import forward
from moemerge.options.optimise import Optimise
from moemerge.training.policy import batch_seed, sample_answers

log = logging.getLogger(__name__)
Rule = Callable[[Sequence[Item]], Sequence[int | None]]  # 1 right, 0 wrong, None: it cannot say
Corrupt = Callable[[Text, Text, Random], Text | None]
Part = Callable[[], Tensor]


class Learner(Protocol):
    """A reward model that can learn, and what of it does."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def step(self, parts: Sequence[Part]) -> float:
        """One update against the sum of losses that `parts` compute, one after another; that sum."""


class WeightLearner:
    """A reward model, in float32 and eval mode, of which all, the head or the experts learn by Adam.

    Experts of a dense model are its MLPs. Gradients are clipped to `max_norm`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        trains: str,
        rate: float,
        max_norm: float,
    ) -> None:
        self.model, self.tokenizer, self._max_norm = model, tokenizer, max_norm
        wanted = _names(model, trains)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._adam = torch.optim.AdamW(self._trained, lr=rate, weight_decay=0.0)

    def step(self, parts: Sequence[Part]) -> float:
        """As Learner."""
        loss = 0.0
        with torch.enable_grad():
            for part in parts:
                value = part()
                value.backward()
                loss += value.item()
        torch.nn.utils.clip_grad_norm_(self._trained, self._max_norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return loss


def _names(model: PreTrainedModel, trains: str) -> set[str]:
    """The parameters that `trains` names."""
    names = {name for name, _ in model.named_parameters()}
    if trains == "head":
        return {name for name in names if in_head(model, name)}
    if trains == "experts":
        return {name for name, role in roles_of(model).items() if role == "experts"}
    return names


def pair_losses(model: PreTrainedModel, pairs: Sequence[EncodedPair], center: float) -> Tensor:
    """-log sigmoid(f(right) - f(wrong)) + center (f(right) + f(wrong))^2 of each pair, [B].

    Gradients pass.
    """
    texts = texts_of(pairs)
    with padding(model, texts) as pad:
        scores_B2 = forward(model, texts, pad)[:, 0].view(-1, 2)
    return -logsigmoid(scores_B2[:, 0] - scores_B2[:, 1]) + center * scores_B2.sum(1).square()


@dataclass
class Verified:
    """Pairs that a rule has made of a step's answers, and how many prompts gave none (`masked`)."""

    pairs: list[Pair] = field(default_factory=list)
    made: list[bool] = field(default_factory=list)
    masked: int = 0


@dataclass
class Refresher:
    """Updates of a reward model, from the answers that a policy gave; what they were made of is kept in rows.

    An update is one step of Adam on the mean loss of its pairs: a right answer against a wrong one for each
    prompt that has both, and pairs drawn from `replay`, so that their share is as the options say. Without a
    pair nothing moves. What is drawn depends on seed, update and place only.
    """

    options: Optimise
    learner: Learner
    rule: Rule
    corrupt: Corrupt
    replay: Sequence[EncodedPair] = ()
    pairs: list[Row] = field(default_factory=list)
    updates: list[Row] = field(default_factory=list)

    def update(self, items: Sequence[Item]) -> None:
        """Learn from answers to prompts, those to one prompt in a row."""
        number = len(self.updates)
        found = self._verified(items, number)
        fresh, old = self._encoded(found), list[EncodedPair]()
        made = sum(row["made"] for row in self.pairs[len(self.pairs) - len(fresh) :])
        counts = {"prompts": len(found.pairs) + found.masked, "pairs": len(fresh), "made": made}
        loss = None
        if fresh:
            old = self._replayed(number, len(fresh))
            loss = self.learner.step([*self._parts([*fresh, *old])])
        self.updates.append({"update": number, **counts, "replayed": len(old), "loss": loss})

    def _verified(self, items: Sequence[Item], number: int) -> Verified:
        """A pair of each prompt that has a right answer and a wrong one, or one that can be made wrong."""
        verdicts, found = iter(self.rule(items)), Verified()
        for index, (_, group) in enumerate(groupby(items, lambda item: json.dumps(item[0]))):
            judged = [(prompt, answer, next(verdicts)) for prompt, answer in group]
            draw = Random(f"{self.options.seed} {number} {index}")
            rights = [(prompt, answer) for prompt, answer, verdict in judged if verdict == 1]
            wrongs = [answer for _, answer, verdict in judged if verdict == 0]
            right = draw.choice(rights) if rights else None
            own = bool(wrongs) and self.options.negatives != "made"
            wrong = None if right is None else draw.choice(wrongs) if own else self._made_wrong(*right, draw)
            if right is None or wrong is None:
                found.masked += 1
            else:
                found.pairs.append(Pair(*right, wrong, row=index))
                found.made.append(not own)
        return found

    def _made_wrong(self, prompt: Text, right: Text, draw: Random) -> Text | None:
        """The answer made wrong, by the rule's own word; None if no try is."""
        if self.options.negatives == "answers":
            return None
        for _ in range(self.options.tries):
            text = self.corrupt(prompt, right, draw)
            if text is not None and text != right and self.rule([(prompt, text)])[0] == 0:
                return text
        return None

    def _encoded(self, found: Verified) -> list[EncodedPair]:
        """The pairs as tokens, each also kept in a row; one that the model cannot take is masked."""
        items = [(p.prompt, answer) for p in found.pairs for answer in (p.chosen, p.rejected)]
        texts, usable = encode_all(self.learner.tokenizer, items), []
        for pair, made, right, wrong in zip(found.pairs, found.made, texts[::2], texts[1::2], strict=True):
            if isinstance(right, BadRow) or isinstance(wrong, BadRow):
                continue
            if max(len(right.ids), len(wrong.ids)) > self.options.max_length:
                continue
            usable.append(EncodedPair(right, wrong, pair))
            self.pairs.append({"update": len(self.updates), **pair.plain(), "made": made})
        return usable

    def _replayed(self, number: int, fresh: int) -> list[EncodedPair]:
        """Old pairs, as many as make their share of the update."""
        share = self.options.replay if self.replay else 0.0
        count = min(len(self.replay), round(fresh * share / (1 - share)))
        return Random(f"{self.options.seed} {number} replay").sample(list(self.replay), count)

    def _parts(self, pairs: Sequence[EncodedPair]) -> Iterator[Part]:
        """The mean loss over `pairs`, some at a time."""
        size = max(1, self.options.batch_size // 2)
        for start in range(0, len(pairs), size):
            yield self._part(pairs[start : start + size], len(pairs))

    def _part(self, pairs: Sequence[EncodedPair], count: int) -> Part:
        center, model = self.options.refresh_center, self.learner.model
        return lambda: pair_losses(model, pairs, center).sum() / count


def told(refresher: Refresher, name: str) -> dict[str, Any]:
    """What a refreshed model's run keeps; a warning if no answer was ever verified."""
    if not refresher.pairs:
        log.warning(
            "%s was never refreshed: no prompt had an answer that is right and one that is wrong", name
        )
    return {"pairs": refresher.pairs, "updates": refresher.updates}


def learn_before(
    refresher: Refresher, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]
) -> None:
    """As many updates as a run would have, from answers of the policy as it is: the control of equal budget.

    Each is of as many prompts and answers as a step of the policy; both are drawn from seed and update.
    """
    o = refresher.options
    count = o.batch_size * o.gradient_accumulation // o.answers_per_prompt
    for number in range(o.steps // o.refresh_every):
        draw = np.random.default_rng([o.seed, number])
        chosen = draw.choice(len(prompts), count, replace=count > len(prompts))
        asked = [prompts[n] for n in chosen for _ in range(o.answers_per_prompt)]
        items: list[Item] = []
        for start in range(0, len(asked), o.batch_size):
            part, seed = asked[start : start + o.batch_size], batch_seed(o.seed, number, start)
            answers = sample_answers(policy, tokenizer, part, seed, o.max_new_tokens, o.temperature)
            items += [(p, as_answer(p, text)) for p, text in zip(part, answers.texts, strict=True)]
        refresher.update(items)

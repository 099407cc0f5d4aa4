"""The merged model's loss on preference pairs, split into training and held-out ones; hard negatives.

Shapes: P pairs, L blocks, N weighted members, B pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moemerge.data.pairs import Pair, prompt_key
from moemerge.data.tokenise import EncodedCandidates, EncodedPair
from moemerge.fitting.objectives.base import Term
from moemerge.fitting.problem import Measured, Objective, Split
from moemerge.fitting.splits import fold, prompt_numbers
from moemerge.merging.merged_model import Answers, MergedModel, MergeGradient, batch_tokens, margins
from moemerge.models import processes
from moemerge.models.scoring import score


@dataclass(frozen=True)
class PairObjective:
    """See problem.Objective. `train` and `held_out` are numbers of `pairs`, which `term` knows.

    With several processes each computes its share of every sum; all get the same result.
    """

    merged: MergedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: Sequence[EncodedPair]
    train: Sequence[int]
    held_out: Sequence[int]
    term: Term
    micro_batch_size: int
    candidates: Sequence[EncodedCandidates] = ()

    @property
    def num_train(self) -> int:
        """Number of training pairs."""
        return len(self.train)

    def prompts(self, split: Split) -> list[int]:
        """For each pair of the split a number that pairs of the same prompt share."""
        return prompt_numbers([self.pairs[number] for number in self._numbers(split)])

    def gradient(
        self, alpha_LN: Tensor, shared_L: Tensor, rows: Sequence[int], weights: Tensor | None = None
    ) -> MergeGradient:
        """Mean loss over the training pairs number `rows`, each times its weight, and its gradient."""
        self.merged.merge(alpha_LN, shared_L)
        weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
        mine = processes.share(len(rows))
        numbers = [self.train[rows[index]] for index in mine]
        # Divided by the number of all rows, not of this process's: the sum over processes is the mean then.
        scaled = weights[mine] / len(rows)
        # All pairs in order make the same batches each time; Adam's draws make others, which do not.
        self.merged.serve(self, again=list(rows) == list(range(self.num_train)))
        return self.merged.gradient(self._parts(numbers, scaled), self._idle)

    def measure(self, alpha_LN: Tensor, shared_L: Tensor, split: Split) -> Measured:
        """Margin and loss of every pair of the split."""
        self.merged.merge(alpha_LN, shared_L)
        numbers = self._numbers(split)
        # Of a model in parts all processes run every batch, or share each pass in step: see _measured.
        mine = [*range(len(numbers))] if self.merged.in_parts else processes.share(len(numbers))
        self.merged.serve(self)
        measured = self._measured([numbers[index] for index in mine])
        if self.merged.in_parts:
            return Measured(*measured)
        return Measured(*(processes.gathered(values_P, mine, len(numbers)) for values_P in measured))

    def folds(self, number: int, seed: int) -> list[Objective]:
        """`number` objectives that hold out one part of all pairs each; pairs of one prompt stay together."""
        numbers = [*self.train, *self.held_out]
        parts = fold([self.pairs[n] for n in numbers], number, seed)
        held = [[numbers[index] for index in part] for part in parts]
        return [replace(self, train=_without(numbers, part), held_out=part) for part in held]

    def hardened(self, alpha_LN: Tensor, shared_L: Tensor) -> Objective:
        """The objective with one pair more per candidate set: the best answer against the most overrated one.

        Most overrated is the answer whose score by the model, standardised within the set, lies furthest
        above its standardised gold score. A set gives no pair if that answer is the best one, or if its
        prompt is held out.
        """
        if not self.candidates:
            return self
        self.merged.merge(alpha_LN, shared_L)
        held = {prompt_key(self.pairs[number].pair) for number in self.held_out}
        texts = [answer for candidates in self.candidates for answer in candidates.answers]
        size = batch_tokens(texts, self.micro_batch_size)
        self.merged.serve(self)
        scores = score(self.merged.model, self.tokenizer, texts, size).double()
        sizes = [len(candidates.answers) for candidates in self.candidates]
        negatives = [
            pair
            for candidates, scores_C in zip(self.candidates, scores.split(sizes), strict=True)
            if (pair := overrated(candidates, scores_C)) is not None and prompt_key(pair.pair) not in held
        ]
        # Behind all other pairs: by their numbers a term sees that there are no targets for them.
        numbers = range(len(self.pairs), len(self.pairs) + len(negatives))
        return replace(self, pairs=[*self.pairs, *negatives], train=[*self.train, *numbers])

    def _numbers(self, split: Split) -> Sequence[int]:
        return self.train if split == "train" else self.held_out

    def _parts(self, numbers: list[int], weights: Tensor) -> Iterator[Callable[[], Tensor]]:
        """The weighted sum of losses, a micro-batch at a time, the longest pairs first."""
        # Pairs of like length together, so that little is padding.
        order = sorted(range(len(numbers)), key=lambda index: -self._length(numbers[index]))
        for start in range(0, len(order), self.micro_batch_size):
            batch = order[start : start + self.micro_batch_size]
            yield self._part([numbers[index] for index in batch], weights[batch])

    def _part(self, numbers: list[int], weights_B: Tensor) -> Callable[[], Tensor]:
        """The weighted sum of these pairs' losses, to be computed when it is called for."""

        def loss() -> Tensor:
            answers = self.merged.answers([self.pairs[n] for n in numbers], self.term.states)
            losses_B = self.term.loss(answers, torch.tensor(numbers))
            return (losses_B * weights_B.to(losses_B.device)).sum()

        return loss

    @torch.no_grad()
    def _measured(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Margins and losses of these pairs."""
        if not numbers:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        if self.term.states:
            batches = torch.tensor(numbers).split(self.micro_batch_size)
            parts = [self._with_states(batch.tolist()) for batch in batches]
            margins_P, losses_P = (torch.cat(values) for values in zip(*parts, strict=True))
            return margins_P, losses_P
        # Without states the scorer will do, which packs texts of any pair into batches.
        pairs = [self.pairs[number] for number in numbers]
        alone = not self.merged.in_parts
        margins_P = margins(self.merged.model, self.tokenizer, pairs, self.micro_batch_size, alone)
        return margins_P, self.term.loss(Answers(margins_P), torch.tensor(numbers))

    def _with_states(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        answers = self.merged.answers([self.pairs[n] for n in numbers], states=True)
        return answers.margins_P.cpu(), self.term.loss(answers, torch.tensor(numbers)).cpu()

    def _idle(self) -> Tensor:
        """A loss of 0, of the pair that takes the least work."""
        return self._part([min(self.train, key=self._length)], torch.zeros(1, dtype=torch.float64))()

    def _length(self, number: int) -> int:
        return max(len(self.pairs[number].chosen.ids), len(self.pairs[number].rejected.ids))


def overrated(candidates: EncodedCandidates, scores_C: Tensor) -> EncodedPair | None:
    """The best answer by gold against the most overrated one; None if these are of equal gold or the same."""
    c = candidates.candidates
    gold_C = torch.tensor(c.gold, dtype=torch.float64)
    # Standardised, as the scores have neither the gold's scale nor its zero.
    too_high_C = _standardised(scores_C) - _standardised(gold_C)
    best, worst = int(gold_C.argmax()), int(too_high_C.argmax())
    if gold_C[best] <= gold_C[worst]:
        return None
    pair = Pair(c.prompt, c.texts[best], c.texts[worst], c.subset, row=c.row)
    return EncodedPair(candidates.answers[best], candidates.answers[worst], pair)


def _standardised(values_C: Tensor) -> Tensor:
    return (values_C - values_C.mean()) / values_C.std().clamp(min=1e-12)


def _without(numbers: Sequence[int], part: Sequence[int]) -> list[int]:
    left_out = set(part)
    return [number for number in numbers if number not in left_out]

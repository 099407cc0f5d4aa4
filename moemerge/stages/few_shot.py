"""Stage `few_shot`: a scorer made of a frozen language model and a few labelled pairs (Activation RM).

After arXiv 2507.01368, beside a ridge probe on the same pairs and the language model asked as it is.

P pairs, Q questions (two to a pair: of the chosen answer, then of the rejected one), L layers, H heads, E
numbers of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moemerge.artifacts.json_file import read_object, write_json
from moemerge.artifacts.manifest import model_fingerprint
from moemerge.artifacts.scorer_file import FILE
from moemerge.artifacts.stage import Draft, stage
from moemerge.artifacts.workspace import once, workspace
from moemerge.data.draw import draw
from moemerge.data.pairs import Pair, prompt_key
from moemerge.data.reading import read_pairs
from moemerge.data.rows import BadRow, Row, RowReport
from moemerge.data.tokenise import Encoded, EncodedPair, encode_pairs, texts_of
from moemerge.errors import DataError
from moemerge.evaluation.few_shot_report import ACTIVATION, JUDGE, PROBE, measured, sections, sentence
from moemerge.evaluation.page import row_table
from moemerge.fitting.head_choice import CHOICES
from moemerge.fitting.head_losses import HeadLosses
from moemerge.fitting.ridge import ridge
from moemerge.models.attention_heads import AttentionHeads
from moemerge.models.device import use_device
from moemerge.models.folder import ModelFolder
from moemerge.models.language_model import LanguageModel
from moemerge.models.loading import load_tokenizer
from moemerge.models.scorers.activation import LoadedActivation, activations, write_heads
from moemerge.models.scorers.base import Loaded
from moemerge.models.scorers.questions import Questions, Shot
from moemerge.models.scorers.verdicts import LoadedVerdicts
from moemerge.models.token_limits import check_texts
from moemerge.options.few_shot import FewShot
from moemerge.options.scorers import Question
from moemerge.reports.html import Section, write_report
from moemerge.reports.statistics import Floats

NUMBERS, HEADS = "few_shot.json", "heads.safetensors"
LEARNED = 0.75  # of the examples: means and choice; the others say which of the sets drawn is kept


def _rows(folder: Path) -> list[Row]:
    """Each scorer's accuracy."""
    arms: dict[str, Row] = read_object(folder / NUMBERS)["arms"]
    return [{"scorer": arm, **numbers} for arm, numbers in arms.items()]


@stage("few_shot", FewShot, rows=_rows)
def few_shot(options: FewShot, draft: Draft) -> None:
    """Make a scorer of a language model and a few labelled pairs, and measure it on held-out pairs.

    Some attention heads get their mean activations over the examples; what the model then says of an answer
    is the score. The control, a ridge probe on the same pairs and the same activations, is written beside it.
    Writes scorer.json and heads.safetensors, the same in probe/, few_shot.json, report.html, report.md and
    choice.png; `evaluate` and others take the folder, and probe/, as scorers. The language model is not
    copied. A killed run goes on where it was. Raises OptionError if a verdict is no single token, DataError
    for too few pairs, UnsupportedError for a model whose heads are not known, CheckpointError.
    """
    device = use_device(options)
    folder = ModelFolder(options.model, options.trust_remote_code)
    questions = Questions(load_tokenizer(folder), options)
    examples, held_out = _read(options, questions, draft)
    model = LanguageModel(folder, device)
    heads = AttentionHeads(model.trunk)
    layers, count, size = heads.shape
    draft.reserve(8 * layers * count * (size + 2) + 2**20)
    task = _Task(options, questions, model, heads, examples)
    with workspace(options) as work:
        means_LHE = _numbers(work / "means.json", task.means, heads.shape)
        mask_LH, losses = task.choose(means_LHE, work)
        direction_LHE = _numbers(work / "direction.json", task.direction, heads.shape)
        all_LH = torch.ones_like(mask_LH)
        read = (model, heads, questions.verdicts, options)
        arms: dict[str, Loaded] = {
            ACTIVATION: LoadedActivation(*read, mask_LH, means_LHE),
            PROBE: LoadedActivation(*read, all_LH, direction_LHE, projects=True),
            JUDGE: LoadedVerdicts(model, questions.verdicts, options),
        }
        texts = texts_of(held_out)
        differences: dict[str, Floats] = {
            arm: np.array(once(work / f"scores-{arm}.json", partial(_differences, loaded, texts, options)))
            for arm, loaded in arms.items()
        }
    told = {"examples": len(examples), "held_out": len(held_out), "heads": mask_LH.nonzero().tolist()}
    numbers = {**told, **measured(differences, [item.pair for item in held_out], options)}
    numbers |= {"losses": losses, "question": questions.wording}
    known = model_fingerprint(folder.folder)
    _write_scorer(draft.folder, options, known, "verdict", mask_LH, means_LHE)
    _write_scorer(draft.folder / "probe", options, known, "projection", all_LH, direction_LHE)
    _write_page(options, draft, numbers)


def _read(
    options: FewShot, questions: Questions, draft: Draft
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Examples, and held-out pairs with other prompts."""
    pairs, report = read_pairs(options.pairs, options)
    usable = partial(_usable, questions, options, report)
    drawn = draw(pairs, options.examples, options.seed, usable, report)
    # Rows may be in an order, and the last examples have a task of their own.
    examples = [drawn[place] for place in np.random.default_rng(options.seed).permutation(len(drawn))]
    prompts = {prompt_key(item.pair) for item in examples}
    others, told = (pairs, None) if options.held_out is None else read_pairs(options.held_out, options)
    apart = [pair for pair in others if prompt_key(pair) not in prompts]
    told = told or RowReport(options.pairs, total=len(apart))  # the examples' report has told of broken rows
    usable = partial(_usable, questions, options, told)
    held_out = draw(apart, options.max_held_out, options.seed, usable, told) if apart else []
    if len(examples) < options.examples or len(held_out) < 2:
        raise DataError(
            "too few pairs to learn from and to measure on",
            given=f"{len(examples)} examples, and {len(held_out)} pairs with other prompts",
            expected=f"{options.examples} examples, and 2 held-out pairs at least",
            fix="give more pairs, name others as held_out, or set examples lower",
        )
    draft.results["rows"] = {"examples": report.told(), "held_out": told.told()}
    return examples, held_out


def _usable(
    questions: Questions, options: FewShot, report: RowReport, pairs: Sequence[Pair]
) -> list[EncodedPair]:
    return encode_pairs(questions, pairs, options, report)


@dataclass(frozen=True)
class _Task:
    """What is learned from the examples."""

    options: FewShot
    questions: Questions
    model: LanguageModel
    heads: AttentionHeads
    examples: list[EncodedPair]

    def __post_init__(self) -> None:
        check_texts(self.model.trunk, texts_of(self.examples))

    @property
    def _learned(self) -> int:
        return int(LEARNED * len(self.examples))

    def means(self) -> Tensor:
        """Mean activations after questions with other examples before them, good and bad alike; [L, H, E]."""
        texts = [text for number in range(self._learned) for text in self._with_shots(number)]
        check_texts(self.model.trunk, texts)
        return activations(self.model, self.heads, texts, self.options.batch_tokens).double().mean(0)

    def _with_shots(self, number: int) -> list[Encoded]:
        """The two questions of an example, each behind as many others as max_length has room for."""
        others = [place for place in range(self._learned) if place != number]
        random = np.random.default_rng([self.options.seed, number])
        places = random.permutation(others)[: self.options.shots].tolist()
        shots = [
            self.questions.shot(self.examples[place].pair, (order + number) % 2 == 0)
            for order, place in enumerate(places)
        ]
        return [self._longest(self.examples[number].pair, good, shots) for good in (True, False)]

    def _longest(self, pair: Pair, good: bool, shots: Sequence[Shot]) -> Encoded:
        asked = self.questions.shot(pair, good).question
        tried = [shots[first:] for first in range(len(shots) + 1)]
        for text in self.questions.encode_questions([asked] * len(tried), tried):
            if not isinstance(text, BadRow) and len(text.ids) <= self.options.max_length:
                return text
        raise AssertionError("without others before it, an example has its length")

    def choose(self, means_LHE: Tensor, work: Path) -> tuple[Tensor, list[float]]:
        """The heads to replace, [L, H], the best of some sets on examples kept for that; losses by step."""
        make = CHOICES[self.options.select]
        learn, keep = self._losses(means_LHE, 0, self._learned), self._losses(means_LHE, self._learned, None)
        found = make(learn, self.heads.shape[:2], self.options, self.options.seed, work)
        losses_C = once(work / "candidates.json", lambda: keep.mean(found.masks_CLH).tolist())
        return found.masks_CLH[int(np.argmin(losses_C))], found.losses

    def _losses(self, means_LHE: Tensor, start: int, end: int | None) -> HeadLosses:
        some = self.examples[start:end]
        verdicts, tokens = self.questions.verdicts, self.options.batch_tokens
        good_Q = [True, False] * len(some)
        return HeadLosses(self.model, self.heads, means_LHE, texts_of(some), good_Q, verdicts, tokens)

    def direction(self) -> Tensor:
        """Ridge regression of 1 on what the chosen answer has more of each activation, [L, H, E].

        Activations are in units of their standard deviations; the strength is the one that leaves out best.
        """
        texts = texts_of(self.examples)
        read_QX = activations(self.model, self.heads, texts, self.options.batch_tokens).flatten(1).double()
        sd_X = read_QX.std(0, correction=0)
        scaled_QX = read_QX / torch.where(sd_X > 0, sd_X, torch.ones_like(sd_X))
        x_PX = (scaled_QX[::2] - scaled_QX[1::2]).numpy()
        ones_P = np.ones(len(x_PX))
        weight_X = torch.from_numpy(ridge(x_PX, ones_P[:, None], ones_P).weight_ND[0])
        return (weight_X / torch.where(sd_X > 0, sd_X, torch.ones_like(sd_X))).view(self.heads.shape)


def _numbers(path: Path, make: Any, shape: tuple[int, int, int]) -> Tensor:
    """What `make` gives, made once, in float32."""
    kept = once(path, lambda: make().float().flatten().tolist())
    return torch.tensor(kept, dtype=torch.float32).view(shape)


def _differences(loaded: Loaded, texts: Sequence[Encoded], options: FewShot) -> list[float]:
    """Score of the chosen answer minus that of the rejected one, of each pair."""
    scores_P2 = loaded.score(texts, options.batch_tokens, "held-out pairs").double().view(-1, 2)
    differences_P: list[float] = (scores_P2[:, 0] - scores_P2[:, 1]).tolist()
    return differences_P


def _write_scorer(
    folder: Path, options: FewShot, known: str, read: str, mask_LH: Tensor, values_LHE: Tensor
) -> None:
    folder.mkdir(exist_ok=True)
    path = Path(options.model)
    model = str(path.resolve()) if path.exists() else options.model
    asked = {name: getattr(options, name) for name in Question.model_fields}
    fields = {"kind": "activation", "read": read, "model": model, "fingerprint": known, **asked}
    write_json(folder / FILE, {**fields, "heads": HEADS})
    write_heads(folder / HEADS, mask_LH, values_LHE)


def _write_page(options: FewShot, draft: Draft, numbers: dict[str, Any]) -> None:
    write_json(draft.folder / NUMBERS, numbers)
    data = Section("Data", tables=[row_table(draft.results["rows"])])
    page = [*sections(numbers, options, draft.folder), data]
    write_report(draft.folder, "A scorer from a few pairs", page)
    kept = ("examples", "held_out", "arms", "activation_minus")
    told = {name: numbers[name] for name in kept} | {"heads": len(numbers["heads"])}
    draft.results |= told | {"sentence": sentence(numbers)}

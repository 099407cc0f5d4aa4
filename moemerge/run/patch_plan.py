"""The steps of a patch: attack, train on with what was found, attack again; and its rivals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.options.patch import Patch
from moemerge.run.steps import Step, StepPlan

BEFORE, PATCHED, CONTROL, RANDOM = "before", "patched", "control", "random-edits"
SEEN, UNSEEN = "seen-edits", "unseen-edits"
FOUND, COMPARED, EVALUATION, CARD = "found", "compared", "evaluation", "card"


class Plan(StepPlan):
    """The steps of a patch; `rounds`: how many rounds of training are done."""

    ARMS = (PATCHED, CONTROL, RANDOM)

    def __init__(self, options: Patch, rounds: int = 0) -> None:
        super().__init__(options)
        self.options, self.rounds = options, rounds
        from moemerge.evaluation.attack_edits import KEEP_CONTENT  # imports scipy

        seen = [name for name in KEEP_CONTENT if name not in options.unseen]
        self.edits = {SEEN: seen, UNSEEN: options.unseen}

    @property
    def arms(self) -> list[str]:
        """The models that are trained on, the patched one first."""
        return [*self.ARMS] if self.options.controls else [PATCHED]

    def models(self) -> dict[str, str]:
        """All models that are compared, as they are at the end."""
        trained = self.arms if self.rounds else []
        return {BEFORE: self.options.model} | {arm: self.model_of(arm, self.rounds) for arm in trained}

    def model_of(self, arm: str, after: int) -> str:
        """The model of an arm after so many rounds."""
        return self.path(f"round-{after}", arm) if after else self.options.model

    def first(self) -> Iterator[Step]:
        """Data, and the attacks that say whether there is anything to patch."""
        o = self.options
        tests = {"tests": {"test": o.test}} if o.test else {"test_share": o.test_share}
        yield self.step(
            "data", "data", train=o.pairs, validation_share=0, split_by=o.split_by, fields=o.fields,
            tokenizer=o.model, **tests, **self.format,
        )  # fmt: skip
        yield from self._attacks(BEFORE, self.options.model)

    def found(self, number: int) -> Step:
        """The attack whose finds the patch of this round is made of."""
        return self._attack(f"round-{number}/{FOUND}", self.model_of(PATCHED, number - 1), number=number)

    def round(self, number: int) -> Iterator[Step]:
        """The trainings of a round."""
        home, o = f"round-{number}", self.options
        yield self._train(home, PATCHED, number, FOUND)
        if o.controls:
            # Without patch pairs an epoch is shorter by their share: as many steps all the same.
            yield self._train(home, CONTROL, number, epochs=o.epochs / (1 - o.share))
            model = self.model_of(RANDOM, number - 1)
            yield self._attack(f"{home}/edited", model, number=number, search="random")
            yield self._train(home, RANDOM, number, "edited")

    def last(self) -> Iterator[Step]:
        """The trained models attacked, and compared."""
        o, models = self.options, self.models()
        for arm in self.arms:
            yield from self._attacks(arm, models[arm])
        for edits in self.edits:
            attacks = {name: self.path(edits, name) for name in models}
            yield self.step(
                f"{edits}/{COMPARED}", "robustness", attacks=attacks, confidence=o.confidence,
                resamples=o.resamples,
            )  # fmt: skip
        yield self.step(
            EVALUATION, "evaluate", models=models, pairs={"test": self._test}, probes=["accuracy"],
            confidence=o.confidence, resamples=o.resamples, **self.format,
        )  # fmt: skip
        yield self.step(CARD, "publish", model=models[PATCHED], evaluation=self.path(EVALUATION))

    @property
    def _train_pairs(self) -> str:
        return self.path("data", "train.jsonl.gz")

    @property
    def _test(self) -> str:
        return self.path("data", "tests", "test.jsonl.gz")

    def _attacks(self, name: str, model: str) -> Iterator[Step]:
        """The model on other pairs: with the edits of the patch, and with those that it has not."""
        for edits in self.edits:
            yield self._attack(f"{edits}/{name}", model, pairs=self._test, edits=self.edits[edits])

    def _attack(self, folder: str, model: str, number: int = 0, **fields: Any) -> Step:
        o = self.options
        words = o.words if "insert_word" in fields.get("edits", self.edits[SEEN]) else []
        given = {"pairs": self._train_pairs, "edits": self.edits[SEEN], "patch": "both"} | fields
        return self.step(
            folder, "attack", model=model, **given, max_pairs=o.max_pairs, steps=o.steps, words=words,
            proposals=o.proposals, confidence=o.confidence, resamples=o.resamples, **self.format,
            seed=o.seed + number,
        )  # fmt: skip

    def _train(self, home: str, arm: str, number: int, patch: str = "", **fields: Any) -> Step:
        o = self.options
        more = {"patch": self.path(home, patch, "patch.jsonl")} if patch else {}
        given = {"epochs": o.epochs, "more_pairs": more, "shares": dict.fromkeys(more, o.share)} | fields
        return self.step(
            f"{home}/{arm}", "train", model=self.model_of(arm, number - 1), pairs=self._train_pairs, **given,
            learning_rate=o.learning_rate, batch_size=o.batch_size, train_layers=o.train_layers,
            patience=None, **self.format,
        )  # fmt: skip


def every_step(options: Patch) -> list[Step]:
    """All steps, if every round finds something."""
    plan = Plan(options, options.rounds)
    rounds = range(1, plan.rounds + 1)
    trained = (step for number in rounds for step in (plan.found(number), *plan.round(number)))
    return [*plan.first(), *trained, *plan.last()]

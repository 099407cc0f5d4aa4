"""The steps of a patch: attack, train on with what was found, attack again; and its rivals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.options.decode import DecodeSettings
from moemerge.options.patch import Patch
from moemerge.run.steps import Step, StepPlan

BEFORE, PATCHED, CONTROL, RANDOM, UNGUIDED = "before", "patched", "control", "random-edits", "unguided"
SEEN, UNSEEN, DECODED = "seen-edits", "unseen-edits", "decoded"
# What an attack is made by, in words.
WORDS = {
    UNSEEN: "edits that no patch has",
    SEEN: "the patch's own kinds of edits",
    DECODED: "guided decoding, of which the patch is made",
}
FOUND, COMPARED, EVALUATION, CARD = "found", "compared", "evaluation", "card"


class Plan(StepPlan):
    """The steps of a patch; `rounds`: how many rounds of training are done.

    own: the kind of attack that the patch is made of. attacks: that and another kind, each with its options.
    """

    def __init__(self, options: Patch, rounds: int = 0) -> None:
        super().__init__(options)
        self.options, self.rounds = options, rounds
        from moemerge.evaluation.attack_edits import KEEP_CONTENT  # imports scipy

        decodes = options.search == "decode"
        self.own, self.rival = (DECODED, UNGUIDED) if decodes else (SEEN, RANDOM)
        self.rival_pairs = "written" if decodes else "edited"
        seen = [name for name in KEEP_CONTENT if name not in options.unseen]
        own = self._decoding() if decodes else self._editing(seen)
        self.attacks = {self.own: own, UNSEEN: self._editing(options.unseen)}

    @property
    def arms(self) -> list[str]:
        """The models that are trained on, the patched one first."""
        return [PATCHED, CONTROL, self.rival] if self.options.controls else [PATCHED]

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
            model, folder = self.model_of(self.rival, number - 1), self.rival_pairs
            # One answer each: of several the one that scores highest would be taken, which is guidance, too.
            alone = {"guidance": 0.0, "formula": "balanced", "answers": 1}
            blind = alone if self.own == DECODED else {"search": "random"}
            yield self._attack(f"{home}/{folder}", model, number=number, **blind)
            yield self._train(home, self.rival, number, folder)

    def last(self) -> Iterator[Step]:
        """The trained models attacked, and compared."""
        o, models = self.options, self.models()
        for arm in self.arms:
            yield from self._attacks(arm, models[arm])
        for kind in self.attacks:
            attacks = {name: self.path(kind, name) for name in models}
            yield self.step(
                f"{kind}/{COMPARED}", "robustness", attacks=attacks, confidence=o.confidence,
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
        """The model on other pairs: attacked as for the patch, and by edits that it has not."""
        for kind in self.attacks:
            yield self._attack(f"{kind}/{name}", model, kind, pairs=self._test)

    def _attack(self, folder: str, model: str, kind: str = "", number: int = 0, **fields: Any) -> Step:
        o = self.options
        given = {"pairs": self._train_pairs, **self.attacks[kind or self.own]} | fields
        return self.step(
            folder, "attack", model=model, **given, max_pairs=o.max_pairs, gold_model=o.gold_model,
            gold_function=o.gold_function, confidence=o.confidence, resamples=o.resamples, **self.format,
            seed=o.seed + number,
        )  # fmt: skip

    def _editing(self, edits: list[str]) -> dict[str, Any]:
        o = self.options
        words = o.words if "insert_word" in edits else []
        return {
            "edits": edits, "words": words, "patch": "both", "steps": o.steps, "proposals": o.proposals,
        }  # fmt: skip

    def _decoding(self) -> dict[str, Any]:
        chosen = {name: getattr(self.options, name) for name in DecodeSettings.model_fields}
        return {"search": "decode", **chosen}

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

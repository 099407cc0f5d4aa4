"""The steps of a combination: candidates made without the part they are judged on, and the winner."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moemerge.artifacts.origin import NoStart, common_start
from moemerge.options.base import SCALE_OF_SUM
from moemerge.options.combine import MARK, ROUTED, Combine, with_language_model
from moemerge.run.steps import Step, StepPlan

log = logging.getLogger(__name__)
MODEL, CARD, CHOICE, LOOK = "model", "card", "choice", "look"
ALL, COEFFICIENTS = "all", "coefficients"  # what is made from all pairs; what a fit writes beside its merge


@dataclass(frozen=True)
class Merge:
    """A way to merge the members: how much it takes, what is told of it, what `merge` is called with.

    fits: whether its coefficients are fitted to pairs. needs_base: whether changes from a base are added.
    language_model: what is averaged into the one member, but for its head.
    """

    rank: int
    note: str
    fits: bool = False
    needs_base: bool = False
    language_model: str = ""


MERGES = {
    "uniform": Merge(1, "average of all, equal weights"),
    "sum": Merge(1, "changes from the base added, heads on one scale", needs_base=True),
    "fitted": Merge(2, "weights fitted to the pairs", fits=True),
}
AS_GIVEN, TUNED_MEMBER, TUNED_MERGE = 0, 2, 3
MIXTURE = "mixture"  # the models' MLPs as experts of one MoE, before its gate is fitted


class Plan(StepPlan):
    """The steps of a combination."""

    def __init__(self, options: Combine) -> None:
        super().__init__(options)
        self.options = options
        self.members = dict(options.models)
        self.merges = {n: m for n, m in MERGES.items() if options.base or not m.needs_base}
        if options.language_models:
            self.merges = {
                with_language_model(name): Merge(2, f"{name} averaged into it (DogeRM)", True, False, source)
                for name, source in options.language_models.items()
            }
        tuned = {"all": [*self.members, *self.merges], "merges": [*self.merges], "none": []}
        self.tuned = tuned[options.tune]

    @property
    def parts(self) -> dict[str, str]:
        """The held-out parts by the name that they have in evaluations."""
        folds = range(self.options.folds)
        return {f"part-{k}": self.path("data", "folds", str(k), "held_out.jsonl.gz") for k in folds}

    def ranks(self) -> dict[str, int]:
        """All candidates, with how much each takes."""
        ranks = dict.fromkeys(self.members, AS_GIVEN) | {n: m.rank for n, m in self.merges.items()}
        ranks |= dict.fromkeys(self._routed(), TUNED_MERGE)
        tuned = {name: TUNED_MERGE if name in self.merges else TUNED_MEMBER for name in self.tuned}
        return ranks | {f"{name}-tuned": rank for name, rank in tuned.items()}

    def notes(self) -> dict[str, str]:
        """A few words on each candidate."""
        notes = dict.fromkeys(self.members, "as given") | {n: m.note for n, m in self.merges.items()}
        notes |= dict.fromkeys(self._routed(), "one model's MLPs per prompt, in the average; memory of all")
        notes |= {f"{name}-tuned": f"{name}, trained on the pairs" for name in self.tuned}
        if self.several:
            notes |= {f"{MARK}-mean": f"mean score of {len(self.members)} models, at their cost"}
        return notes

    @property
    def several(self) -> bool:
        """Whether there are members to compare and to put on one scale."""
        return len(self.members) > 1

    def trials(self) -> Iterator[Step]:
        """All steps up to the choice."""
        o = self.options
        first = next(iter(self.members.values()))
        yield self.step(
            "data", "data", train=o.pairs, folds=o.folds, validation_share=0, split_by=o.split_by,
            tokenizer=first, fields=o.fields, **self.format,
        )  # fmt: skip
        if self.several:
            yield self.step(
                "scales", "calibrate", models=self.members, pairs=self._all_pairs(), **self.format
            )
        if o.base:
            yield self.step(
                "changes", "changes", models=self.members, base=o.base, pairs=self._all_pairs(), **self.format
            )
        for name in self._unfitted():
            yield self._merge(name, name)
        for _ in self._routed():
            yield self.step(
                MIXTURE, "upcycle", model=self.path("uniform"), experts=self.members, gate="prompt",
                shared_expert=False, heads="by_expert", calibration=self.path("scales"),
            )  # fmt: skip
        for part in self.parts:
            mark = MARK if self.several else ""
            yield self._scores(f"{part}/members", part, self.members | self._unfitted(), mark)
        if self.several:
            yield self._choice(LOOK, dict.fromkeys(self.members, AS_GIVEN), ["members"])
        for fold, part in enumerate(self.parts):
            yield from self._made_on(part, self.path("data", "folds", str(fold), "train.jsonl.gz"))
        yield self._choice(CHOICE, self.ranks(), ["members", "made"])

    def winner(self, taken: str) -> Iterator[Step]:
        """The steps that make the candidate `taken` from all pairs, and its card."""
        start = taken if taken in self.members else taken.removesuffix("-tuned")
        if start in self._fits():
            yield self._fit(ALL, start, self._all_pairs())
        if taken in self._routed():
            yield self._gate(MODEL, self._all_pairs())
        elif start != taken:
            if start in self._fits():
                yield self._merge(f"{ALL}/{start}", start, ALL)
            yield self._tune(MODEL, self._model_of(start, ALL), self._all_pairs())
        elif taken in self.members and not self.several:
            # One model is no merge; all the weight on it gives it bit for bit.
            yield self._with_language_model(MODEL, next(iter(self.merges)), weights=[1.0, 0.0])
        elif taken in self.members:
            weights = [float(name == taken) for name in self.members]
            yield self.step(MODEL, "merge", models=list(self.members.values()), weights=weights)
        else:
            yield self._merge(MODEL, taken, ALL)
        yield self.step(CARD, "publish", model=self.path(MODEL))

    def _model_of(self, name: str, folder: str) -> str:
        """The member or merge `name`; a fitted one as it was made in `folder`."""
        if name in self.members:
            return self.members[name]
        return self.path(folder, name) if name in self._fits() else self.path(name)

    def _fits(self) -> list[str]:
        """The merges whose coefficients are fitted to pairs."""
        return [name for name, way in self.merges.items() if way.fits]

    def _all_pairs(self) -> str:
        return self.path("data", "train.jsonl.gz")

    def _routed(self) -> list[str]:
        """The candidate that stays a MoE, if it is asked for."""
        return [ROUTED] if self.options.form == "moe" else []

    def _unfitted(self) -> dict[str, str]:
        """The merges that need no pairs, with their folders."""
        return {name: self.path(name) for name, way in self.merges.items() if not way.fits}

    def _merge(self, folder: str, name: str, fitted: str = "") -> Step:
        """The merge `name`; one with fitted coefficients has those in the folder `fitted`."""
        models: dict[str, Any] = {"models": list(self.members.values())}
        coefficients = self.path(fitted, self._coefficients(name))
        if self.merges[name].language_model:
            return self._with_language_model(folder, name, coefficients=coefficients)
        if self.merges[name].fits:
            return self.step(folder, "merge", **models, base=self.options.base, coefficients=coefficients)
        if self.merges[name].needs_base:
            scale = self.options.scale or SCALE_OF_SUM
            models |= {"base": self.options.base, "coordinates": "sum", "scale": scale}
        return self.step(folder, "merge", **models, calibration=self.path("scales"))

    def _coefficients(self, name: str) -> str:
        """Where the coefficients of a fitted merge stand, in the folder of what they were fitted to."""
        return f"{COEFFICIENTS}-{name}" if self.merges[name].language_model else COEFFICIENTS

    def _with_language_model(self, folder: str, name: str, **how: Any) -> Step:
        (member,) = self.members.values()
        models = [self.merges[name].language_model]
        return self.step(folder, "merge", models=models, base=member, scope="body", **how)

    def _fit(self, folder: str, name: str, pairs: str) -> Step:
        o, output = self.options, f"{folder}/{self._coefficients(name)}"
        if source := self.merges[name].language_model:
            (member,) = self.members.values()
            return self.step(
                output, "fit", models=[source], base=member, scope="body", method="grid", pairs=pairs,
                **self.format,
            )  # fmt: skip
        fields: dict[str, Any] = {"models": list(self.members.values()), "pairs": pairs, **self.format}
        if o.base:
            fields |= {"base": o.base, "coordinates": "sum", "scale": o.scale or SCALE_OF_SUM}
        # The choice among candidates is made on pairs that the fit has not seen: it needs no test of its own.
        return self.step(
            output, "fit", **fields, calibration=self.path("scales"), level=1.0, l2=o.l2,
            granularity=o.granularity, max_epochs=o.max_epochs, sensitivity=False,
        )  # fmt: skip

    def _tune(self, folder: str, model: str, pairs: str) -> Step:
        o = self.options
        return self.step(
            folder, "train", model=model, pairs=pairs, epochs=o.epochs, learning_rate=o.learning_rate,
            batch_size=o.batch_size, train_layers=o.train_layers, patience=None, **self.format,
        )  # fmt: skip

    def _gate(self, folder: str, pairs: str) -> Step:
        return self.step(folder, "gate", model=self.path(MIXTURE), pairs=pairs, **self.format)

    def _made(self) -> list[str]:
        """The candidates that are made from pairs."""
        return [*self._fits(), *self._routed(), *(f"{name}-tuned" for name in self.tuned)]

    def _made_on(self, part: str, pairs: str) -> Iterator[Step]:
        """Every candidate that is made from pairs, made from these, and their scores on the part."""
        for name in self._fits():
            yield self._fit(part, name, pairs)
            yield self._merge(f"{part}/{name}", name, part)
        for name in self._routed():
            yield self._gate(f"{part}/{name}", pairs)
        for name in self.tuned:
            yield self._tune(f"{part}/{name}-tuned", self._model_of(name, part), pairs)
        yield self._scores(f"{part}/made", part, {name: self.path(part, name) for name in self._made()})

    def _scores(self, folder: str, part: str, models: dict[str, str], mark: str = "") -> Step:
        fields: dict[str, Any] = {"ensemble_by": ["mean"], "calibration": self.path("scales")}
        fields["ensembles"] = {mark: list(self.members)}
        return self.step(
            folder, "evaluate", models=models, pairs={part: self.parts[part]}, probes=["accuracy"],
            resamples=self.options.resamples, **(fields if mark else {}), **self.format,
        )  # fmt: skip

    def _choice(self, folder: str, ranks: dict[str, int], kinds: list[str]) -> Step:
        o = self.options
        evaluations = [self.path(part, kind) for part in self.parts for kind in kinds]
        return self.step(
            folder, "choose", evaluations=evaluations, pairs=self.parts, ranks=ranks, notes=self.notes(),
            level=o.level, confidence=o.confidence, resamples=o.resamples, **self.format,
        )  # fmt: skip


def with_start(options: Combine) -> Combine:
    """The options with the models' common start as base, if none is given and one is known."""
    if options.base is not None or options.language_models:
        return options
    try:
        start = common_start(list(options.models.values()))
    except NoStart as reason:
        log.warning("combine: no base is given, and none is found: %s. Without one only averages are tried; "
                    "give base, what all were trained from", reason)  # fmt: skip
        return options
    _tell_start(start)
    return options.model_copy(update={"base": str(start)})


@cache
def _tell_start(start: Path) -> None:
    """Once in a process: check and run make their plan several times."""
    log.info("combine: all models were trained from %s, which is the base", start)

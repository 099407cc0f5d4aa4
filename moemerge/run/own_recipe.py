"""A commented recipe for a person's own model and data: what can be found out is filled in, and why is said.

To add a goal: its text in merge_configs/own/, whose ${names} are those of `_values`, and a row in GOALS.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple

from moemerge.artifacts.disk import in_words
from moemerge.data.lengths import Lengths, measure
from moemerge.errors import OptionError, unknown
from moemerge.models.families import family_called
from moemerge.models.folder import ModelFolder
from moemerge.options.train import TrainSettings
from moemerge.options.upcycle import UpcycleSettings
from moemerge.run.templates import folder_of_templates, schema_line, write_new

if TYPE_CHECKING:
    from moemerge.models.sizes import ModelSize
    from moemerge.models.timing import LayerCost

KEPT = 0.95  # share of pairs that max_length is to keep
STEP = 64  # max_length is a multiple of it
OF_MEMORY = 0.8  # what training may take of the memory at hand
HOURS = 2.0  # that training the mixture may take
PAIRS_PER_STEP = 16
FEWEST_STEPS = 16  # that a pass over a person's own few pairs should have
FEW_PROMPTS = 30  # which make wide intervals
VALIDATION, VALIDATION_PROMPTS = 0.1, 3  # share held out, and prompts in it: fitting needs two at least
EVALUATIONS = 4  # of a training, where there is no time for more
FEWEST, MOST_HELD_OUT = 50, 300  # pairs of a set, where training takes too long for all
TRAVEL, RATE = 1e-3, 1e-4  # of a model that is trained on: see _rate
HEAD_TRAVEL, HEAD_RATE = 1e-2, 1e-3  # of one whose head is new
BASE = """base:                                 # puts a reward head on the model and trains it
  <<: *tune                           # as above
  learning_rate: {rate}  # more than above: a new head has a long way to go
"""
QUANTILES = (0.5, 0.9, 0.99)
MANY = 1000  # models
COMMENT = 38  # column in which comments stand
PLAIN = re.compile(r"[\w./~-]+")


class Goal(NamedTuple):
    """fewest, most: how many models it takes; summary: what its recipe does."""

    fewest: int
    most: int
    summary: str


GOALS = {
    "merge": Goal(1, 1, "upcycle a model into a mixture of experts, train it, merge it back"),
    "combine": Goal(2, MANY, "make one model of several"),
    "audit": Goal(1, MANY, "measure how far reward models can be trusted, also under attack"),
    "patch": Goal(1, 1, "attack a reward model, and train it against what is found"),
}


class Fit(NamedTuple):
    """What has room: layers that train and get experts, experts, pairs per step, pairs in all (None: all)."""

    layers: str
    experts: int
    active: int
    batch_size: int
    max_train: int | None


@dataclass(frozen=True)
class Found:
    """What was found out about models and data."""

    models: list[str]
    folder: ModelFolder
    size: ModelSize
    lengths: Lengths
    has_template: bool
    max_length: int
    memory: int
    hours: float
    fit: Fit

    @property
    def is_decoder(self) -> bool:
        """Whether the last token is what is scored."""
        return family_called(self.folder.dense_type).causal


def write_recipe(
    path: str | Path,
    models: str | Path | Sequence[str | Path],
    train: str | Path,
    test: str | Path | None = None,
    goal: str | None = None,
    hours: float = HOURS,
) -> Path:
    """Write a commented recipe for these models and pairs to `path`.

    goal: merge (default), combine (of several models; the default for these), audit (on the test pairs, if
    there are any) or patch. max_length is chosen to keep most pairs; layers, experts and batch size so that
    training has room in the memory at hand; layers, experts and, if need be, pairs so that training the
    mixture takes no more than `hours`, by an estimate.
    Raises OptionError for an existing file and a goal that does not go with what is given (audit and patch
    need a reward head), UnsupportedError for an architecture of no family and models that do not go together,
    DataError and CheckpointError for what cannot be read.
    """
    sources = [str(models)] if isinstance(models, str | Path) else [str(model) for model in models]
    goal = goal or ("combine" if len(sources) > 1 else "merge")
    _check_goal(goal, sources, test)
    if not 0 < hours < math.inf:
        raise OptionError(
            "bad option hours", given=str(hours), expected="a number above 0", fix="correct --hours"
        )
    _check_models(goal, sources)
    found = _find_out(sources, str(test if goal == "audit" and test else train), hours)
    text = (folder_of_templates() / "own" / f"{goal}.yml").read_text(encoding="utf-8")
    values = dict(_values(found, Path(path), None if test is None else str(test)))
    return write_new(path, schema_line() + _laid_out(Template(text).substitute(values)))


def _check_goal(goal: str, models: Sequence[str], test: str | Path | None) -> None:
    if goal not in GOALS:
        raise unknown("goal", goal, GOALS)
    fewest, most, _ = GOALS[goal]
    if not fewest <= len(models) <= most:
        raise OptionError(
            f"goal {goal} takes {'two models or more' if fewest > 1 else 'one model'}",
            given=", ".join(models) or "no model",
            expected="two models or more for combine, one or more for audit, one for merge and patch",
            fix="give --model once for each model that there is, or another goal",
        )
    if test is not None and goal == "combine":
        raise OptionError(
            "combine holds out parts of its own pairs",
            given=f"test {test}",
            expected="no test pairs",
            fix="leave test out; moemerge evaluate measures the model on other pairs afterwards",
        )


def _check_models(goal: str, models: Sequence[str]) -> None:
    """Refuse what `check` would refuse of the recipe: models that do not go together, or have no head."""
    from moemerge.merging.sources.likeness import check_models
    from moemerge.run.faults import headless

    if goal == "combine":
        check_models(models)
    elif goal != "merge":
        for fault in headless({f"model {Path(model).name}": model for model in models}):
            raise fault


def _find_out(models: list[str], train: str, hours: float) -> Found:
    """Opens configs and tokenizer, reads the rows, times one layer."""
    from moemerge.models.device import memory_at_hand, pick_device
    from moemerge.models.loading import load_tokenizer
    from moemerge.models.sizes import ModelSize
    from moemerge.models.timing import time_layer
    from moemerge.models.token_limits import longest_text
    from moemerge.training.arguments import autocasts

    folder = ModelFolder(models[0])
    folder.require_dense()
    family_called(folder.dense_type)
    tokenizer, device = load_tokenizer(folder), pick_device("auto")
    lengths = measure(train, tokenizer)
    size, memory = ModelSize.of(folder.config), memory_at_hand(device)
    wanted = STEP * math.ceil(lengths.quantile(KEPT) / STEP)
    max_length = min(wanted, longest_text(folder.config) or wanted)
    typical = max(8, round(lengths.mean(max_length)))
    cost = time_layer(folder.config, device, typical, autocasts("auto", device))
    fit = _fitting(size, cost, lengths, max_length, memory, hours * 3600)
    has_template = tokenizer.chat_template is not None
    return Found(models, folder, size, lengths, has_template, max_length, memory, hours, fit)


def _fitting(
    size: ModelSize,
    cost: LayerCost | None,
    lengths: Lengths,
    max_length: int,
    memory: int,
    most_seconds: float,
) -> Fit:
    """The largest mixture that has room and can be trained in the time, with as many pairs per step as fit.

    Where none can be trained in the time, the smallest one on as many pairs as can.
    """
    tokens = 2 * lengths.pairs * lengths.mean(max_length)
    best: Fit | None = None
    for layers, experts, active in _mixtures(size.layers):
        moe = size.upcycled(
            UpcycleSettings(layers=layers, num_routed_experts=experts, num_experts_per_tok=active)
        )
        options = TrainSettings(train_layers=layers)
        room = OF_MEMORY * memory - moe.training_memory(options)
        per_pair = 2 * max_length * (cost.kept if cost else 0.0) * moe.backward(options)
        batch = next((b for b in (16, 8, 4, 2, 1) if b * per_pair < room), 1)
        more = moe.backward(options) * (cost.training - cost.forward) if cost else 0.0
        seconds = tokens * (more + moe.passes() * cost.forward) if cost else 0.0
        best = Fit(layers, experts, active, batch, None)
        if room > per_pair * min(batch, 4) and seconds < most_seconds:
            return best
    assert best is not None
    if seconds <= most_seconds:
        return best
    most = max(FEWEST, int(lengths.pairs * most_seconds / seconds) // FEWEST * FEWEST)
    return best._replace(max_train=most if most < lengths.pairs else None)


def _mixtures(count: int) -> Iterator[tuple[str, int, int]]:
    """Layers with experts, routed experts, and those per token: the dearest first."""
    half, quarter = max(1, count // 2), max(1, count // 4)
    yield "all", 7, 5
    yield f"last:{half}", 7, 5
    yield f"last:{half}", 3, 2
    yield f"last:{quarter}", 3, 2


def _values(found: Found, path: Path, test: str | None) -> Iterator[tuple[str, str]]:
    """What stands in a recipe for each name in the templates."""
    names = ", ".join(Path(model).name for model in found.models)
    yield "about", f"{names}, on {found.lengths.pairs:,} pairs of {Path(found.lengths.source).name}."
    yield "output", _value(f"runs/{path.stem}")
    yield from _of_model(found, path)
    yield from _of_data(found, path)
    yield from _of_test(test, path, found.lengths.prompts)
    yield from _of_machine(found)


def _of_model(found: Found, path: Path) -> Iterator[tuple[str, str]]:
    folder, size = found.folder, found.size
    kind = "a decoder" if found.is_decoder else "an encoder"
    yield "model", _source(found.models[0], path)
    yield "models", "\n    ".join(_named(found.models, path))
    yield (
        "architecture",
        (
            f"{folder.dense_type}: {kind} of {size.layers} layers, {size.parameters / 1e6:,.0f}M parameters, "
            f"{'a reward model' if folder.claims_head else 'without a reward head'}"
        ),
    )
    yield "num_layers", str(size.layers)
    yield "base", "" if folder.claims_head else BASE.format(rate=_rate(found, HEAD_TRAVEL, HEAD_RATE))
    yield "learning_rate", _rate(found, TRAVEL, RATE)
    yield "tuning_batch", str(_tuning_batch(found))
    yield "tuning_rate", _rate_of(found, found.lengths.pairs / _tuning_batch(found), TRAVEL, RATE)


def _tuning_batch(found: Found) -> int:
    """Pairs per step of a training on all pairs, however few: so that there are steps enough."""
    sizes = (size for size in (16, 8, 4, 2) if size * FEWEST_STEPS <= found.lengths.pairs)
    return min(next(sizes, 1), found.fit.batch_size)


def _rate(found: Found, travel: float, most: float) -> str:
    """That of a recipe's trainings."""
    return _rate_of(found, (found.fit.max_train or found.lengths.pairs) / PAIRS_PER_STEP, travel, most)


def _rate_of(found: Found, steps: float, travel: float, most: float) -> str:
    """The usual learning rate; in short trainings more, or they would end where they began.

    A step of AdamW moves a weight by the learning rate at most: `travel` is how far all steps together may.
    """
    return f"{max(1e-5 if found.is_decoder else 3e-5, min(most, travel / steps)):.1e}"


def _of_data(found: Found, path: Path) -> Iterator[tuple[str, str]]:
    lengths, out = found.lengths, found.lengths.share_above(found.max_length)
    yield "train", _source(lengths.source, path)
    broken = f", {lengths.broken:,} broken rows" if lengths.broken else ""
    yield "rows", f"{lengths.pairs:,} pairs, {lengths.prompts:,} prompts{broken}"
    yield "text", _text(found)
    yield "max_length", str(found.max_length)
    first, *more = ((f"{share:.0%}", lengths.quantile(share)) for share in QUANTILES)
    known = [f"{first[0]} of the pairs have up to {first[1]} tokens", *(f"{s} up to {n}" for s, n in more)]
    yield "lengths", f"{', '.join(known)}; longer than {found.max_length}, and left out: {out:.1%}"
    yield "bad_rows", "skip" if lengths.broken or out else "refuse"
    held_out = min(0.3, max(VALIDATION, VALIDATION_PROMPTS / lengths.prompts))
    yield "validation", f"validation_share: {held_out:.2g}  # held out for early stopping and fitting"


def _of_test(test: str | None, path: Path, prompts: int) -> Iterator[tuple[str, str]]:
    """The lines of a recipe, and of a section, that name test pairs."""
    if test is None:
        tenth, third = (_few(share * prompts) for share in (0.1, 0.3))
        yield (
            "tests",
            f"test_share: 0.1  # of the pairs, split off by prompt{tenth}; or files: tests: {{name: FILE}}",
        )
        yield (
            "test",
            f"test_share: 0.3  # of the pairs, to measure on{third}; or a file of its own: test: FILE",
        )
        return
    source = _source(test, path)
    yield "tests", f"tests:\n    test: {source}  # name: file, or hub name:split"
    yield "test", f"test: {source}  # other pairs, to measure on"


def _few(prompts: float) -> str:
    """A word on a share of so many prompts, if they are few."""
    count = max(1, round(prompts))
    return f" ({count} prompt{'s' * (count > 1)} or so: raise it)" if count < FEW_PROMPTS else ""


def _of_machine(found: Found) -> Iterator[tuple[str, str]]:
    fit = found.fit
    if fit.max_train:
        hours = f"{found.hours:g} hour{'s' * (found.hours != 1)}"
        why = f"drawn at random: as many as {hours} of training take here (init --hours)"
        caps = [f"max_train: {fit.max_train}  # {why}"]
        # Each evaluation on the validation pairs costs as much as training on a third as many.
        shares = {"validation": fit.max_train // 4, "test": fit.max_train}
        caps += [f"max_{name}: {min(max(n, FEWEST), MOST_HELD_OUT)}" for name, n in shares.items()]
    else:
        caps = ["# max_train: 1000  # draw so many pairs; max_validation and max_test likewise"]
    yield "caps", "\n  ".join(caps)
    steps = math.ceil((fit.max_train or 0) / PAIRS_PER_STEP)
    every = (
        f"eval_steps: {math.ceil(steps / EVALUATIONS)}  # from one evaluation on validation pairs to the next"
    )
    yield "evaluations", every if fit.max_train else ""
    yield "memory", in_words(found.memory)
    all_probes = "accuracy, calibration, biases"
    yield "probes", "accuracy, calibration" if fit.max_train else all_probes
    yield "batch_size", str(fit.batch_size)
    yield "accumulation", str(PAIRS_PER_STEP // fit.batch_size)
    yield "layers", fit.layers
    yield "experts", str(fit.experts)
    yield "active", str(fit.active)


def _text(found: Found) -> str:
    if found.lengths.chats:
        return "chats, read by the model's chat template"
    untold = ", to which the model's chat template is not applied" if found.has_template else ""
    return f"plain text{untold}"


def _named(models: Sequence[str], path: Path) -> Iterator[str]:
    """A line per model, its folder's name before it; numbered where two have one name."""
    names = [Path(model).name for model in models]
    for number, (name, model) in enumerate(zip(names, models, strict=True), 1):
        own = name if names.count(name) == 1 else f"{name}-{number}"
        yield f"{_value(own)}: {_source(model, path)}"


def _source(source: str, recipe: Path) -> str:
    """A file, folder or hub name as it can be found from the recipe's folder, too."""
    there = Path(source).expanduser()
    beside = recipe.parent.resolve() == Path.cwd()
    return _value(str(there if beside or not there.exists() else there.resolve()))


def _value(text: str) -> str:
    """`text` as a value in YAML."""
    return text if PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _laid_out(text: str) -> str:
    """Lines that came out empty are left out, and comments behind values stand in one column."""
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"\n[ \t]+(?=\n)", "", text))
    return "\n".join(map(_aligned, text.split("\n")))


def _aligned(line: str) -> str:
    value, mark, comment = line.partition("  # ")
    if not mark or not value.strip():
        return line
    return f"{value.rstrip():<{COMMENT - 1}} # {comment.strip()}"

"""The scale of reward models: how far apart a model's scores of two answers lie, whichever is better.

A reward has no unit: trained alone, one model says 0.3 where another says 30, and the loudest member of a sum
wins. Divided by its scale, each has score differences of one size. Labels are not used.

Shapes: P pairs, R resamples.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from moemerge.artifacts.json_file import read_object, write_json
from moemerge.artifacts.manifest import model_fingerprint
from moemerge.errors import ArtifactError, CheckpointError, DataError
from moemerge.models.folder import ModelFolder

if TYPE_CHECKING:
    from moemerge.reports.statistics import Floats, Integers  # imports scipy

FILE = "calibration.json"
FORMAT = 1
# The median of |x| for a standard normal x: a scale is a standard deviation where differences are normal.
QUARTILE = NormalDist().inv_cdf(0.75)


@dataclass(frozen=True)
class Scale:
    """A model's scale with its interval, from how many pairs; `fingerprint` is the model's."""

    source: str
    fingerprint: str
    scale: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Calibration:
    """The scales of several models, by name."""

    models: dict[str, Scale]

    def save(self, folder: Path) -> Path:
        """Write calibration.json."""
        models = {name: asdict(scale) for name, scale in self.models.items()}
        write_json(folder / FILE, {"format": FORMAT, "models": models})
        return folder / FILE

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Read what `save` wrote. Raises ArtifactError."""
        path = Path(folder) / FILE
        try:
            values = read_object(path)
            if values.get("format") == FORMAT:
                return cls({name: _scale(record) for name, record in values["models"].items()})
            reason = f"format {values.get('format')!r}"
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise ArtifactError(
            f"the calibration cannot be read: {path}",
            given=reason,
            expected=f"a folder with {FILE}, format {FORMAT}",
            fix="give the folder that moemerge calibrate wrote",
        )

    def scales_of(self, models: Sequence[str]) -> tuple[float, ...]:
        """The scale of each of `models`, known by their weights, whatever their order and paths.

        Raises CheckpointError for a model that was not calibrated.
        """
        known = {scale.fingerprint: scale.scale for scale in self.models.values()}
        mine = {model: model_fingerprint(ModelFolder(model).folder) for model in models}
        missing = [model for model, print_ in mine.items() if print_ not in known]
        if missing:
            raise CheckpointError(
                f"{missing[0]} is not in the calibration",
                given=f"a calibration of {', '.join(self.models)}",
                expected="the scale of every model that is merged, and of these very weights",
                fix="run moemerge calibrate on all of the models",
            )
        return tuple(known[mine[model]] for model in models)


def _scale(record: dict[str, Any]) -> Scale:
    scale = Scale(**record)
    numbers = (scale.scale, scale.low, scale.high)
    if not all(type(number) in (int, float) and 0 < number <= sys.float_info.max for number in numbers):
        raise ValueError(f"scales that are not above 0: {numbers}"[:200])
    if not isinstance(scale.fingerprint, str):
        raise ValueError(f"a fingerprint that is no text: {scale.fingerprint!r}"[:200])
    return scale


def spread(
    differences_P: Floats, prompts_P: Integers, resamples: int, confidence: float, seed: int
) -> Floats:
    """Scale of score differences, and the ends of its interval: [scale, low, high].

    The median of |difference| over 0.6745: the standard deviation if they are normal, and hardly moved by a
    few that are not. Interval: bootstrap over prompts. Raises DataError if the median is 0: more than half of
    the pairs are ties, and such a model has no scale.
    """
    sizes_P = np.abs(differences_P)
    scale = np.median(sizes_P) / QUARTILE
    if not scale > 0:
        raise DataError(
            "the model has no scale",
            given=f"{int((sizes_P == 0).sum())} of {len(sizes_P)} pairs have the same score for both answers",
            expected="score differences, of more than half of the pairs",
            fix="look at the model: it judges almost nothing; or give other texts",
        )
    members = [np.flatnonzero(prompts_P == prompt) for prompt in np.unique(prompts_P)]
    random = np.random.default_rng(seed)
    drawn_R = np.array([_drawn(sizes_P, members, random) for _ in range(resamples)]) / QUARTILE
    low, high = np.quantile(drawn_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return np.array([scale, max(low, np.finfo(float).tiny), high])


def _drawn(sizes_P: Floats, members: list[Integers], random: np.random.Generator) -> float:
    """The median over as many prompts as there are, drawn with replacement."""
    chosen = random.integers(0, len(members), len(members))
    return float(np.median(sizes_P[np.concatenate([members[number] for number in chosen])]))

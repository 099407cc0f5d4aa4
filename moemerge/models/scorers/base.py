"""What a scorer is: it has answers made into tokens, and tokens into scores. The one place to open any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moemerge.artifacts.foreign import refuse_foreign
from moemerge.artifacts.scorer_file import read_scorer, scorer_file
from moemerge.data.tokenise import Encoded
from moemerge.errors import UnsupportedError
from moemerge.models.folder import ModelFolder
from moemerge.options.placement import WHOLE, Placement
from moemerge.options.scorers import SCORERS


class Loaded(Protocol):
    """A scorer in memory. facts: class, parameters, active_parameters, flops_per_token (models.cost)."""

    facts: dict[str, Any]

    def score(
        self, encoded: Sequence[Encoded], batch_tokens: int, progress: str = "", alone: bool = False
    ) -> Tensor:
        """Scores of texts that the scorer's reader made tokens of; all else as models.scoring.score."""


class Scorer(Protocol):
    """A scorer that is opened: what is wrong with it is known, and little of it is in memory."""

    source: str

    def reader(self) -> Any:
        """What makes tokens of prompts and answers for it: a tokenizer, or a data.tokenise.Reader."""

    def load(self, device: torch.device, placement: Placement = WHOLE) -> Loaded:
        """The scorer with its weights."""


def open_scorer(source: str | Path, trust_remote_code: bool = False) -> Scorer:
    """The scorer at `source`: a model folder or hub name is a classifier; else scorer.json or its folder.

    Raises what ModelFolder raises, and for scorer.json CheckpointError and OptionError.
    """
    from moemerge.models.scorers.classifier import Classifier

    file = scorer_file(source)
    if file is None:
        return Classifier(ModelFolder(source, trust_remote_code))
    refuse_foreign(Path(source))
    kind, options = read_scorer(file)
    opened: Scorer = SCORERS.get(kind)(str(source), options, trust_remote_code)
    return opened


def refuse_parts(source: str, placement: Placement) -> None:
    """Raise UnsupportedError unless one device is to hold it whole: only classifiers are loaded otherwise."""
    asked = [name for name in Placement.model_fields if placement.differs(name)]
    if not asked:
        return
    raise UnsupportedError(
        f"{source} cannot be loaded in parts, nor in another precision",
        given=f"{asked[0]} {getattr(placement, asked[0])}, and a scorer that is no classifier",
        expected="a model that one device holds whole, as it is by default",
        fix=f"leave {asked[0]} out",
    )

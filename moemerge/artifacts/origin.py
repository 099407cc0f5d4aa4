"""What models were trained from, by their manifests."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from moemerge.artifacts.checksums import MANIFEST, fingerprint, holds_more
from moemerge.artifacts.foreign import refuse_foreign
from moemerge.artifacts.manifest import holds_manifest, read_manifest
from moemerge.errors import ArtifactError, OptionError
from moemerge.options.base import Members

MOST_ADDED = 100  # files in a start beyond those that were recorded, before it is called another folder


M = TypeVar("M", bound=Members)
log = logging.getLogger(__name__)


class NoStart(Exception):
    """There is no known common start; the reason in words."""


def common_start(models: Sequence[str]) -> Path:
    """The folder that all of `models` were trained from, as train recorded it, if it is still what it was.

    A manifest may be somebody else's: the path in it is used only if it is a folder whose files have the
    recorded checksums. Raises NoStart, whose text says why there is none.
    """
    records = {model: _start(Path(model)) for model in models}
    first, *others = records.items()
    for model, record in others:
        if record["sha256"] != first[1]["sha256"]:
            raise NoStart(f"{first[0]} and {model} were trained from different models")
    path = Path(first[1].get("path", ""))
    if not path.is_absolute() or not path.is_dir():
        raise NoStart(f"{first[1].get('path') or first[1].get('hub')}, their start, is not on this disk")
    if not _is_still(path, first[1]):
        raise NoStart(f"{path}, their start, is not what it was")
    return path


def with_base(options: M) -> M:
    """The options with the models' common start as base, where they ask for a sum of changes without one.

    Raises OptionError, with the reason, if none is known.
    """
    if not options.models or options.coordinates != "sum" or options.base is not None:
        return options
    try:
        start = common_start(options.models)
    except NoStart as reason:
        raise OptionError(
            "coordinates sum needs base, and none is found",
            given=f"no base; {reason}",
            expected="the model that all others were trained from: changes from it are added",
            fix="give base; without one use coordinates average",
        ) from None
    log.info("all models were trained from %s, which is the base", start)
    return options.model_copy(update={"base": str(start)})


def _start(model: Path) -> dict[str, Any]:
    """What `train` recorded of the model that it started from."""
    if not holds_manifest(model):
        raise NoStart(f"{model} has no {MANIFEST} that says what it was trained from")
    try:
        manifest = read_manifest(model)
    except ArtifactError as error:
        raise NoStart(f"the {MANIFEST} of {model} cannot be read: {error.given}") from error
    record = manifest["inputs"].get("model")
    if manifest["stage"] != "train" or not isinstance(record, dict) or "sha256" not in record:
        raise NoStart(f"{model} was made by {manifest['stage']}, not by train")
    return record


def _is_still(path: Path, record: dict[str, Any]) -> bool:
    if holds_more(path, len(record.get("files", {})) + MOST_ADDED):
        return False
    try:
        refuse_foreign(path)
    except ArtifactError:
        return False
    # Read in full: sizes and times in a foreign manifest prove nothing.
    return bool(fingerprint(path)["sha256"] == record["sha256"])

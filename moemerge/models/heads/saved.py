"""What a model's config says of its head, checked: the field `moemerge_head` of config.json.

Imports nothing heavy: a folder is judged by its config alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import read_object
from moemerge.errors import CheckpointError, suggest
from moemerge.models.heads import HEADS, LINEAR

FIELD = "moemerge_head"


@dataclass(frozen=True)
class SavedHead:
    """A head that stock transformers does not have.

    kind: its name among HEADS. width: of its hidden layers, and the number of its factors. dropout: share of
    the last state that training leaves out. noise: whether training draws factors and weights. origin: sha256
    of the weights that it was drawn with; heads of one origin can be averaged.
    """

    kind: str
    width: int
    dropout: float
    noise: bool
    origin: str

    @classmethod
    def read(cls, values: Any) -> SavedHead:
        """As the config has it. CheckpointError for unknown or missing keys, and values without sense."""
        known = {field.name for field in fields(cls)}
        given = values if isinstance(values, dict) else {}
        for name in sorted(given.keys() ^ known):
            wrong = "unknown" if name in given else "missing"
            raise _unreadable(f"{wrong} key {name!r}", suggest(name, known))
        sound = (
            type(given["kind"]) is str
            and given["kind"] in set(HEADS) - {LINEAR}
            and type(given["width"]) is int
            and given["width"] >= 1
            and type(given["dropout"]) in (int, float)
            and 0 <= given["dropout"] < 1
            and type(given["noise"]) is bool
            and type(given["origin"]) is str
        )
        if not sound:
            raise _unreadable(str(values)[:300], "copy the model again whole")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The values as they stand in the config."""
        return asdict(self)

    def __str__(self) -> str:
        """In words: for errors and reports."""
        return f"{self.kind} (width {self.width}{', noise' if self.noise else ''})"


def head_field(config: Any) -> dict[str, Any] | None:
    """The field of a config, of transformers or as JSON; None for a stock head."""
    value = config.get(FIELD) if isinstance(config, dict) else getattr(config, FIELD, None)
    return value  # type: ignore[no-any-return]


def head_result(folder: Path) -> dict[str, Any]:
    """What the manifest of a stage says of the head in the model that it wrote; nothing of a stock one.

    `needs`: the packages without which the model cannot be loaded.
    """
    head = head_field(read_object(folder / "config.json"))
    return {} if head is None else {"head": head, "needs": ", ".join(packages_of(str(head.get("kind"))))}


def packages_of(kind: str) -> list[str]:
    """The packages without which a model under a head of this kind cannot be loaded."""
    return list(filter(None, dict.fromkeys(("moemerge", HEADS.package(kind)))))


def told_head(config: Any) -> str:
    """The head of a config in words."""
    value = head_field(config)
    return f"head {LINEAR}" if value is None else f"head {SavedHead.read(value)}"


def _unreadable(given: str, fix: str) -> CheckpointError:
    known = ", ".join(field.name for field in fields(SavedHead))
    return CheckpointError(
        f"the field {FIELD} of a config cannot be read",
        given=given,
        expected=f"the keys {known}, with a kind among {', '.join(set(HEADS) - {LINEAR})}",
        fix=f"{fix}; or use the moemerge version, and the packages, that wrote it (manifest.json names them)",
    )

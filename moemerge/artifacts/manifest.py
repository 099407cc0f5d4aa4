"""Manifests: read within bounds and in their form, and the chain that each carries of those before it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from moemerge.artifacts.checksums import MANIFEST, fingerprint, sums
from moemerge.artifacts.json_file import MAX_BYTES, read_object
from moemerge.errors import ArtifactError, first_line

SCHEMA = 1
# What values of any kind, where a stage would write others, can raise; files that they name are not there.
NONSENSE = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RecursionError,
    FileNotFoundError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip
CARRIED = ("stage", "options", "inputs", "files", "versions", "started")
MAX_HEAD = 100_000  # bytes of a README.md that are looked at
MAX_LINE = 300  # characters of a line of its head
LICENCE_KEYS = ("license", "license_name", "license_link")
PLAIN = re.compile(r"(['\"]?)([\w.:/+ -]{1,200})\1")

Manifest = dict[str, Any]

log = logging.getLogger(__name__)


class _File(BaseModel):
    size: int
    mtime_ns: int
    sha256: str


class _Input(BaseModel):
    sha256: str
    path: str | None = None
    hub: str | None = None
    files: dict[str, _File] = Field(default_factory=dict)
    license: dict[str, str] = Field(default_factory=dict)


class _Link(BaseModel):
    stage: str
    options: dict[str, Any]
    inputs: dict[str, _Input | dict[str, _Input]]
    files: dict[str, _File]
    versions: dict[str, str]
    started: str
    fresh_head: bool = False


class _Whole(_Link):
    results: dict[str, Any]
    chain: list[_Link] = Field(default_factory=list)


def load_manifest(folder: str | Path) -> Manifest:
    """As read_manifest, but only the value of `schema` is checked."""
    try:
        manifest = read_object(Path(folder) / MANIFEST)
        if manifest["schema"] == SCHEMA:
            return manifest
        given = f"schema {manifest['schema']}"
    except KeyError:
        given = "no schema"
    except (OSError, ValueError) as error:
        given = str(error)
    raise _no_artifact(folder, given)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of an artifact.

    Raises ArtifactError if there is none, it is of another schema, or its values are not what they should be.
    """
    manifest = load_manifest(folder)
    try:
        _Whole.model_validate(manifest)
        json.dumps(manifest, ensure_ascii=False).encode()  # later manifests may carry it in their chain
    except ValidationError as error:
        first = error.errors()[0]
        raise _no_artifact(folder, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]) from None
    except (ValueError, RecursionError) as error:
        raise _no_artifact(folder, str(error)[:200]) from None
    return manifest


def expect_stage(folder: str | Path, *stages: str) -> dict[str, Any]:
    """The manifest of an artifact that one of `stages` wrote; ArtifactError otherwise."""
    manifest = read_manifest(folder)
    if manifest["stage"] not in stages:
        raise ArtifactError(
            f"{folder} comes from another stage",
            given=manifest["stage"],
            expected=" or ".join(stages),
            fix="give the folder that this stage wrote",
        )
    return manifest


@contextmanager
def written_by_stages(what: str, fix: str) -> Iterator[None]:
    """Raise ArtifactError, saying `what` failed, where values that stages should have written make no sense.

    Forms hold the values to their types; whether numbers, names and lists go together is seen in their use.
    """
    try:
        yield
    except NONSENSE as error:
        raise ArtifactError(
            what,
            given=f"{type(error).__name__}: {first_line(error)}",
            expected="manifests, reports and plots as the stages write them",
            fix=fix,
        ) from error


def _no_artifact(folder: str | Path, given: str) -> ArtifactError:
    return ArtifactError(
        f"{folder} is not a moemerge artifact",
        given=given,
        expected=f"a folder with {MANIFEST}, schema {SCHEMA}",
        fix="give the folder that an earlier stage wrote, or run that stage again",
    )


def holds_manifest(folder: Path) -> bool:
    """Whether the folder has a manifest of moemerge, damaged or not: other tools use the file name too."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return b'"stage"' in handle.read(MAX_BYTES)


def own_digest(manifest: Manifest) -> str:
    """sha256 over a manifest's values without its own digest."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def flat_inputs(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """A manifest's inputs by name; those of a mapping under NAME.KEY."""
    flat: dict[str, dict[str, Any]] = {}
    for name, value in manifest["inputs"].items():
        by_key = {"": value} if "sha256" in value else {f".{key}": record for key, record in value.items()}
        flat |= {f"{name}{key}": record for key, record in by_key.items()}
    return flat


def chain_of(inputs: Iterable[dict[str, Any]]) -> list[Manifest]:
    """Stage by stage, each once, how `inputs` (records of fingerprints) were made, by their manifests.

    A manifest carries the chain of what its inputs were made from, so that a path in a manifest need never
    be followed. An input that has changed since its own manifest was written has no chain.
    """
    by_digest: dict[str, Manifest] = {}
    for record in inputs:
        for link in _chain_to(record) if "path" in record else []:
            by_digest.setdefault(own_digest(link), link)
    return list(by_digest.values())


def _chain_to(record: dict[str, Any]) -> list[Manifest]:
    path = Path(record["path"]).resolve()
    root = path if path.is_dir() else path.parent
    home = next((folder for folder in (root, root.parent) if holds_manifest(folder)), None)
    if home is None:
        return []
    with suppress(ArtifactError):
        manifest = read_manifest(home)
        known, within = sums(manifest["files"]), root.relative_to(home)
        held = {str(within / name): digest for name, digest in sums(record["files"]).items()}
        if known.keys() & held.keys():
            if all(known.get(name, digest) == digest for name, digest in held.items()):
                fresh = {"fresh_head": True} if manifest["results"].get("fresh_head") else {}
                return [*manifest.get("chain", []), {key: manifest[key] for key in CARRIED} | fresh]
            log.warning("%s was changed since it was made: where it came from is not carried on", path)
    return []


def stated_licence(folder: Path) -> dict[str, str]:
    """license, license_name and license_link in the head of a folder's README.md, where they are plain."""
    try:
        with (folder / "README.md").open("rb") as handle:
            text = handle.read(MAX_HEAD).decode("utf-8", errors="replace")
    except OSError:
        return {}
    # Line by line: one expression over the whole head takes a time that grows with the cube of its spaces.
    first, *lines = (line.rstrip() for line in text.split("\n"))
    end = next((number for number, line in enumerate(lines) if line.startswith("---")), None)
    if first != "---" or end is None:
        return {}
    stated = dict(filter(None, map(_plain_entry, lines[:end])))
    return stated if "license" in stated else {}


def _plain_entry(line: str) -> tuple[str, str] | None:
    """Key and value of a line of front matter that states a licence in plain words."""
    key, _, value = line.partition(":")
    if key not in LICENCE_KEYS or len(line) > MAX_LINE or value[:1] not in (" ", "\t"):
        return None
    plain = PLAIN.fullmatch(value.strip())
    return (key, plain[2].strip()) if plain else None


def model_fingerprint(folder: str | Path) -> str:
    """sha256 over a model's weights and config.json, whatever else lies in the folder.

    Checksums that the folder's manifest holds are used again for files that have not changed since.
    """
    folder, known = Path(folder), {}
    with suppress(ArtifactError):
        known = read_manifest(folder)["files"]
    parts = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    digests = [fingerprint(path, known)["sha256"] for path in parts if path.is_file()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()

"""Which model and which moemerge something was made with."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from moemerge.artifacts import read_manifest
from moemerge.errors import ArtifactError
from moemerge.fingerprints import fingerprint


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


def package_version() -> str:
    """The installed version of moemerge, or "unknown" when it runs from a source tree."""
    try:
        return metadata.version("moemerge")
    except metadata.PackageNotFoundError:
        return "unknown"

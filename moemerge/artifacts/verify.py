"""Whether an artifact, and what it was made from, is still what its manifest says."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from moemerge.artifacts.checksums import MANIFEST, added, artifact_files, file_digest, holds_more, is_hidden
from moemerge.artifacts.manifest import flat_inputs, holds_manifest, load_manifest, own_digest, read_manifest
from moemerge.artifacts.progress import hidden
from moemerge.artifacts.weight_files import Fault, weight_faults
from moemerge.errors import ArtifactError

__all__ = ["UNCHECKED", "Fault", "Verification", "verify", "verify_folder"]

UNCHECKED = "cannot be checked"  # said of a manifest without a checksum of its own
THREADS = 4
MOST_ADDED = 100_000  # files that an input may hold besides those recorded: each would be listed
SHORT = 12
# What can be raised where a manifest holds values of the wrong kind.
BROKEN = (ArtifactError, KeyError, TypeError, AttributeError, ValueError, OSError)


@dataclass
class Verification:
    """What was looked at, what is wrong with it, and what could not be looked at because it is gone."""

    faults: list[Fault] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


def verify(folder: str | Path, inputs: bool = False) -> Verification:
    """Compare every file of an artifact with its manifest; with `inputs`, also what it was made from.

    Missing, added and changed files (by sha256, read in full), weights whose header cannot be read, and an
    index that disagrees with its shards are faults; so is, as UNCHECKED, an older version's manifest, which
    has no checksum of its own, though its files are compared with it. Hidden files are not looked at. Inputs
    that are artifacts are verified in turn, wherever their paths in the manifest lead; those that are gone,
    or names on the hub, are listed as gone and are no faults. For the folder of a run, its steps are
    verified. Raises ArtifactError if there is no manifest to read.
    """
    root = Path(folder)
    steps = [home for home in sorted(root.glob("*/")) if holds_manifest(home)]
    if holds_manifest(root) or not steps:
        load_manifest(root)
        steps = [root]
    chain = _Chain(root, Verification())
    for home in steps:
        chain.visit(home, inputs)
    return chain.verification


def verify_folder(folder: str | Path) -> list[Fault]:
    """What is wrong with the artifact in `folder`; empty if nothing is. Raises as `verify` does."""
    return verify(folder).faults


@dataclass
class _Chain:
    root: Path
    verification: Verification
    seen: set[Path] = field(default_factory=set)
    digests: dict[Path, str] = field(default_factory=dict)

    def visit(self, folder: Path, inputs: bool) -> None:
        """Check one artifact, and with `inputs` what it was made from; its faults name files below it."""
        if folder.resolve() in self.seen:
            return
        self.seen.add(folder.resolve())
        self.verification.folders.append(folder)
        try:
            manifest = read_manifest(folder)
            faults = list(_folder_faults(folder, manifest, self.digests))
            records = flat_inputs(manifest) if inputs else {}
        except BROKEN as error:
            faults, records = [_broken_manifest(error)], {}
        self._report(fault if folder == self.root else _under(folder, fault) for fault in faults)
        for name, record in records.items():
            try:
                self._input(name, record)
            except BROKEN as error:
                self._report([_under(folder, _broken_manifest(error))])

    def _input(self, name: str, record: dict[str, Any]) -> None:
        named = record.get("path")
        path = Path(named or "")
        if not named or not path.exists():
            self.verification.gone.append(f"{name}: {named or record.get('hub')}")
            return
        if not path.is_absolute() or not (path.is_dir() or path.is_file()):
            # no stage writes such a path; a device, read for its checksum, might never end
            raise ValueError(f"input {name} is at {named[:100]!r}, no file or folder by its whole path")
        if holds_more(path, len(record["files"]) + MOST_ADDED):
            raise ValueError(f"input {name} is at {named[:100]!r}, which holds far more files than it did")
        root = path if path.is_dir() else path.parent
        self._report(_under(root, fault) for fault in _file_faults(path, record["files"], self.digests))
        home = next((p for p in (root, root.parent) if holds_manifest(p)), None)
        if home is not None:
            self.visit(home, inputs=True)

    def _report(self, faults: Iterable[Fault]) -> None:
        """Keep each fault once: a file may be wrong both by its own manifest and as an input."""
        self.verification.faults += [fault for fault in faults if fault not in self.verification.faults]


def _under(folder: Path, fault: Fault) -> Fault:
    return replace(fault, file=str(folder / fault.file))


def _broken_manifest(error: Exception) -> Fault:
    reason = error.given if isinstance(error, ArtifactError) else f"{type(error).__name__}: {error}"
    return Fault(MANIFEST, "cannot be read", "a manifest", reason[:200])


def _folder_faults(folder: Path, manifest: dict[str, Any], digests: dict[Path, str]) -> Iterator[Fault]:
    digest = own_digest(manifest)
    if "sha256" not in manifest:
        yield Fault(MANIFEST, UNCHECKED, "no checksum of its own", "written by an older version")
    elif manifest["sha256"] != digest:
        yield Fault(MANIFEST, "changed", _brief(str(manifest["sha256"])), _brief(digest))
    yield from _file_faults(folder, manifest["files"], digests)
    yield from weight_faults(folder, list(artifact_files(folder)))


def _file_faults(path: Path, recorded: dict[str, Any], digests: dict[Path, str]) -> Iterator[Fault]:
    """How the files at `path` differ from those `recorded`; `digests` are of files read before."""
    present = artifact_files(path)
    for name in sorted(recorded.keys() - present.keys()):
        yield Fault(name, "is missing", f"{recorded[name]['size']} bytes", "no file")
    for name, stray in added(path, recorded).items() if path.is_dir() else ():
        if not is_hidden(name):
            yield Fault(name, "was added", "no file", _kind(stray))
    both = sorted(present.keys() & recorded.keys())
    with ThreadPoolExecutor(THREADS) as pool:  # hashing leaves the interpreter free
        checked = pool.map(lambda name: _changed(name, present[name], recorded[name], digests), both)
        for fault in tqdm(checked, desc="verify", total=len(both), leave=False, disable=hidden()):
            if fault is not None:
                yield fault


def _kind(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISREG(status.st_mode):
        return f"{status.st_size} bytes"
    return "a link" if stat.S_ISLNK(status.st_mode) else "neither file nor folder"


def _changed(name: str, path: Path, record: dict[str, Any], digests: dict[Path, str]) -> Fault | None:
    try:
        size = path.stat().st_size
        if size != record["size"]:
            return Fault(name, "changed", f"{record['size']} bytes", f"{size} bytes")
        digest = digests.get(path) or digests.setdefault(path, file_digest(path))
    except OSError as error:
        return Fault(name, "cannot be read", f"{record['size']} bytes", str(error))
    return (
        None
        if digest == record["sha256"]
        else Fault(name, "changed", *map(_brief, (record["sha256"], digest)))
    )


def _brief(digest: str) -> str:
    return f"sha256 {digest[:SHORT]}"

"""Stage outputs on disk: a folder with a manifest, made beside its place and renamed when whole."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

from moemerge.artifacts.checksums import MANIFEST, fingerprint, sums
from moemerge.artifacts.disk import (
    disk_faults,
    exists,
    flush,
    flush_tree,
    put_in_place,
    recover,
    remove,
    require_space,
)
from moemerge.artifacts.environment import hardware, versions
from moemerge.artifacts.foreign import refuse_foreign
from moemerge.artifacts.lock import hold, lock_of
from moemerge.artifacts.manifest import (
    SCHEMA,
    chain_of,
    flat_inputs,
    holds_manifest,
    own_digest,
    read_manifest,
    stated_licence,
)
from moemerge.artifacts.redaction import redact, redacted
from moemerge.artifacts.weight_files import weight_faults
from moemerge.errors import ArtifactError
from moemerge.options.base import Options, Run, input_fields
from moemerge.options.parse import parse_options

RECIPE_COPY = "recipe.json"  # what a run was started with, in the run's folder
UNCOMPARED = {"output", "overwrite", "threads"}

log = logging.getLogger(__name__)
O = TypeVar("O", bound=Run)  # noqa: E741


@dataclass
class Draft:
    """An artifact in the making: write files into `folder`, put what is worth telling into `results`.

    provenance: what its manifest will say of stage, options and inputs.
    """

    folder: Path
    output: Path
    results: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    needed: int | None = None

    def reserve(self, size: int, there: int = 0) -> None:
        """Before long work: ArtifactError unless the disk has room for `size` bytes less those `there`."""
        self.needed = size
        require_space(self.folder, size - there)

    def disk_faults(self) -> AbstractContextManager[None]:
        """A full or broken disk becomes an ArtifactError."""
        return disk_faults(self.output, self.folder, lambda: self.needed)


@dataclass(frozen=True)
class Stage(Generic[O]):
    """A stage as a callable: `stage(Options(...))` or `stage(output=..., ...)` writes one artifact.

    Returns the artifact's folder. Raises OptionError for bad options, ArtifactError when the output
    exists already, and whatever MoemergeError the stage itself finds.
    """

    name: str
    options: type[O]
    body: Callable[[O, Draft], None]

    def __call__(self, options: O | None = None, /, **fields: Any) -> Path:
        options = options if options is not None else parse_options(self.options, fields)
        with artifact(self.name, options) as draft:
            self.body(options, draft)
        return options.output


def stage(name: str, options: type[O]) -> Callable[[Callable[[O, Draft], None]], Stage[O]]:
    """Turn `body(options, draft)` into a Stage; its docstring stays."""

    def make(body: Callable[[O, Draft], None]) -> Stage[O]:
        made = Stage(name, options, body)
        object.__setattr__(made, "__doc__", body.__doc__)
        return made

    return make


@contextmanager
def artifact(name: str, options: Run) -> Iterator[Draft]:
    """Make one artifact: yields a draft in a temporary folder, seals it with a manifest, renames it.

    The output is locked, what a killed process left of it is cleared away, and inputs must be at the end what
    they were at the start. Of several processes that torchrun started, only the first one's is kept.
    """
    output = options.output
    _refuse_existing(output, options.overwrite)
    _refuse_overlap(options)
    if not leads():
        with tempfile.TemporaryDirectory() as folder:
            yield Draft(Path(folder), output)
        return
    clock = time.perf_counter()
    with disk_faults(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with hold(lock_of(output), output):
            recover(output)
            _refuse_existing(output, options.overwrite)
            draft = Draft(
                Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent)), output
            )
            try:
                with draft.disk_faults():
                    draft.provenance = _beginning(name, options)
                    yield draft
                    _seal(draft, options)
                    put_in_place(draft.folder, output)
            finally:
                remove(draft.folder)
    log.info("%s: wrote %s in %.1f s", name, output, time.perf_counter() - clock)


def leads() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if exists(output) and not overwrite:
        raise ArtifactError(
            "output exists already",
            given=str(output),
            expected="a folder that does not exist yet",
            fix="choose another output, or ask for overwrite",
        )
    if exists(output) and not holds_manifest(output) and not _is_empty(output):
        raise ArtifactError(
            "output exists already and is no earlier result",
            given=f"{output}, without {MANIFEST} of moemerge",
            expected="a folder that does not exist yet, or one that moemerge wrote",
            fix="choose another output, or move away what is there",
        )


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _refuse_overlap(options: Run) -> None:
    """Inputs stay as they are: the output can be neither one of them, nor in one, nor around one."""
    place = options.output.parent.resolve() / options.output.name
    for name, path in _local_inputs(options):
        inside = path.is_dir() and path.resolve() in place.parents
        if inside or place in (path.resolve(), *path.resolve().parents):
            raise ArtifactError(
                "the output would change an input",
                given=f"output {options.output}, {name} {path}",
                expected="an output beside its inputs",
                fix="choose another output",
            )


def _local_inputs(options: Run) -> Iterator[tuple[str, Path]]:
    for name, value in input_fields(options).items():
        several = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        yield from ((name, Path(one)) for one in several if Path(one).exists())


def _beginning(name: str, options: Run) -> dict[str, Any]:
    """What a manifest can tell before the work begins."""
    inputs = {key: _fingerprints(value) for key, value in input_fields(options).items()}
    return {
        "schema": SCHEMA,
        "stage": name,
        "options": plain_options(options),
        "inputs": inputs,
        "chain": chain_of(flat_inputs({"inputs": inputs}).values()),
        "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    }


def plain_options(options: Options) -> dict[str, Any]:
    """Options as JSON values, without secrets."""
    return dict(redacted(json.loads(options.model_dump_json())))


def _seal(draft: Draft, options: Run) -> None:
    """Flush the draft, read it back from the disk, check it, and write the manifest of what was read."""
    manifest = draft.provenance
    flush_tree(draft.folder)
    files = fingerprint(draft.folder)["files"]
    for fault in weight_faults(draft.folder, list(files)):
        raise _damaged(draft, f"{fault.file} {fault.what}: {fault.found}")
    for name, value in input_fields(options).items():
        if _digests(_fingerprints(value, manifest["inputs"][name])) != _digests(manifest["inputs"][name]):
            raise _changed_input(name, value)
    begun = datetime.fromisoformat(manifest["started"])
    seconds = round((datetime.now(timezone.utc) - begun).total_seconds(), 3)
    whole = {
        "results": redacted(draft.results),
        "files": files,
        "versions": versions(),
        "hardware": hardware(),
    }
    manifest = json.loads(json.dumps({**manifest, **whole, "seconds": seconds}, default=str))
    write_json(draft.folder / MANIFEST, manifest | {"sha256": own_digest(manifest)})
    flush(draft.folder / MANIFEST)
    flush(draft.folder)
    if own_digest(read_manifest(draft.folder)) != own_digest(manifest):
        raise _damaged(draft, f"{MANIFEST} does not hold what was written")


def _damaged(draft: Draft, given: str) -> ArtifactError:
    return ArtifactError(
        f"{draft.output} was not written as meant",
        given=given,
        expected="to read back what was written",
        fix="check the disk, then run the same command again; nothing was left that looks complete",
    )


def _changed_input(name: str, value: Any) -> ArtifactError:
    return ArtifactError(
        "an input changed while it was used",
        given=f"{name}: {value}",
        expected="inputs that stay as they are until the stage is done",
        fix="run the same command again once nothing writes there any more",
    )


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, keys in given order, numbers exact."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


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


def why_stale(name: str, options: Run) -> str | None:
    """None if `options.output` already holds what `options` would make, else the reason why not."""
    if not options.output.exists():
        return "not made yet"
    try:
        manifest = expect_stage(options.output, name)
    except ArtifactError as error:
        return error.given
    wanted = plain_options(options)
    changed = [k for k in wanted if k not in UNCOMPARED and wanted[k] != manifest["options"].get(k)]
    if changed:
        return f"changed: {', '.join(changed)}"
    if manifest.get("sha256", own_digest(manifest)) != own_digest(manifest):
        return "its manifest was changed"
    if sums(fingerprint(options.output, manifest["files"])["files"]) != sums(manifest["files"]):
        return "files are missing, were changed or added"
    for key, value in input_fields(options).items():
        known = manifest["inputs"].get(key, {})
        if _digests(_fingerprints(value, known)) != _digests(known):
            return f"changed input: {key}"
    return None


def _fingerprints(value: Any, known: Any = None) -> Any:
    """Fingerprint of one source, or of a mapping or list of sources; a hub name stands for itself."""
    if isinstance(value, list):
        value = {str(place): one for place, one in enumerate(value)}
    if isinstance(value, dict):
        return {k: _fingerprints(v, (known or {}).get(k)) for k, v in value.items()}
    path = Path(value)
    if not path.exists():
        return {"hub": redact(value), "sha256": redact(value)}
    refuse_foreign(path)
    files = (known or {}).get("files")
    if files is None and holds_manifest(path):
        files = read_manifest(path)["files"]
    licence = stated_licence(path)
    return fingerprint(path, files) | ({"license": licence} if licence else {})


def _digests(record: Any) -> Any:
    if "sha256" in record:
        return record["sha256"]
    return {k: _digests(v) for k, v in record.items()}


@contextmanager
def workspace(options: Run) -> Iterator[Path]:
    """A folder for long work that survives a kill: found again by equal options and inputs.

    It is removed when the work ends well; leftovers of other options are removed at the start.
    """
    output = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    given = {k: v for k, v in plain_options(options).items() if k not in UNCOMPARED}
    inputs = {key: _digests(_fingerprints(value)) for key, value in input_fields(options).items()}
    key = hashlib.sha256(json.dumps([given, inputs], sort_keys=True).encode()).hexdigest()[:16]
    folder = output.parent / f".{output.name}.{key}.work"
    work = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{16}}\.work")
    for other in output.parent.iterdir():
        if work.fullmatch(other.name) and other != folder:
            remove(other)
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    except BaseException:
        if not any(path.is_file() for path in folder.rglob("*")):  # nothing that a later run could use
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)

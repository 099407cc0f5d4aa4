"""Stage outputs on disk: a folder with a manifest, made beside its place and renamed when whole."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from moemerge.errors import ArtifactError, Faults, MoemergeError, OptionError, suggest
from moemerge.options import Options, Run, input_fields

SCHEMA = 1
MANIFEST = "manifest.json"
PACKAGES = ("moemerge", "torch", "transformers", "trl", "mergekit", "peft", "safetensors")
UNCOMPARED = {"output", "overwrite", "threads"}

log = logging.getLogger(__name__)
O = TypeVar("O", bound=Run)  # noqa: E741


@dataclass
class Draft:
    """An artifact in the making: write files into `folder`, put what is worth telling into `results`."""

    folder: Path
    results: dict[str, Any] = field(default_factory=dict)


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


def parse_options(kind: type[O] | type[Options], fields: dict[str, Any], where: str = "options") -> Any:
    """Validate `fields` as `kind`; every fault at once, with near names for unknown keys."""
    try:
        return kind(**fields)
    except ValidationError as error:
        faults = [_fault(kind, where, one) for one in error.errors()]
    if len(faults) == 1:
        raise faults[0]
    raise Faults(where, faults)


def _fault(kind: type[Options], where: str, error: Any) -> MoemergeError:
    path = ".".join(str(part) for part in (where, *error["loc"]))
    if error["type"] == "extra_forbidden":
        known = _known_names(kind, error["loc"][:-1])
        return OptionError(
            f"unknown option {path}",
            given=str(error["loc"][-1]),
            expected="an option of this section",
            fix=suggest(str(error["loc"][-1]), known),
        )
    message = error["msg"].removeprefix("Value error, ")
    given = "nothing" if error["type"] == "missing" else repr(error["input"])
    return OptionError(f"bad option {path}", given=given[:200], expected=message, fix=f"correct {path}")


def _known_names(kind: type[Options], path: tuple[str | int, ...]) -> list[str]:
    for part in path:
        annotation = kind.model_fields[str(part)].annotation
        choices = [annotation, *getattr(annotation, "__args__", ())]
        kind = next(c for c in choices if isinstance(c, type) and issubclass(c, Options))
    return list(kind.model_fields)


@contextmanager
def artifact(name: str, options: Run) -> Iterator[Draft]:
    """Make one artifact: yields a draft in a temporary folder, seals it with a manifest, renames it.

    Of several processes that torchrun started, only the first one's is kept.
    """
    output = options.output
    _refuse_existing(output, options.overwrite)
    if not leads():
        with tempfile.TemporaryDirectory() as folder:
            yield Draft(Path(folder))
        return
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    inputs = {key: _fingerprints(value) for key, value in input_fields(options).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = Draft(Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent)))
    try:
        yield draft
        manifest = {
            "schema": SCHEMA,
            "stage": name,
            "options": json.loads(options.model_dump_json()),
            "inputs": inputs,
            "results": draft.results,
            "files": fingerprint(draft.folder)["files"],
            "versions": _versions(),
            "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "system": platform.system()},
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - clock, 3),
        }
        write_json(draft.folder / MANIFEST, manifest)
        _seal(draft.folder, output)
    finally:
        shutil.rmtree(draft.folder, ignore_errors=True)
    log.info("%s: wrote %s in %.1f s", name, output, time.perf_counter() - clock)


def leads() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise ArtifactError(
            "output exists already",
            given=str(output),
            expected="a folder that does not exist yet",
            fix="choose another output, or ask for overwrite",
        )


def _seal(folder: Path, output: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            flush(path)
    folder.chmod(0o755)
    old = None
    if output.exists() or output.is_symlink():
        old = output.with_name(f".{output.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    folder.rename(output)
    if old is not None and old.is_symlink():
        old.unlink()
    elif old is not None:
        shutil.rmtree(old)


def flush(path: Path) -> None:
    """Wait until the file at `path` is on the disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, keys in given order, numbers exact."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def write_whole(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either its old content or all of the new."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value), encoding="utf-8")
    new.replace(path)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an artifact. Raises ArtifactError if there is none or it is of another schema."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] == SCHEMA:
            return dict(manifest)
        given = f"schema {manifest['schema']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        given = str(error)
    raise ArtifactError(
        f"{folder} is not a moemerge artifact",
        given=given,
        expected=f"a folder with {MANIFEST}, schema {SCHEMA}",
        fix="give the folder that an earlier stage wrote, or run that stage again",
    )


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
    wanted = json.loads(options.model_dump_json())
    changed = [k for k in wanted if k not in UNCOMPARED and wanted[k] != manifest["options"].get(k)]
    if changed:
        return f"changed: {', '.join(changed)}"
    if fingerprint(options.output, manifest["files"])["files"].keys() != manifest["files"].keys():
        return "files are missing or were added"
    for key, value in input_fields(options).items():
        known = manifest["inputs"].get(key, {})
        if _digests(_fingerprints(value, known)) != _digests(known):
            return f"changed input: {key}"
    return None


def fingerprint(path: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """sha256 over all files at `path` (a file or folder, without manifests and hidden files).

    A file whose size and mtime equal those in `known` is taken to have the checksum recorded there.
    """
    root = path if path.is_dir() else path.parent
    found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    names = [(str(p.relative_to(root)), p) for p in found]
    kept = [(n, p) for n, p in names if n != MANIFEST and not any(s.startswith(".") for s in Path(n).parts)]
    files = {name: _file_record(p, (known or {}).get(name)) for name, p in kept}
    digest = hashlib.sha256("".join(f"{n}\0{r['sha256']}\n" for n, r in files.items()).encode())
    return {"path": str(path), "sha256": digest.hexdigest(), "files": files}


def _file_record(path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    status = path.stat()
    record = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if known and all(known[k] == record[k] for k in record):
        return known
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return {**record, "sha256": digest.hexdigest()}


def _fingerprints(value: Any, known: Any = None) -> Any:
    """Fingerprint of one source, or of a mapping or list of sources; a hub name stands for itself."""
    if isinstance(value, list):
        value = {str(place): one for place, one in enumerate(value)}
    if isinstance(value, dict):
        return {k: _fingerprints(v, (known or {}).get(k)) for k, v in value.items()}
    path = Path(value)
    if not path.exists():
        return {"hub": value, "sha256": value}
    files = (known or {}).get("files")
    if files is None and (path / MANIFEST).exists():
        files = read_manifest(path)["files"]
    return fingerprint(path, files)


def _digests(record: Any) -> Any:
    if "sha256" in record:
        return record["sha256"]
    return {k: _digests(v) for k, v in record.items()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def workspace(options: Run) -> Iterator[Path]:
    """A folder for long work that survives a kill: found again by equal options and inputs.

    It is removed when the work ends well; leftovers of other options are removed at the start.
    """
    output = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    given = {k: v for k, v in json.loads(options.model_dump_json()).items() if k not in UNCOMPARED}
    inputs = {key: _digests(_fingerprints(value)) for key, value in input_fields(options).items()}
    key = hashlib.sha256(json.dumps([given, inputs], sort_keys=True).encode()).hexdigest()[:16]
    folder = output.parent / f".{output.name}.{key}.work"
    for other in output.parent.glob(f".{output.name}.*.work"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    yield folder
    shutil.rmtree(folder)

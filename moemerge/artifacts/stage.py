"""Stages, and how one writes its output: a folder with a manifest, made beside its place, then renamed."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial, wraps
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from moemerge.artifacts.checksums import MANIFEST, added, fingerprint, is_hidden
from moemerge.artifacts.disk import (
    disk_faults,
    exists,
    flush,
    flush_tree,
    new_draft,
    obey_umask,
    parents,
    put_in_place,
    recover,
    remove,
    require_space,
)
from moemerge.artifacts.environment import hardware, versions
from moemerge.artifacts.inputs import digests, fingerprints, inputs_of, local_inputs, plain_options
from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.lock import hold, lock_of
from moemerge.artifacts.manifest import (
    SCHEMA,
    chain_of,
    flat_inputs,
    holds_manifest,
    own_digest,
    read_manifest,
)
from moemerge.artifacts.memory import memory_faults
from moemerge.artifacts.ranks import leads, led, lost_processes, refuse_several
from moemerge.artifacts.redaction import redacted
from moemerge.artifacts.result import Result, RowsOf, results_of
from moemerge.artifacts.weight_files import weight_faults
from moemerge.errors import ArtifactError, few
from moemerge.options.base import Run
from moemerge.options.signature import parse_call, show_options, signature

RECIPE_COPY = "recipe.json"  # what a run was started with, in the run's folder

log = logging.getLogger(__name__)
O = TypeVar("O", bound=Run)  # noqa: E741


@dataclass
class Draft:
    """An artifact in the making: write files into `folder`, and the numbers to show into `results`.

    provenance: what its manifest will say of stage, options and inputs.
    """

    folder: Path
    output: Path
    results: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    needed: int | None = None
    kept: bool = True  # whether this process is the one whose draft becomes the output

    def reserve(self, size: int, there: int = 0) -> None:
        """Before long work: ArtifactError unless the disk has room for `size` bytes less those `there`."""
        if not self.kept:
            return
        self.needed = size
        require_space(self.folder, size - there)

    def disk_faults(self) -> AbstractContextManager[None]:
        """A full or broken disk becomes an ArtifactError."""
        return disk_faults(self.output, self.folder, lambda: self.needed)


class Stage(Protocol):
    """A stage as a function; `opened` gives the Result of a folder that it wrote before.

    shares_work: whether several processes do it together.
    """

    opened: Callable[[Path], Result]
    shares_work: bool

    def __call__(self, *inputs: Any, **options: Any) -> Result: ...


def stage(
    name: str,
    options: type[O],
    shares_work: bool = False,
    complete: Callable[[O], O] | None = None,
    rows: RowsOf = results_of,
) -> Callable[[Callable[[O, Draft], None]], Stage]:
    """Turn `body(options, draft)` into a stage: `stage(input, output=..., ...)` writes one artifact.

    A stage takes its inputs in the order of `options.POSITIONAL` and every option by name, or ready-made
    options alone. It gives the artifact's folder as a Result, whose table is what `rows` reads from it.
    Raises OptionError for bad options, ArtifactError when the output exists already, and whatever the body
    finds. shares_work: whether several processes, as torchrun starts them, do it together. complete: puts
    into the options what can be found out, before anything is written: the manifest has it.
    """

    def make(body: Callable[[O, Draft], None]) -> Stage:
        @wraps(body)
        def run(*inputs: Any, **fields: Any) -> Result:
            chosen: O = parse_call(options, name, inputs, fields)
            if complete is not None:
                chosen = complete(chosen)
            if not shares_work:
                refuse_several(name)
            with lost_processes(), artifact(name, chosen) as draft:
                body(chosen, draft)
            return made.opened(chosen.output)

        show_options(run, options, signature(options, Result))
        made = cast(Stage, run)
        made.opened, made.shares_work = partial(Result.of, rows=rows), shares_work
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
            yield Draft(Path(folder), output, provenance=_beginning(name, options), kept=False)
        return
    clock = time.perf_counter()
    with memory_faults(output), disk_faults(output), parents(output), hold(lock_of(output), output):
        recover(output)
        _refuse_existing(output, options.overwrite)
        draft = Draft(new_draft(output), output)
        try:
            with draft.disk_faults():
                draft.provenance = _beginning(name, options)
                yield draft
                _seal(draft, options)
                put_in_place(draft.folder, output)
        finally:
            remove(draft.folder)
    log.info("%s: wrote %s in %.1f s", name, output, time.perf_counter() - clock)


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if exists(output) and not overwrite:
        raise ArtifactError(
            "output exists already",
            given=str(output),
            expected="a folder that does not exist yet",
            fix="choose another output, or replace this one: overwrite (--overwrite)",
        )
    if exists(output) and not holds_manifest(output) and not _is_empty(output):
        raise ArtifactError(
            "output exists already and is no earlier result",
            given=f"{output}, without {MANIFEST} of moemerge",
            expected="a folder that does not exist yet, or one that moemerge wrote",
            fix="choose another output, or move away what is there",
        )
    refuse_added(output, hidden=True)


def refuse_added(output: Path, hidden: bool = False) -> None:
    """Raise ArtifactError if a file in `output` was put there by no stage: to replace that would delete it.

    hidden: look at hidden files, too. A manifest that cannot be read does not tell them apart.
    """
    if not holds_manifest(output):
        return
    try:
        recorded = read_manifest(output)["files"]
    except ArtifactError:
        return
    names = [name for name in added(output, recorded) if hidden or not is_hidden(name)]
    if names:
        raise ArtifactError(
            f"{output} holds what no stage put there",
            given=few(names),
            expected="only what the stage wrote, because its folder is replaced as a whole",
            fix="move this out of the folder, or choose another output",
        )


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _refuse_overlap(options: Run) -> None:
    """Inputs stay as they are: the output can be neither one of them, nor in one, nor around one."""
    target = options.output.parent.resolve() / options.output.name
    for name, path in local_inputs(options):
        inside = path.is_dir() and path.resolve() in target.parents
        if inside or target in (path.resolve(), *path.resolve().parents):
            raise ArtifactError(
                "the output would change an input",
                given=f"output {options.output}, {name} {path}",
                expected="an output beside its inputs",
                fix="choose another output",
            )


def _beginning(name: str, options: Run) -> dict[str, Any]:
    """What a manifest holds before the work begins."""
    inputs = led(lambda: {key: fingerprints(value) for key, value in inputs_of(options).items()})
    return {
        "schema": SCHEMA,
        "stage": name,
        "options": plain_options(options),
        "inputs": inputs,
        "chain": chain_of(flat_inputs({"inputs": inputs}).values()),
        "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    }


def _seal(draft: Draft, options: Run) -> None:
    """Flush the draft, read it back from the disk, check it, and write the manifest of what was read."""
    manifest = draft.provenance
    obey_umask(draft.folder)
    flush_tree(draft.folder)
    files = fingerprint(draft.folder)["files"]
    for fault in weight_faults(draft.folder, list(files)):
        raise _damaged(draft, f"{fault.file} {fault.what}: {fault.found}")
    for name, value in inputs_of(options).items():
        if digests(fingerprints(value, manifest["inputs"][name])) != digests(manifest["inputs"][name]):
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

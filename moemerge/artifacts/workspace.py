"""Where a stage keeps long work, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moemerge.artifacts import ranks
from moemerge.artifacts.disk import in_words, size_of, write_whole
from moemerge.artifacts.inputs import deciding_options, digests, fingerprints, inputs_of
from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.manifest import own_digest
from moemerge.options.base import Run

log = logging.getLogger(__name__)


@contextmanager
def workspace(options: Run) -> Iterator[Path]:
    """A folder for long work that survives a kill: found again by equal options and inputs.

    It is removed when the work ends well. What work with other options, or by another number of processes,
    has left is kept, with a warning: that may be days of training. Of several processes the first one makes
    and removes it.
    """
    output = options.output
    inputs = ranks.led(
        lambda: {name: digests(fingerprints(value)) for name, value in inputs_of(options).items()}
    )
    together = [ranks.count()] if ranks.several() else []
    text = json.dumps([deciding_options(options), inputs, *together], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = output.parent / f".{output.name}.{key}.work"
    if not ranks.leads():
        folder.mkdir(exist_ok=True)
        yield folder
        return
    work = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{16}}\.work")
    for other in output.parent.iterdir():
        if work.fullmatch(other.name) and other != folder:
            size = in_words(size_of(other))
            log.warning("%s keeps what work with other options has left (%s): remove it to free", other, size)
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    except BaseException:
        if not any(path.is_file() for path in folder.rglob("*")):  # nothing that a later run could use
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def once(path: Path, make: Callable[[], Any], alone: bool = False) -> Any:
    """What `make` gives, as JSON values: made once, and kept in the file `path` with its checksum.

    Of several processes, which all make it at the same time, the first one keeps it; `alone`: only this one
    makes it, and keeps it.
    What is kept there is trusted with the days that it took, so it has to be the very same: a file that has
    changed is made again.
    """
    if path.exists():
        try:
            kept = read_object(path, sys.maxsize, values=sys.maxsize)
            if kept.get("sha256") == own_digest(kept):
                return kept["value"]
        except (OSError, ValueError):
            pass
        log.warning("%s is not as it was written, and is made again", path)
    value = {"value": json.loads(json.dumps(make()))}
    if alone or ranks.leads():
        write_whole(path, json.dumps(value | {"sha256": own_digest(value)}))
    return value["value"]

"""Where a stage keeps long work, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moemerge.artifacts.disk import remove
from moemerge.artifacts.inputs import deciding_options, digests, fingerprints
from moemerge.options.base import Run, input_fields


@contextmanager
def workspace(options: Run) -> Iterator[Path]:
    """A folder for long work that survives a kill: found again by equal options and inputs.

    It is removed when the work ends well; leftovers of other options are removed at the start.
    """
    output = options.output
    inputs = {name: digests(fingerprints(value)) for name, value in input_fields(options).items()}
    text = json.dumps([deciding_options(options), inputs], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
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

"""What goes into a stage, as a manifest records it: options, and inputs by their checksums."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moemerge.artifacts.checksums import fingerprint
from moemerge.artifacts.foreign import refuse_foreign
from moemerge.artifacts.manifest import holds_manifest, read_manifest, stated_licence
from moemerge.artifacts.redaction import redact, redacted
from moemerge.options.base import Options, Run, input_fields

WITHOUT_EFFECT = {"output", "overwrite", "threads"}


def plain_options(options: Options) -> dict[str, Any]:
    """Options as JSON values, without secrets."""
    return dict(redacted(json.loads(options.model_dump_json())))


def deciding_options(options: Options) -> dict[str, Any]:
    """The options, as JSON values, on which it depends what a stage writes."""
    return {key: value for key, value in plain_options(options).items() if key not in WITHOUT_EFFECT}


def local_inputs(options: Run) -> Iterator[tuple[str, Path]]:
    """Option and path of every input that is a file or folder here."""
    for name, value in input_fields(options).items():
        sources = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        yield from ((name, Path(source)) for source in sources if Path(source).exists())


def fingerprints(value: Any, known: Any = None) -> Any:
    """Fingerprint of one source, or of each in a mapping or list; of a hub name, the name itself.

    `known` are fingerprints taken before: their checksums are used again for files that have not changed.
    """
    if isinstance(value, list):
        value = {str(number): source for number, source in enumerate(value)}
    if isinstance(value, dict):
        return {key: fingerprints(source, (known or {}).get(key)) for key, source in value.items()}
    path = Path(value)
    if not path.exists():
        return {"hub": redact(value), "sha256": redact(value)}
    refuse_foreign(path)
    files = (known or {}).get("files")
    if files is None and holds_manifest(path):
        files = read_manifest(path)["files"]
    licence = stated_licence(path)
    return fingerprint(path, files) | ({"license": licence} if licence else {})


def digests(record: Any) -> Any:
    """Only the checksums of what fingerprints returned, in the same form."""
    if "sha256" in record:
        return record["sha256"]
    return {key: digests(part) for key, part in record.items()}

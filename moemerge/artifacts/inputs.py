"""What goes into a stage, as a manifest records it: options, and inputs by their checksums."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moemerge.artifacts.checksums import fingerprint
from moemerge.artifacts.foreign import refuse_foreign
from moemerge.artifacts.manifest import holds_manifest, read_manifest, stated_licence
from moemerge.artifacts.redaction import redact, redacted
from moemerge.artifacts.scorer_file import read_scorer, scorer_file
from moemerge.options.base import Options, Run, functions, input_fields
from moemerge.options.trainer import deciding_keys

WITHOUT_EFFECT = {"output", "overwrite", "threads", "cache_memory", "report_to"}


def plain_options(options: Options) -> dict[str, Any]:
    """Options as JSON values, without secrets."""
    return dict(redacted(json.loads(options.model_dump_json())))


def deciding_options(options: Options, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    """The options, as JSON values, on which it depends what a stage writes, its inputs left out.

    Inputs are compared by what they hold: the same file under another path is the same input.
    recorded: those of a manifest, to be compared with those of `options`, and given in place of them.
    """
    left_out = WITHOUT_EFFECT | input_fields(options).keys()
    named = functions(options)
    values = plain_options(options) if recorded is None else recorded
    plain = {key: value for key, value in values.items() if key not in left_out}
    if isinstance(plain.get("trainer"), dict):
        plain["trainer"] = deciding_keys(plain["trainer"])
    return {key: function_name(value) if key in named else value for key, value in plain.items()}


def function_name(named: str) -> str:
    """What a function FILE.py:NAME or MODULE:NAME is called in its file or module."""
    return str(named).rpartition(":")[2]


def inputs_of(options: Options) -> dict[str, Any]:
    """All that a stage reads, by name: what input_fields gives, and the files of the user's functions."""
    files = {f"{name}_file": _code_file(function) for name, function in functions(options).items()}
    return input_fields(options) | {name: file for name, file in files.items() if file}


def _code_file(function: Any) -> str | None:
    """The file that holds a function, or the function of that name; None where there is none to be read.

    Nothing is imported: a module of a package is looked for in the package's folder. moemerge's own are known
    by its version.
    """
    if callable(function):
        home = sys.modules.get(function.__module__)
        return None if _is_ours(function.__module__) else getattr(home, "__file__", None)
    home, _, _ = function.rpartition(":")
    if home.endswith(".py"):
        return str(home)
    package, *path = home.split(".")
    if not all(part.isidentifier() for part in (package, *path)) or _is_ours(home):
        return None
    with suppress(ImportError, ValueError):
        spec = find_spec(package)
        if not path:
            return getattr(spec, "origin", None)
        homes = (spec.submodule_search_locations or ()) if spec else ()
        folders = (Path(folder, *path) for folder in homes)
        files = (file for folder in folders for file in (folder.with_suffix(".py"), folder / "__init__.py"))
        return next((str(file) for file in files if file.is_file()), None)
    return None


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "moemerge"


def local_inputs(options: Run) -> Iterator[tuple[str, Path]]:
    """Option and path of every input that is a file or folder here."""
    for name, value in inputs_of(options).items():
        sources = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        yield from ((name, Path(source)) for source in sources if Path(source).exists())


def fingerprints(value: Any, known: Any = None) -> Any:
    """Fingerprint of one source, or of each in a mapping or list; of a hub name, the name itself.

    That of a scorer has in it those of the models that it is made of.
    `known` are fingerprints taken before: their checksums are used again for files that have not changed.
    """
    if isinstance(value, list):
        value = {str(number): source for number, source in enumerate(value)}
    if isinstance(value, dict):
        return {key: fingerprints(source, (known or {}).get(key)) for key, source in value.items()}
    record = _fingerprint(value, known)
    if (file := scorer_file(value)) is None:
        return record
    named = {name: _fingerprint(source) for name, source in input_fields(read_scorer(file)[1]).items()}
    whole = json.dumps([record["sha256"], digests(named)], sort_keys=True)
    return {**record, "sha256": hashlib.sha256(whole.encode()).hexdigest(), "sources": named}


def _fingerprint(value: Any, known: Any = None) -> dict[str, Any]:
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

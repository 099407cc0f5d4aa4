"""Where results come from, as a report's last section: inputs with checksums, settings, versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moemerge.reports.html import Section
from moemerge.reports.table import Table

Manifest = Mapping[str, Any]
DIGITS = 16
NO_SETTINGS = {"output", "overwrite"}


def provenance_section(manifests: Mapping[str, Manifest]) -> Section:
    """Inputs, settings and versions of each step, by its name, from its manifest or a draft's provenance.

    Files and folders appear by name and checksum, without the path to them.
    """
    inputs = [[step, *row] for step, manifest in manifests.items() for row in _inputs(manifest)]
    settings = [[step, *row] for step, manifest in manifests.items() for row in _settings(manifest)]
    note = (
        f"The first {DIGITS} digits of a sha256 over all files of an input; each manifest.json has the rest."
    )
    return Section(
        "Provenance",
        list(_environments(manifests.values())),
        folded=[
            Table("Inputs", ["step", "input", "file or hub name", "checksum"], inputs, note),
            Table("Settings", ["step", "setting", "value"], settings),
        ],
    )


def _inputs(manifest: Manifest) -> Iterator[list[str]]:
    for name, value in manifest["inputs"].items():
        by_key = {"": value} if "sha256" in value else {f" {key}": record for key, record in value.items()}
        for key, record in by_key.items():
            if "hub" in record:
                yield [name + key, record["hub"], ""]
            else:
                yield [name + key, Path(record["path"]).name, record["sha256"][:DIGITS]]


def _settings(manifest: Manifest) -> Iterator[list[str]]:
    left_out = {*manifest["inputs"], *NO_SETTINGS}
    for name, value in dotted({k: v for k, v in manifest["options"].items() if k not in left_out}):
        if value is not None and value not in ({}, []):
            yield [name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]


def dotted(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested options, named as in train.epochs; an empty mapping is a value."""
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _environments(manifests: Iterator[Manifest] | Any) -> Iterator[str]:
    """Versions, machine and days; one sentence per different environment."""
    days: dict[str, set[str]] = {}
    for manifest in manifests:
        versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
        machine = manifest["hardware"]
        text = f"{versions}; {machine['system']} on {machine['machine']}, {machine['cpus']} CPUs"
        days.setdefault(text, set()).add(manifest["started"][:10])
    for text, when in days.items():
        yield f"Made with {text}; {', '.join(sorted(when))}."

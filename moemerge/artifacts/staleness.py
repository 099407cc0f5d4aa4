"""Whether an output still is what its options and inputs would make, so that a run can skip the step."""

from __future__ import annotations

from moemerge.artifacts.checksums import fingerprint, sums
from moemerge.artifacts.inputs import deciding_options, digests, fingerprints
from moemerge.artifacts.manifest import expect_stage, own_digest
from moemerge.errors import ArtifactError
from moemerge.options.base import Run, input_fields


def why_stale(name: str, options: Run) -> str | None:
    """None if `options.output` already holds what `options` would make, else the reason why not."""
    if not options.output.exists():
        return "not made yet"
    try:
        manifest = expect_stage(options.output, name)
    except ArtifactError as error:
        return error.given
    recorded = manifest["options"]
    changed = [key for key, value in deciding_options(options).items() if value != recorded.get(key)]
    if changed:
        return f"changed: {', '.join(changed)}"
    if manifest.get("sha256", own_digest(manifest)) != own_digest(manifest):
        return "its manifest was changed"
    if sums(fingerprint(options.output, manifest["files"])["files"]) != sums(manifest["files"]):
        return "files are missing, were changed or added"
    for key, value in input_fields(options).items():
        known = manifest["inputs"].get(key, {})
        if digests(fingerprints(value, known)) != digests(known):
            return f"changed input: {key}"
    return None

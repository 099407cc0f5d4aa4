"""Whether an output still is what its options and inputs would make, so that a run can skip the step."""

from __future__ import annotations

from moemerge.artifacts.checksums import fingerprint, sums
from moemerge.artifacts.environment import versions
from moemerge.artifacts.inputs import deciding_options, digests, fingerprints, inputs_of
from moemerge.artifacts.manifest import Manifest, expect_stage, own_digest
from moemerge.errors import ArtifactError
from moemerge.options.base import Run

NOT_MADE = "not made yet"


def why_stale(name: str, options: Run) -> str | None:
    """None if `options.output` already holds what `options` would make, else the reason why not."""
    if not options.output.exists():
        return NOT_MADE
    try:
        manifest = expect_stage(options.output, name)
    except ArtifactError as error:
        return error.given
    ours = versions().get("moemerge")
    if manifest["versions"].get("moemerge") != ours:
        return f"made by moemerge {manifest['versions'].get('moemerge')}, and this is {ours}"
    recorded = deciding_options(options, manifest["options"])
    changed = [key for key, value in deciding_options(options).items() if value != recorded.get(key)]
    if changed:
        return f"changed: {', '.join(changed)}"
    if manifest.get("sha256", own_digest(manifest)) != own_digest(manifest):
        return "its manifest was changed"
    if sums(fingerprint(options.output, manifest["files"])["files"]) != sums(manifest["files"]):
        return "files are missing, were changed or added"
    for key, value in inputs_of(options).items():
        known = manifest["inputs"].get(key, {})
        if digests(fingerprints(value, known)) != digests(known):
            return f"changed input: {key}"
    return None


def other_versions(manifest: Manifest) -> list[str]:
    """The packages, moemerge aside, of which other versions made an output than are installed now, in words.

    They make nothing stale: an upgrade would cost days of training, mostly for the same numbers.
    """
    then = manifest["versions"]
    now = versions(then)
    packages = [name for name in then if name != "moemerge" and now.get(name) != then[name]]
    return [f"{name} {then[name]} (now {now.get(name, 'none')})" for name in packages]

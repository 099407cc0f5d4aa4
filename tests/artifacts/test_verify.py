"""verify: what is wrong with an artifact, and with what it was made from, is found and told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moemerge.artifacts import verify as verify_module
from moemerge.artifacts.manifest import own_digest
from moemerge.artifacts.stage import Draft, stage
from moemerge.artifacts.verify import verify, verify_folder
from moemerge.artifacts.weight_files import Fault
from moemerge.errors import ArtifactError
from moemerge.options.base import Run, Source
from moemerge.run import cli

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


class Copy(Run):
    """Options of a stage that writes a tiny checkpoint of two shards."""

    source: Source | None = None


def write_shards(options: Copy, draft: Draft) -> None:
    for number, file in enumerate((ONE, TWO)):
        save_file({f"t{number}": np.full((2, 3), number, dtype=np.float32)}, draft.folder / file)
    index = {"metadata": {"total_size": 48}, "weight_map": {"t0": ONE, "t1": TWO}}
    (draft.folder / INDEX).write_text(json.dumps(index))
    (draft.folder / "config.json").write_text("{}")


copy = stage("copy", Copy)(write_shards)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return copy(output=tmp_path / "made")


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def test_an_untouched_artifact_verifies(made: Path) -> None:
    assert verify_folder(made) == []
    assert verify(made, inputs=True).folders == [made]


DAMAGE: dict[str, tuple[Callable[[Path], object], set[tuple[str, str]]]] = {
    "missing": (lambda f: (f / "config.json").unlink(), {("config.json", "is missing")}),
    "extra": (lambda f: (f / "more.txt").write_text("x"), {("more.txt", "was added")}),
    "added pipe": (lambda f: os.mkfifo(f / "more"), {("more", "was added")}),
    "added link": (lambda f: (f / "more").symlink_to("/dev/zero"), {("more", "was added")}),
    "link to a folder": (lambda f: (f / "more").symlink_to("/"), {("more", "was added")}),
    "a pipe for a file": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        {("config.json", "is missing")},
    ),
    "huge": (lambda f: os.truncate(f / INDEX, 10**12), {(INDEX, "changed"), (INDEX, "cannot be read")}),
    "one bit": (lambda f: flip(f / ONE), {(ONE, "changed")}),
    "truncated": (
        lambda f: (f / ONE).write_bytes((f / ONE).read_bytes()[:-4]),
        {(ONE, "changed"), (ONE, "cannot be read")},
    ),
    "header": (lambda f: flip(f / ONE, 8), {(ONE, "changed"), (ONE, "cannot be read")}),
    "index names no file": (
        lambda f: replace(f / INDEX, TWO, "gone.safetensors"),
        {(INDEX, "changed"), (INDEX, "names a file that is not there")},
    ),
    "index leads outside": (
        lambda f: replace(f / INDEX, TWO, f"../made/{TWO}"),
        {(INDEX, "changed"), (INDEX, "names a file that is not there")},
    ),
    "index disagrees": (
        lambda f: replace(f / INDEX, '"t1"', '"t2"'),
        {(INDEX, "changed"), (INDEX, "disagrees with its shards")},
    ),
    "index is no index": (
        lambda f: (f / INDEX).write_text("[]"),
        {(INDEX, "changed"), (INDEX, "cannot be read")},
    ),
    "manifest": (
        lambda f: replace(f / "manifest.json", '"stage": "copy"', '"stage": "copied"'),
        {("manifest.json", "changed")},
    ),
    "manifest without files": (
        lambda f: replace(f / "manifest.json", '"files"', '"flies"'),
        {("manifest.json", "changed"), ("manifest.json", "cannot be read")},
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_is_found_and_named(made: Path, kind: str) -> None:
    damage, expected = DAMAGE[kind]
    damage(made)
    faults = verify_folder(made)
    assert {(fault.file, fault.what) for fault in faults} >= expected - {("manifest.json", "changed")}
    assert {(fault.file, fault.what) for fault in faults} <= expected and faults
    assert all(fault.recorded and fault.found for fault in faults)


def test_a_folder_without_manifest_cannot_be_verified(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match="not a moemerge artifact"):
            verify_folder(folder)


def test_the_chain_of_inputs_is_verified_where_it_still_exists(made: Path, tmp_path: Path) -> None:
    second = copy(source=str(made), output=tmp_path / "second")
    third = copy(source=str(second), output=tmp_path / "third")
    assert verify(third, inputs=True).folders == [third, second, made]
    flip(made / TWO)
    assert verify_folder(third) == [] and verify(third).folders == [third]
    wrong = {fault.file for fault in verify(third, inputs=True).faults}
    assert wrong == {str(made / TWO)}
    (made / ONE).unlink()
    (made / TWO).unlink()
    found = verify(third, inputs=True)
    assert (
        Fault(str(made / ONE), "is missing", f"{(second / ONE).stat().st_size} bytes", "no file")
        in found.faults
    )


def test_the_folder_of_a_run_stands_for_its_steps(made: Path, tmp_path: Path) -> None:
    copy(output=tmp_path / "other")
    (tmp_path / "no-artifact").mkdir()
    assert verify(tmp_path).folders == [made, tmp_path / "other"] and verify_folder(tmp_path) == []
    (made / ONE).write_bytes(b"")
    assert {fault.file for fault in verify_folder(tmp_path)} == {str(made / ONE)}


@pytest.mark.parametrize("step", [23, pytest.param(7, marks=pytest.mark.slow)])
def test_a_manifest_with_any_bit_flipped_is_a_fault(step: int, made: Path, tmp_path: Path) -> None:
    """Whatever it says then: told as a fault, or as no manifest at all; never a crash, never nothing."""
    second = copy(source=str(made), output=tmp_path / "second")
    path = second / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), step):
        flip(path, place)
        try:
            found = verify(second, inputs=True).faults
        except ArtifactError:
            continue
        finally:
            path.write_bytes(whole)
        assert found, place


def test_a_manifest_of_an_older_version_cannot_be_checked_and_its_files_are(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = copy(source=str(made), output=tmp_path / "second")
    manifest = json.loads((made / "manifest.json").read_text())
    for key in ("sha256", "chain"):
        del manifest[key]
    (made / "manifest.json").write_text(json.dumps(manifest))
    (fault,) = verify_folder(made)
    assert (fault.file, fault.what) == ("manifest.json", "cannot be checked")
    code, out, _ = command(capsys, second, "--inputs")
    assert code == 1 and "2 folder(s) verified: no fault(s)\n" in out
    assert "1 manifest(s) cannot be checked: an older version" in out and "--overwrite" in out
    flip(made / ONE)
    assert {one.what for one in verify_folder(made)} == {"cannot be checked", "changed"}
    assert "1 folder(s) verified: 1 fault(s)\n" in command(capsys, made)[1]


def test_inputs_that_are_gone_are_told_and_no_fault(made: Path, tmp_path: Path) -> None:
    second = copy(source=str(made), output=tmp_path / "second")
    third = copy(source="owner/name", output=tmp_path / "third")
    made.rename(tmp_path / "moved")
    found = verify(second, inputs=True)
    assert found.faults == [] and found.gone == [f"source: {made}"]
    assert verify(third, inputs=True).gone == ["source: owner/name"]


@pytest.mark.parametrize("named", ["/dev/zero", "..", ".", "made", "{root}/pipe"])
def test_an_input_that_is_no_file_by_its_whole_path_is_a_fault(
    named: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is read for its checksum might never end; no stage writes such a path."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    second = copy(source=str(made), output=tmp_path / "second")
    manifest = json.loads((second / "manifest.json").read_text())
    source = manifest["inputs"]["source"] | {"path": named.format(root=tmp_path)}
    source["files"] = {
        "zero": {"size": 0, "mtime_ns": 0, "sha256": "0"},
        "pipe": {"size": 0, "mtime_ns": 0, "sha256": "0"},
    }
    manifest["inputs"]["source"] = source
    (second / "manifest.json").write_text(json.dumps(manifest | {"sha256": own_digest(manifest)}))
    (fault,) = verify(second, inputs=True).faults
    assert "no file or folder by its whole path" in fault.found


def test_an_input_that_is_a_whole_disk_is_not_listed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = copy(source=str(made), output=tmp_path / "second")
    for number in range(4):
        (made / f"more-{number}").touch()
    assert len(verify(second, inputs=True).faults) == 4
    monkeypatch.setattr(verify_module, "MOST_ADDED", 3)
    (fault,) = verify(second, inputs=True).faults
    assert "far more files" in fault.found


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()  # what earlier steps logged
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", "--quiet", *map(str, arguments)])
    return (int(caught.value.code or 0), *capsys.readouterr())


def test_the_command_ends_with_0_1_or_2_and_a_table_of_what_is_wrong(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = copy(source=str(made), output=tmp_path / "second")
    assert command(capsys, second) == (0, "1 folder(s) verified: no fault(s)\n", "")
    assert command(capsys, second, "--inputs")[:2] == (0, "2 folder(s) verified: no fault(s)\n")
    (made / "config.json").unlink()
    assert command(capsys, second)[0] == 0
    code, out, _ = command(capsys, second, "--inputs")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[:-1]]
    assert code == 1 and rows[0] == ["file", "what", "in the manifest", "found"]
    assert rows[2:] == [[str(made / "config.json"), "is missing", "2 bytes", "no file"]]
    (tmp_path / "nothing").mkdir()
    code, out, err = command(capsys, tmp_path / "nothing")
    assert (code, out) == (2, "") and err.count("to fix:") == 1

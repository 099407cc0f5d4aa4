"""What is promised of outputs: whole or not there, old kept until new, locked, checked, and told when not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moemerge.artifacts import checksums, disk
from moemerge.artifacts import stage as artifacts
from moemerge.artifacts.checksums import fingerprint
from moemerge.artifacts.inputs import inputs_of
from moemerge.artifacts.lock import hold, lock_of
from moemerge.artifacts.manifest import read_manifest
from moemerge.artifacts.stage import Draft, stage
from moemerge.artifacts.staleness import why_stale
from moemerge.artifacts.verify import verify_folder
from moemerge.artifacts.workspace import workspace
from moemerge.errors import ArtifactError, OptionError
from moemerge.options.base import Run, Source
from moemerge.options.gold import GoldSource
from moemerge.run import signals as stopping
from moemerge.run.signals import Stopped, stoppable

ROOT = Path(__file__).parent.parent.parent
PATHS = os.pathsep.join(sys.path)  # what a child needs to import this file and its helpers
# Child processes import this file without torch: what imports it stands in the tests.


class Write(Run):
    """Options of a stage that writes one file."""

    source: Source | None = None
    text: str = "new"


def body(options: Write, draft: Draft) -> None:
    (draft.folder / "text").write_text(options.text)
    HOOK(draft)


def nothing(draft: Draft) -> None:
    pass


HOOK: Callable[[Draft], object] = nothing
write = stage("write", Write)(body)


class Grade(GoldSource, Run):
    """Options of a stage that calls a function of the user's."""


grade = stage("grade", Grade)(lambda options, draft: None)


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Draft], object]], None]:
    """Have something happen while the stage writes."""
    return lambda hook: monkeypatch.setattr(sys.modules[__name__], "HOOK", hook)


def text(folder: Path) -> str:
    return (folder / "text").read_text()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# Killed: a child process dies at once, with nothing cleared away

CHILD = """
import os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
import test_safe_writes as t
from pathlib import Path
from moemerge.artifacts import disk
from moemerge.artifacts import stage as artifacts

output, place = Path(sys.argv[2]), sys.argv[3]
die = lambda *_: os._exit(9)
def then_die(function):
    def both(*given):
        function(*given)
        os._exit(9)
    return both
if place == "body":
    t.HOOK = die
elif place == "sealed":
    artifacts.put_in_place = die
elif place == "between renames":
    disk._exchange = lambda *_: False
    rename = Path.rename
    Path.rename = lambda path, target: then_die(rename)(path, target)
elif place == "exchanged":
    disk._exchange = then_die(disk._exchange)
elif place == "renamed":
    Path.rename = then_die(Path.rename)
elif place == "in the lock":
    artifacts.recover = die
t.write(output=output, text="newer", overwrite=True)
"""


def killed(output: Path, place: str) -> None:
    given = [sys.executable, "-c", CHILD, PATHS, str(output), place]
    assert subprocess.run(given, cwd=ROOT, timeout=600).returncode == 9


@pytest.mark.parametrize(
    ("place", "left"),
    [
        ("in the lock", "old"),
        ("body", "old"),
        ("sealed", "old"),
        ("exchanged", "newer"),
        ("between renames", None),
    ],
)
def test_a_kill_leaves_the_old_or_the_new_output_whole_and_the_next_start_clears_up(
    tmp_path: Path, place: str, left: str | None
) -> None:
    out = write(output=tmp_path / "out", text="old")
    killed(out, place)
    if left is None:
        assert not out.exists(), "only where the system cannot exchange two names at once"
        disk.recover(out)
        left = "old"
    assert text(out) == left and verify_folder(out) == []
    write(output=out, text="last", overwrite=True)
    assert text(out) == "last" and verify_folder(out) == [] and hidden(tmp_path) == []


@pytest.mark.parametrize(("place", "made"), [("body", False), ("sealed", False), ("renamed", True)])
def test_a_kill_leaves_a_new_output_whole_or_not_there(tmp_path: Path, place: str, made: bool) -> None:
    killed(tmp_path / "out", place)
    assert (tmp_path / "out").exists() == made
    assert not made or verify_folder(tmp_path / "out") == []
    write(output=tmp_path / "out", overwrite=made)
    assert hidden(tmp_path) == []


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    killed(tmp_path / "out", "body")
    assert lock_of(tmp_path / "out").exists()
    assert text(write(output=tmp_path / "out")) == "new"


def test_clearing_up_spares_other_outputs(tmp_path: Path) -> None:
    """`out` and `out.v2` may be made side by side: neither takes the other's draft for its own leftover."""
    others = [
        ".out.v2.abcdefgh.tmp",
        ".out.v2.old.tmp",
        ".out.v2.0123456789abcdef.work",
        ".outer.abcdefgh.tmp",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.abcdefgh.tmp").mkdir()
    with workspace(Write(output=tmp_path / "out")):
        pass
    write(output=tmp_path / "out")
    assert hidden(tmp_path) == sorted(others)


# Existing outputs


def test_an_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    out = write(output=tmp_path / "out", text="old")
    with pytest.raises(ArtifactError, match="exists already"):
        write(output=out)
    assert text(out) == "old"


def test_overwrite_keeps_the_old_output_until_the_new_one_is_whole(tmp_path: Path, during: Any) -> None:
    out, seen = write(output=tmp_path / "out", text="old"), []
    during(lambda draft: seen.append(text(out)))
    write(output=out, overwrite=True)
    assert seen == ["old"] and text(out) == "new"

    def fail(draft: Draft) -> None:
        raise RuntimeError

    during(fail)
    with pytest.raises(RuntimeError):
        write(output=out, text="newer", overwrite=True)
    assert text(out) == "new" and verify_folder(out) == [] and hidden(tmp_path) == []


def test_overwrite_exchanges_without_a_moment_in_between(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.write_text("x")
    assert disk._exchange(one, other)
    assert one.is_file() and other.is_dir()
    assert not disk._exchange(one, tmp_path / "gone")


def test_overwrite_replaces_results_only(tmp_path: Path) -> None:
    """Somebody's folder of photographs is not replaced, whatever was asked for."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_text("x")
    with pytest.raises(ArtifactError, match="no earlier result"):
        write(output=tmp_path / "photos", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert text(write(output=tmp_path / "empty", overwrite=True)) == "new"


@pytest.mark.parametrize("fails", [True, False])
def test_folders_around_an_output_are_left_only_with_it(tmp_path: Path, during: Any, fails: bool) -> None:
    def fail(draft: Draft) -> None:
        raise RuntimeError

    (tmp_path / "mine").mkdir()
    during(fail if fails else nothing)
    with suppress(RuntimeError):
        write(output=tmp_path / "mine/new/newer/out")
    there = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if path.is_dir()]
    assert there == (["mine"] if fails else ["mine", "mine/new", "mine/new/newer", "mine/new/newer/out"])


# Inputs


@pytest.mark.parametrize("output", ["in", "in/deeper", "."])
def test_an_output_that_would_change_an_input_is_refused(tmp_path: Path, output: str) -> None:
    made = write(output=tmp_path / "in")
    before = fingerprint(made)
    (tmp_path / "manifest.json").write_text('{"stage": 1}')
    with pytest.raises(ArtifactError, match="would change an input"):
        write(source=str(made), output=tmp_path / output, overwrite=True)
    assert fingerprint(made) == before


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path, during: Any) -> None:
    (tmp_path / "pairs").write_text("1")
    during(lambda draft: (tmp_path / "pairs").write_text("2"))
    with pytest.raises(ArtifactError, match="input changed"):
        write(source=str(tmp_path / "pairs"), output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


def test_inputs_trusted_by_size_and_time_are_recorded_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large files, that is: small ones are read anyway."""
    monkeypatch.setattr(checksums, "SMALL", -1)
    made = write(output=tmp_path / "in")
    (tmp_path / "plain").write_text("x")
    for source, how in ((made, "same size and time of change"), (tmp_path / "plain", "read in full")):
        out = write(source=str(source), output=tmp_path / f"from-{source.name}")
        (record,) = read_manifest(out)["inputs"]["source"]["files"].values()
        assert record["checked"].startswith(how)
    assert read_manifest(made)["files"]["text"]["checked"] == "read in full"


def test_small_inputs_are_read_again(tmp_path: Path) -> None:
    made = write(output=tmp_path / "in")
    out = write(source=made, output=tmp_path / "out")
    (record,) = read_manifest(out)["inputs"]["source"]["files"].values()
    assert record["checked"] == "read in full"


def test_a_function_is_an_input_and_its_name_an_option(tmp_path: Path) -> None:
    (tmp_path / "gold.py").write_text("def one(prompt, answer): return 1")
    named = {"gold_function": f"{tmp_path}/gold.py:one", "output": tmp_path / "out"}
    given = Grade(**named)
    out = grade(given)
    assert read_manifest(out)["options"]["gold_function"] == named["gold_function"]
    assert why_stale("grade", given) is None
    (tmp_path / "gold.py").rename(tmp_path / "moved.py")
    moved = Grade(**named | {"gold_function": f"{tmp_path}/moved.py:one"})
    assert why_stale("grade", moved) == "changed input: gold_function_file"  # its file has another name
    (tmp_path / "moved.py").rename(tmp_path / "gold.py")
    other = Grade(**named | {"gold_function": f"{tmp_path}/gold.py:other"})
    assert why_stale("grade", other) == "changed: gold_function"
    (tmp_path / "gold.py").write_text("def one(prompt, answer): return 2")
    assert why_stale("grade", given) == "changed input: gold_function_file"
    assert inputs_of(Grade(gold_function=text, output=out)) == {"gold_function_file": __file__}


@pytest.mark.parametrize("name", ["module", "package.module", "package.deep.module", "package"])
def test_a_function_of_a_module_is_an_input_that_is_not_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [f"moemerge_test_{tmp_path.name[-1]}", *name.split(".")[1:]] if "." in name else [f"mt_{name}"]
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path.joinpath(*parts).with_suffix(".py")
    if name == "package":
        file = tmp_path / parts[0] / "__init__.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    for folder in [parent for parent in file.parents if parent != tmp_path and tmp_path in parent.parents]:
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    file.write_text("raise RuntimeError('imported')")
    given = {"gold_function": f"{'.'.join(parts)}:one", "output": tmp_path / "out"}
    assert inputs_of(Grade(**given)) == {"gold_function_file": str(file)}


@pytest.mark.parametrize("hidden", ["notes", ".notes", "deep/notes"])
def test_what_no_stage_put_into_an_output_is_not_replaced(tmp_path: Path, hidden: str) -> None:
    out = write(output=tmp_path / "out", text="old")
    (out / hidden).parent.mkdir(exist_ok=True)
    (out / hidden).write_text("precious")
    with pytest.raises(ArtifactError, match="no stage put there") as caught:
        write(output=out, overwrite=True)
    assert caught.value.given == hidden and (out / hidden).read_text() == "precious" and text(out) == "old"


def test_work_of_other_options_is_kept_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with suppress(KeyboardInterrupt), workspace(Write(output=tmp_path / "out", text="a")) as before:
        (before / "checkpoint").write_text("days")
        raise KeyboardInterrupt
    with workspace(Write(output=tmp_path / "out", text="b")):
        pass
    assert (before / "checkpoint").read_text() == "days" and str(before) in caplog.text
    with workspace(Write(output=tmp_path / "out", text="a")) as again:
        assert again == before


def test_work_is_found_again_however_its_input_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").write_text("1")
    folders = []
    for source in ("pairs", tmp_path / "pairs"):
        with workspace(Write(source=source, output=tmp_path / "out")) as folder:
            folders.append(folder)
    assert folders[0] == folders[1]


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_the_umask_is_obeyed(tmp_path: Path, during: Any, mask: int) -> None:
    def save(draft: Draft) -> None:
        (draft.folder / "deep").mkdir()
        save_file({"a": np.zeros(1)}, draft.folder / "deep/a.safetensors")

    during(save)
    before = os.umask(mask)
    try:
        out = write(output=tmp_path / "new/out")
    finally:
        os.umask(before)
    for path in (out.parent, out, *out.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_several_processes_are_refused_in_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moemerge.run.pipeline import run_recipe

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(OptionError, match="does not share its work") as caught:
            write(output=tmp_path / "new/out")
        assert f"rank {rank}" in caught.value.given
        with pytest.raises(OptionError, match="does not share its work"):
            run_recipe(tmp_path / "recipe.yml")
    assert list(tmp_path.iterdir()) == []


# Locks


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_lock_that_is_no_file_is_a_fault_of_four_parts(tmp_path: Path, kind: str) -> None:
    lock = lock_of(tmp_path / "out")
    if kind == "link":
        lock.symlink_to(tmp_path / "elsewhere")
    else:
        lock.mkdir()
    with pytest.raises(ArtifactError, match=f"a {kind} is where a file should be"):
        write(output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [lock]


def test_two_stages_on_one_output_are_refused(tmp_path: Path, during: Any) -> None:
    out = tmp_path / "out"
    during(lambda draft: write(output=out))
    with pytest.raises(ArtifactError, match="another run") as caught:
        write(output=out)
    assert f"process {os.getpid()}" in caught.value.given
    assert list(tmp_path.iterdir()) == []


def test_the_lock_holds_against_whoever_opened_the_file_before_it_was_removed(tmp_path: Path) -> None:
    path = tmp_path / ".out.lock"
    with hold(path, tmp_path):
        before = os.open(path, os.O_RDWR)
    with hold(path, tmp_path):
        assert not os.path.samestat(os.fstat(before), path.stat())
        with pytest.raises(ArtifactError), hold(path, tmp_path):
            pass
    os.close(before)
    assert not path.exists()


# Disks


def test_files_and_folders_are_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from environment import FSYNC

    flushed: list[str] = []

    def note(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        FSYNC(handle)

    def rename(folder: Path, output: Path) -> None:
        inside = {str(path) for path in (folder, *folder.rglob("*"))}
        assert inside <= set(flushed) and flushed.index(str(folder / "manifest.json")) < len(flushed) - 1
        disk.put_in_place(folder, output)

    if not Path("/proc/self/fd").exists():
        pytest.skip("asks Linux which file a number stands for")
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(artifacts, "put_in_place", rename)
    write(output=tmp_path / "out")
    assert flushed[-1] == str(tmp_path)


def torch_failure() -> Exception:
    return RuntimeError(
        "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"
    )


def rust_failure() -> Exception:
    from safetensors import SafetensorError

    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


FULL = "the disk is full"
FAILURES: dict[str, tuple[Callable[[], Exception], str]] = {
    "full": (lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FULL),
    "quota": (lambda: OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota"),
    "broken": (lambda: OSError(errno.EIO, os.strerror(errno.EIO)), "does not work"),
    "read-only": (lambda: OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only"),
    "torch": (torch_failure, FULL),
    "safetensors": (rust_failure, FULL),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_disk_that_fails_midway_is_told_in_four_parts_and_leaves_nothing(
    tmp_path: Path, during: Any, kind: str
) -> None:
    make, told = FAILURES[kind]

    def fail(draft: Draft) -> None:
        draft.reserve(3_000_000)
        raise make()

    during(fail)
    with pytest.raises(ArtifactError, match=told) as caught:
        write(output=tmp_path / "out")
    assert str(tmp_path / "out") in caught.value.what and "same command again" in caught.value.fix
    assert told != FULL or caught.value.expected == "room for 3.0 MB"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["flush", "fingerprint", "put_in_place", "write_json", "recover"])
def test_a_disk_that_fails_while_sealing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(artifacts, place, fail)
    with pytest.raises(ArtifactError, match="does not work"):
        write(output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_ours_are_not_taken_for_a_full_disk(tmp_path: Path, during: Any) -> None:
    def fail(draft: Draft) -> None:
        raise KeyError("ours")

    during(fail)
    with pytest.raises(KeyError):
        write(output=tmp_path / "out")


def test_too_little_space_is_told_before_the_work_with_what_is_needed_and_free(
    tmp_path: Path, during: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_space", lambda folder: 1_500_000)
    during(lambda draft: draft.reserve(2_000_000_000))
    with pytest.raises(ArtifactError, match="not enough space") as caught:
        write(output=tmp_path / "out")
    assert caught.value.given.startswith("1.5 MB free") and caught.value.expected.startswith("2.0 GB")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_back_is_not_kept(tmp_path: Path, during: Any) -> None:
    during(lambda draft: (draft.folder / "model.safetensors").write_bytes(b"half of it"))
    with pytest.raises(ArtifactError, match="not written as meant") as caught:
        write(output=tmp_path / "out")
    assert "model.safetensors" in caught.value.given and list(tmp_path.iterdir()) == []


# Secrets


def test_no_secret_gets_into_a_manifest(tmp_path: Path, during: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "aB3" * 11
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from-the-environment")
    during(
        lambda draft: draft.results.update(url="https://me:pass@hub/x?sig=s3cr3t&n=1", seen=[{"t": token}])
    )
    out = write(
        output=tmp_path / "out", text=f"https://me:pass@hub/x {token}", source="https://me:pass@hub/y"
    )
    found = (out / "manifest.json").read_text()
    assert not [one for one in (token, "pass@", "s3cr3t", "from-the-environment") if one in found]
    assert json.loads(found)["results"]["url"] == "https://***@hub/x?sig=***&n=1"
    assert why_stale("write", Write(**read_manifest(out)["options"])) is None


# Signals

WAITING = """
import os, sys, time
sys.path[:0] = sys.argv[1].split(os.pathsep)
import test_safe_writes as t
import moemerge.stages
from moemerge.options import synthetic
from moemerge.run import cli

def wait(draft):
    (draft.output.parent / "started").touch()
    time.sleep(3600)
t.HOOK = wait
class Stages:
    def get(self, name):
        return t.stage("synthetic", synthetic.Synthetic)(lambda options, draft: wait(draft))
moemerge.stages.STAGES = Stages()
cli.main(["synthetic", "--output", sys.argv[2]])
"""


@contextmanager
def waiting(output: Path) -> Iterator[Any]:
    given = [sys.executable, "-c", WAITING, PATHS, str(output)]
    with subprocess.Popen(given, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not (output.parent / "started").exists():
            assert process.poll() is None, process.stderr
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_good_order_with_one_line_that_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    with waiting(tmp_path / "out") as process:
        assert len(hidden(tmp_path)) == 2, "a draft and a lock"
        process.send_signal(number)
        _, told = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert told.splitlines() == [
        f"stopped by {number.name}, nothing is left half-written; "
        f"to go on: moemerge synthetic --output {tmp_path / 'out'}"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["started"]


def test_a_signal_in_a_destructor_is_not_lost(capsys):
    class Ending:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped) as caught, stoppable():
        Ending()
        time.sleep(60)  # ended by the signal
    assert caught.value.number == signal.SIGTERM
    assert "ignored" not in capsys.readouterr().err


def test_a_signal_while_one_is_sent_again_is_not_lost(capsys, monkeypatch):
    class Ending:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    listen, calls = stopping._listen, []

    def listen_and_strike(signals, handler):
        listen(signals, handler)
        calls.append(handler)
        if len(calls) == 3:  # after the first time, and the signal: where the exception is ignored
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(stopping, "_listen", listen_and_strike)
    with pytest.raises(Stopped) as caught, stoppable():
        Ending()
        time.sleep(60)  # ended by the signal
    assert len(calls) == 4 and caught.value.number in (signal.SIGINT, signal.SIGTERM)
    assert "ignored" not in capsys.readouterr().err


def test_a_signal_that_a_library_turns_into_its_own_error_is_a_signal_again() -> None:
    with pytest.raises(Stopped) as caught, stoppable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)  # ended by the signal
        except Stopped as stopped:
            raise ValueError("could not determine the shape") from stopped
    assert caught.value.number == signal.SIGTERM
    with pytest.raises(ValueError, match="mine"), stoppable():
        raise ValueError("mine")

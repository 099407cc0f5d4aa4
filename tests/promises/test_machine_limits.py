"""What the machine refuses: too few files may be open, too little memory is left."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_files import jsonl, pairs
from tiny_models import save_dense

from moemerge.artifacts.memory import shortage
from moemerge.errors import DataError

LIMITED = """
import resource, sys
from moemerge.run import cli
limit, *arguments = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), int(limit)))
cli.main(arguments)
"""


@pytest.mark.parametrize("limit", [4, 6, 7, 8])
def test_with_too_few_files_a_command_ends_with_one_line(limit: int, tmp_path: Path) -> None:
    model = save_dense(tmp_path / "rm")
    command = ["upcycle", "--model", str(model), "--output", str(tmp_path / "moe")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr and done.returncode in ([2] if limit == 4 else [0, 2]), done.stderr
    assert (tmp_path / "moe").exists() == (done.returncode == 0) == ("Too many open" not in done.stderr)


# What the libraries have taken when they are imported does not count.
CRAMPED = """
import resource, sys
from moemerge.run import cli
import moemerge.stages.evaluate, moemerge.stages.upcycle, torch, transformers.models.llama.modeling_llama
torch.set_num_threads(1)
room, *arguments = sys.argv[1:]
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(room) * 2**20,) * 2)
cli.main(arguments)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of this kind are Linux's")
@pytest.mark.parametrize("stage", ["upcycle", "evaluate"])
def test_with_too_little_memory_a_command_ends_with_one_error(stage: str, tmp_path: Path) -> None:
    """A model of 60 MB, and room for half of it."""
    model = save_dense(tmp_path / "rm", intermediate_size=52_000)
    data = jsonl(tmp_path / "pairs.jsonl", pairs(4))
    which = ["--models", f"m={model}", "--pairs", f"t={data}"] if stage == "evaluate" else ["--model", model]
    command = [stage, *which, "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", CRAMPED, "30", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "too little memory" in done.stderr and "to fix:" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "rm"]


def test_who_is_said_to_lack_memory() -> None:
    """The fault may be behind others, and its words may stand in what a user gave."""
    try:
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        except RuntimeError as error:
            raise DataError("no", given="", expected="", fix="") from error
    except DataError as error:
        assert shortage(error) is error.__cause__
    assert shortage(DataError("no", given="a text: out of memory", expected="", fix="")) is None
    assert shortage(MemoryError()) and shortage(OSError(errno.ENOMEM, "x")) and not shortage(OSError("x"))

"""What the machine refuses: too few files may be open, too little memory is left."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from forked import forked
from hostile_files import jsonl, pairs
from tiny_models import save_dense

from moemerge.artifacts.memory import shortage
from moemerge.errors import DataError
from moemerge.run import cli

FRESH = """
import resource, sys
from moemerge.run import cli
limit, *arguments = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), int(limit)))
cli.main(arguments)
"""


def limited(limit: int, arguments: list[str]) -> None:
    """The command, with `limit` files at most that are open: standard input, output and errors among them."""
    logging.getLogger().handlers.clear()  # pytest's, which hold files
    os.closerange(3, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    cli.main(arguments)


@pytest.mark.parametrize(
    ("limit", "fresh"),
    [
        (4, True),
        pytest.param(7, True, marks=pytest.mark.slow),
        (4, False),
        (5, False),
        (6, False),
        (8, False),
    ],
)
def test_with_too_few_files_a_command_ends_with_one_line(limit: int, fresh: bool, tmp_path: Path) -> None:
    """In a fresh process imports need files too; in a fork of this one what is read and written is left."""
    model = save_dense(tmp_path / "rm")
    command = ["upcycle", "--model", str(model), "--output", str(tmp_path / "moe")]
    if fresh:
        run = [sys.executable, "-c", FRESH, str(limit), *command]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        code, told = done.returncode, done.stderr
    else:
        code, _, told = forked(lambda: limited(limit, command))
    assert "Traceback" not in told and code in ([2] if limit == 4 else [0, 2]), told
    assert (tmp_path / "moe").exists() == (code == 0) == ("Too many open" not in told)


# What the libraries have taken when they are imported does not count. The stages run in forks, which find no
# memory that an earlier one gave back.
CRAMPED = """
import json, os, resource, sys
from moemerge.run import cli
import moemerge.stages.evaluate, moemerge.stages.upcycle, torch, transformers.models.llama.modeling_llama
torch.set_num_threads(1)
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
for arguments in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(arguments[-1] + ".told", os.O_WRONLY | os.O_CREAT), 2)
        resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]) * 2**20,) * 2)
        cli.main(arguments)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of this kind are Linux's")
def test_with_too_little_memory_a_command_ends_with_one_error(tmp_path: Path) -> None:
    """A model of 60 MB, and room for half of it."""
    model = save_dense(tmp_path / "rm", intermediate_size=52_000)
    data = jsonl(tmp_path / "pairs.jsonl", pairs(4))
    commands = [
        ["upcycle", "--model", model, "--output", tmp_path / "moe"],
        ["evaluate", "--models", f"m={model}", "--pairs", f"t={data}", "--output", tmp_path / "report"],
    ]
    given = json.dumps([[str(part) for part in command] for command in commands])
    run = [sys.executable, "-c", CRAMPED, "30", given]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "2"], done.stderr
    for name in ("moe", "report"):
        told = (tmp_path / f"{name}.told").read_text()
        assert "Traceback" not in told and "too little memory" in told and "to fix:" in told, told
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["moe.told", "pairs.jsonl", "report.told", "rm"]


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

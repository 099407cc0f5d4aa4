"""What the machine refuses: too few files may be open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_dense

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

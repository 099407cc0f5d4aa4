"""Environments of their own, for packages that do not go with this one's."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import venv
from pathlib import Path

# torch and what it needs: another copy would take gigabytes.
LENT = re.compile(r"(torch|functorch|torchgen|nvidia|triton|sympy|mpmath|networkx)\b|torch-")


def environment(folder: Path) -> Path:
    """A new environment that sees this one's torch, and no more of it; returns its python."""
    venv.create(folder, with_pip=True)
    site, own = (
        next((folder / "lib").glob("python*")) / "site-packages",
        Path(sysconfig.get_paths()["purelib"]),
    )
    for path in own.iterdir():
        if LENT.match(path.name):
            (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


def installed(folder: Path, *packages: str) -> Path | None:
    """The python of a new environment with these packages; None where they cannot be had."""
    python = environment(folder)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", *packages]
    return python if subprocess.run(pip, capture_output=True).returncode == 0 else None

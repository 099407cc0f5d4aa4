"""A selection of tests under the oldest and the newest dependencies that pyproject.toml allows.

`python tests/promises/check_versions.py oldest|newest|both` makes an environment per end, lends it this
one's torch (other versions of torch take gigabytes), installs the lower bounds, or what pip finds newest,
and runs TESTS there. `--dry-run` only asks pip whether the versions go together.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/support"))
from venvs import environment  # noqa: E402

TESTS = [
    "fitting/test_coefficients.py",
    "models/test_checkpoint.py",
    "stages/test_upcycle.py",
    "stages/test_merge.py",
    "models/test_routing.py",
]
LENT = ("torch",)  # and what torch itself needs
NEEDED = ("pytest>=8", "hypothesis>=6")


def requirements(end: str) -> list[str]:
    """What pip is to install for one end: exactly the lower bounds, or what pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [one for one in project["dependencies"] if re.split(r"[^\w-]", one)[0] not in LENT]
    return [re.sub(r">=([^,]+).*", r"==\1", one) for one in wanted] if end == "oldest" else wanted


def check(end: str, dry: bool) -> bool:
    """Whether the versions of one end install, and the tests pass with them."""
    with tempfile.TemporaryDirectory(prefix="moemerge-versions-") as place:
        python = environment(Path(place) / "env")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        asked = [*requirements(end), *NEEDED, *(["--dry-run"] if dry else [])]
        if subprocess.run([*pip, *asked]).returncode:
            return False
        if dry:
            return True
        subprocess.run([str(python), "-m", "pip", "freeze"], check=True)
        tests = [str(ROOT / "tests" / name) for name in TESTS]
        return not subprocess.run([str(python), "-m", "pytest", "-q", *tests], cwd=ROOT).returncode


def main() -> int:
    """Check the ends asked for; 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("end", choices=["oldest", "newest", "both"], nargs="?", default="both")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    ends = ["oldest", "newest"] if given.end == "both" else [given.end]
    results = {end: check(end, given.dry_run) for end in ends}
    print(*(f"{end}: {'passes' if good else 'FAILS'}" for end, good in results.items()), sep="\n")
    return not all(results.values())


if __name__ == "__main__":
    sys.exit(main())

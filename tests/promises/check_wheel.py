"""Wheel and sdist, each built, installed into an environment of its own, and used there.

`python tests/promises/check_wheel.py` lets pip install every dependency into an empty environment, as a user
would; `--reuse` lends the new environments this one's dependencies, so that only the package itself is new.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PARTS = ("moemerge", "merge_configs", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import setuptools.build_meta as backend, sys; getattr(backend, sys.argv[1])(sys.argv[2])"
SMALL = [
    "synthetic.train_pairs=40", "synthetic.validation_pairs=20", "synthetic.test_pairs=20", "control=null",
    "synthetic.prompts=4", "synthetic.candidates=8", "synthetic.hidden_size=16", "synthetic.num_layers=1",
    "base.max_steps=1", "base.search={}", "train.max_steps=1", "train.search={}", "fit.max_epochs=1",
    "also_merge=[]", "evaluate.baseline=null",
]  # fmt: skip


def build(folder: Path) -> list[Path]:
    """The wheel and the sdist, built in `folder` from a copy of the sources."""
    source, out = folder / "source", folder / "dist"
    source.mkdir()
    out.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        copy(ROOT / part, source / part)
    for kind in ("build_wheel", "build_sdist"):
        command = [sys.executable, "-c", BUILD, kind, str(out)]
        subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL)
    return [next(out.glob("*.whl")), next(out.glob("*.tar.gz"))]


def install(archive: Path, folder: Path, reuse: bool) -> Path:
    """A new environment in `folder` with `archive` in it; returns its python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    extra = (
        ["--no-deps", "--no-build-isolation", "--ignore-installed"]
        if reuse
        else ["-c", str(ROOT / "constraints.txt")]
    )
    if reuse:
        site = next((folder / "lib").glob("python*")) / "site-packages"
        lent = sysconfig.get_paths()["purelib"]
        (site / "lent.pth").write_text(f"{lent}\n")
    subprocess.run([*pip, *extra, str(archive)], check=True)
    return python


def use(python: Path, folder: Path) -> str:
    """Write a recipe, check it and run it, small, with the installed command; the final table."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [str(python), "-m", "moemerge"]
    changes = [part for change in SMALL for part in ("--set", change)]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{arguments}: {done.stdout}{done.stderr}")
        return done.stdout

    where = "import moemerge, pathlib; print(pathlib.Path(moemerge.__file__).parent)"
    home = subprocess.run(
        [str(python), "-c", where], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    for name in ("py.typed", "__init__.pyi"):
        assert (Path(home.stdout.strip()) / name).is_file()
    assert str(python.parent.parent) in home.stdout, "another moemerge was imported"
    run("init", "my.yml")
    run("check", "my.yml", *changes)
    return run("run", "my.yml", "--output", "out", *changes)


def check(reuse: bool) -> list[str]:
    """The final tables of a small run from the wheel and from the sdist."""
    with tempfile.TemporaryDirectory(prefix="moemerge-wheel-") as place:
        folder, tables = Path(place), []
        for archive in build(folder):
            home = folder / archive.suffix.strip(".")
            python = install(archive, home / "env", reuse)
            tables.append(use(python, home))
        return tables


def main() -> None:
    """Check both archives and print the table of each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reuse", action="store_true", help="lend this environment's dependencies")
    print(*check(parser.parse_args().reuse), sep="\n")


if __name__ == "__main__":
    main()

"""What stands around the package: the documents as a site, the container."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import moemerge
from moemerge.run.flags import COMMANDS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """docs/site.py."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs/site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(site: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site.prepare(tmp_path_factory.mktemp("site") / "source")


def test_the_reference_has_every_option_and_every_public_name(source: Path) -> None:
    sections = dict(
        re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", (source / "docs/reference.md").read_text(), re.M | re.S)
    )
    for command in COMMANDS:
        told = sections[command] + sections["Of every command"]
        for name, field in COMMANDS.get(command).model_fields.items():
            assert f"| `{name}` |" in told, f"{command}.{name}"
            assert (field.description or "")[:15].replace("*", "\\*").split("|")[0] in told
    functions = {name.replace("-", "_") for name in sections} & {*moemerge._HOMES}
    functions |= {"prepare", "write_world"}
    assert functions == set(moemerge._HOMES)


def test_the_site_shows_every_document(source: Path) -> None:
    text = (ROOT / "docs/mkdocs.yml").read_text().replace("!!python/object/apply:pymdownx.slugs.slugify", "")
    listed = re.findall(r": ([\w/]+\.md)$", text, re.M)
    assert sorted(listed) == sorted(str(path.relative_to(source)) for path in source.rglob("*.md"))
    assert yaml.safe_load(text)["strict"] is True


def test_lists_below_paragraphs_are_lists_and_code_stays(site: ModuleType) -> None:
    text = "Two things:\n* a\n  more\n* b\n\n```\nx:\n* y\n```\nSay:\n1. a\n2. b\n| a | b |\n"
    assert site.spaced(text) == text.replace("things:\n", "things:\n\n").replace("Say:\n", "Say:\n\n")


@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="mkdocs-material is not installed: make site")
def test_no_link_of_the_site_leads_nowhere(source: Path, tmp_path: Path) -> None:
    config = (ROOT / "docs/mkdocs.yml").read_text().replace("../build/site-source", str(source))
    (tmp_path / "mkdocs.yml").write_text(config.replace("../build/site", str(tmp_path / "pages")))
    subprocess.run(["mkdocs", "build", "-q", "-f", tmp_path / "mkdocs.yml"], check=True)
    assert "Reference" in (tmp_path / "pages/docs/reference/index.html").read_text()


def test_the_container_copies_what_is_there_and_is_not_root() -> None:
    text = (ROOT / "docs/Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    assert copied and all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / "docs/Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert (
        re.findall(r"^USER (\w+)$", text, re.M) == ["moemerge"] and "useradd --create-home moemerge" in text
    )
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.M)


def test_ci_does_what_a_developer_does_and_builds_the_site() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["make test", "make slow", "make site"]
    assert {"test", "slow", "site"} <= {*re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)}


def test_forms_for_issues_ask_for_what_contributing_asks_for() -> None:
    forms = [
        yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    ]
    asked = [{field["id"] for field in form["body"]} for form in forms]
    assert {"command", "output", "version"} <= asked[0] and "purpose" in asked[1]
    assert all(form["name"] and form["description"] for form in forms)


def test_all_files_about_the_package_say_the_same() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    assert [author["name"] for author in cited["authors"]] == [a["name"] for a in project["authors"]]
    versions = {c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: 3\.\d", c)}
    badge = re.search(r"python-3\.(\d+)_to_3\.(\d+)-", (ROOT / "README.md").read_text())
    assert badge is not None
    assert versions == {f"3.{minor}" for minor in range(int(badge[1]), int(badge[2]) + 1)}
    assert project["requires-python"] == f">=3.{badge[1]}"

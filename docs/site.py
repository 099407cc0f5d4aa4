"""The documents as a site: `make site`, or `python docs/site.py`, then `mkdocs build -f docs/mkdocs.yml`.

Documents are copied as they stand, in the repository's own folders, so that links between them hold; a
reference of commands and functions, made from docstrings and options, comes beside them.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import moemerge
from moemerge.options.base import Run
from moemerge.options.signature import default_text
from moemerge.run import commands
from moemerge.run.flags import COMMANDS
from moemerge.stages import ROWS

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "site-source"  # mkdocs.yml names it
DOCUMENTS = ("*.md", "docs/*.md", "studies/*.md", "benchmarks/*.md")
LINK = re.compile(r"\]\(([^)#:\s]+)")  # to a file of the repository
CODE = re.compile(r"(^```.*?^```$)", re.M | re.S)
# A list or table right below a paragraph, which mkdocs would read as a part of it.
CLOSE = re.compile(r"^(?![*|\s-]|\d+\. )(.*\S)\n(?=[*-] |\d+\. |\|)", re.M)
REFERENCE = "docs/reference.md"


def prepare(folder: Path = SITE) -> Path:
    """Everything that mkdocs reads, in a new `folder`: documents, and the files that they link to."""
    shutil.rmtree(folder, ignore_errors=True)
    documents = [file for pattern in DOCUMENTS for file in ROOT.glob(pattern)]
    linked = [(file.parent / name).resolve() for file in documents for name in LINK.findall(file.read_text())]
    for file in {*documents, *(path for path in linked if path.is_file())}:
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file in documents:
            copy.write_text(spaced(file.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(file, copy)
    (folder / REFERENCE).write_text(reference(), encoding="utf-8")
    return folder


def spaced(text: str) -> str:
    """Markdown as GitHub reads it, with the blank lines that mkdocs wants above lists and tables."""
    parts = CODE.split(text)
    return "".join(part if number % 2 else CLOSE.sub(r"\1\n\n", part) for number, part in enumerate(parts))


def reference() -> str:
    """Every command with its options, and every other public name, in Markdown."""
    head = "# Reference\n\nMade from the docstrings and options of this version.\n\n## Commands\n\n"
    head += (
        "Each is also a function of `moemerge`, and most are sections of recipes, with the same options.\n"
    )
    kinds = {row.command: row.summary for row in ROWS} | {row.name: row.summary for row in commands.ROWS}
    every = [_run_options(), *(_command(name, summary) for name, summary in kinds.items())]
    return "\n".join([head, *every, "## Other names in Python\n", *_others()])


def _run_options() -> str:
    return f"### Of every command\n\n{_table(Run)}"


def _command(name: str, summary: str) -> str:
    options = COMMANDS.get(name)
    inputs = ", ".join([*options.POSITIONAL, "output=..., ..."])
    function = {"data": "prepare", "synthetic": "write_world"}.get(name, name.replace("-", "_"))
    return f"### {name}\n\n{summary}\n\n```\nmoemerge.{function}({inputs})\n```\n\n{_table(options)}"


def _table(options: type[Run]) -> str:
    own = [name for name in options.model_fields if options is Run or name not in Run.model_fields]
    rows = ["| option | meaning | default |", "| --- | --- | --- |"]
    for name in own:
        field = options.model_fields[name]
        default = default_text(field).strip(" []").removeprefix("default: ")
        rows.append(f"| `{name}` | {_cell(field.description or '')} | {_cell(default)} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _others() -> Iterator[str]:
    """Functions that are no commands, and classes."""
    told = {"prepare", "write_world", *(name.replace("-", "_") for name in COMMANDS)}
    for name in moemerge._HOMES:
        it = getattr(moemerge, name)
        if name not in told:
            shown = str(inspect.signature(it)) if inspect.isfunction(it) else ""
            text = inspect.getdoc(it) or ""
            yield f"### {name}\n\n```python\n{name}{shown}\n```\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    prepare()

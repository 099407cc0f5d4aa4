"""docs/tutorial.ipynb: its code runs, on less data, and what it shows is what was run last, whole."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent.parent / "docs/tutorial.ipynb"
# The same code in seconds; each of these stands in it once.
SMALLER = {
    "train_pairs=6000": "train_pairs=240",
    "test_pairs=400": "test_pairs=40",
    "own_pairs=400": "own_pairs=60",
    "candidates=64": "candidates=8",
    "prompts=20": "prompts=4",
    "hidden_size=48": "hidden_size=16",
    "max_steps=40": "max_steps=2",
    "epochs=4,": "epochs=1,",
    "bias_pairs=60": "bias_pairs=10",
    "max_pairs=40": "max_pairs=8",
    "max_pairs=60": "max_pairs=8",
    " steps=3": " steps=1",
    " steps=2": " steps=1",
    "max_epochs=5": "max_epochs=1",
}


def cells(kind: str) -> list[dict[str, Any]]:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    return [cell for cell in book["cells"] if cell["cell_type"] == kind]


def shown_by(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    html = getattr(value, "_repr_html_", None)
    return html() if html else repr(value)


def picture(filename: Path, width: int) -> str:
    """IPython's Image, as far as it matters here: the file is there."""
    assert Path(filename).read_bytes().startswith(b"\x89PNG")
    return f"picture of {width}"


def test_the_code_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    display: Any = ModuleType("IPython.display")
    display.Image = picture
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    sources = ["".join(cell["source"]) for cell in cells("code")]
    for mine, small in SMALLER.items():
        assert sum(source.count(mine) for source in sources) == 1, mine
        sources = [source.replace(mine, small) for source in sources]
    names: dict[str, Any] = {"__name__": "tutorial"}
    results = [shown_by(source, names) for source in sources]
    stored = [cell["outputs"][-1]["output_type"] == "execute_result" for cell in cells("code")]
    assert [result is not None for result in results] == stored
    assert {path.name for path in tmp_path.iterdir()} == {"tutorial"}


def test_what_the_tutorial_shows_is_whole_and_of_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 400_000 and "/home/" not in text and "/work" not in text and "/tmp" not in text
    numbers = [cell["execution_count"] for cell in cells("code")]
    assert numbers == list(range(1, len(numbers) + 1)), "run it from the start: all cells, in order"
    kinds = {output["output_type"] for cell in cells("code") for output in cell["outputs"]}
    assert kinds == {"stream", "execute_result"}


def test_its_links_lead_somewhere() -> None:
    text = "".join("".join(cell["source"]) for cell in cells("markdown"))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all((NOTEBOOK.parent / link.partition("#")[0]).exists() for link in links)

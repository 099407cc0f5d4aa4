"""The rules of the house, read off the source: who imports whom, who prints, what is documented."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "moemerge"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = {
    "errors",
    "registry",
    "options",
    "fit_settings",
    "evaluate_settings",
    "comparison_settings",
    "policy_settings",
    "data_settings",
    "attack_settings",
    "recipe",
    "artifacts",
    "manifests",
    "layers",
    "weight_files",
    "disk",
    "locks",
    "fingerprints",
    "environment",
    "redaction",
    "confined",
    "json_file",
}
STAGES = {
    *("upcycle", "train", "route", "fit", "merge", "export", "evaluate", "compare", "publish"),
    *("sample", "optimise", "attack"),
}
TOP = {"cli", "flags", "__main__", "pipeline", "check", "recipe_file"}
HOMES = {
    "click": {"cli", "flags"},
    "trl": {"train", "trainer", "policy_gradient"},
    "accelerate": {"train", "trainer"},
    "peft": {"train", "trainer"},
    # host_methods calls mergekit's methods; the bridge, which mergekit imports, must stay apart from it.
    "mergekit": {"mergekit_bridge", "host_methods"},
    "datasets": {"rows", "train", "trainer", "policy_gradient"},
    "huggingface_hub": {"publish", "card", "checkpoint"},
    "matplotlib": {"plotting"},
    "cma": {"optimisers.evolution"},
    "wrapt": {"__init__"},
    "jinja2": {"html_report", "tokenise"},  # pages; the faults of chat templates
}


def module_of(path: Path) -> str:
    """`train` for moemerge/train.py, `probes.accuracy` for a file in a folder, `probes` for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


TREES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
NAMES = set(TREES)


def outside_type_checking(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        yield node
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        queue += node.orelse if typing_only else list(ast.iter_child_nodes(node))


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when the module is imported."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        yield node
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            queue += list(ast.iter_child_nodes(node))


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names of the modules that import statements among `nodes` load."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "moemerge":
            found |= {f"moemerge.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def own(names: set[str]) -> set[str]:
    """The moemerge modules among `names`, without the package's name."""
    inside = {name.removeprefix("moemerge.") for name in names if name.startswith("moemerge.")}
    return {name for name in inside if name in NAMES}


IMPORTS = {module: own(imported(outside_type_checking(tree))) for module, tree in TREES.items()}


def test_the_scanner_sees_imports() -> None:
    """Guards the tests below against a scanner that finds nothing."""
    assert (
        "options" in IMPORTS["artifacts"] and "pipeline" in IMPORTS["cli"] and "probes" in IMPORTS["evaluate"]
    )
    assert {module for module in STAGES | GROUND if module not in NAMES} == set()


def test_ground_imports_nothing_above_itself() -> None:
    above = {module: IMPORTS[module] - GROUND for module in GROUND}
    assert {module: names for module, names in above.items() if names} == {}


def test_stages_are_imported_by_the_pipeline_only() -> None:
    lower = {module: names & (STAGES | TOP) for module, names in IMPORTS.items() if module not in TOP}
    lower.pop("__init__")  # imports by name, when asked
    assert {module: names for module, names in lower.items() if names} == {}


def test_no_import_circles() -> None:
    graph = {module: own(imported(at_import(tree))) - {module} for module, tree in TREES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("library", HOMES)
def test_outside_libraries_have_one_home(library: str) -> None:
    users = {
        module
        for module, tree in TREES.items()
        if any(name.split(".")[0] == library for name in imported(ast.walk(tree)))
    }
    assert users - HOMES[library] == set()


def test_only_the_command_line_prints_exits_or_sets_up_logging() -> None:
    forbidden = {"print", "input", "exit", "quit", "sys.exit", "os._exit", "logging.basicConfig"}
    calls = {
        f"{module}:{node.lineno} {ast.unparse(node.func)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in forbidden
    }
    assert {call.split(":")[0] for call in calls} == {"cli"}, sorted(calls)


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path.name: length for path, length in lengths.items() if length >= 400} == {}


def public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes in `body`, and the public methods of those classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}.{node.name}")


def test_everything_public_has_a_docstring() -> None:
    bare = [module for module, tree in TREES.items() if ast.get_docstring(tree) is None]
    for module, tree in TREES.items():
        for name, node in public(tree.body, module):
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if ast.get_docstring(node) is None:
                bare.append(name)
    assert bare == []


def tree_in(document: str) -> set[str]:
    """File and folder names in the tree that starts with `moemerge/` in a document."""
    block = re.search(r"^```\n(moemerge/\n.*?)^```", document, re.S | re.M)
    assert block is not None, "no file tree"
    lines = [line for line in block.group(1).splitlines()[1:] if line.startswith("  ")]
    return {name for line in lines for name in re.findall(r"\b\w+\.py\b|^  \w+/", line)}


def test_the_tree_in_the_design_matches_the_folder() -> None:
    named = {name.strip() for name in tree_in((ROOT / "docs/design.md").read_text(encoding="utf-8"))}
    there = {path.name for path in PACKAGE.glob("*.py")} | {
        f"{p.parent.name}/" for p in PACKAGE.glob("*/__init__.py")
    }
    assert named == there


def test_the_wheel_has_every_folder_and_pins_cover_every_dependency() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {f"moemerge.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    recipes = {"moemerge.merge_configs", "moemerge.merge_configs.mergekit"}
    assert set(project["tool"]["setuptools"]["packages"]) == folders | recipes | {"moemerge"}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    pinned = set(re.findall(r"^([\w-]+)==\d", pins, re.M))
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["test"]]
    assert {re.split(r"[^\w-]", one.lower())[0] for one in wanted} - pinned == set()
    assert "torch==2.13.0" in pins.splitlines()


MARKED = re.compile(r"^<!-- tested -->\n```python\n(.*?)^```", re.S | re.M)


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks after `<!-- tested -->` run in order, in a folder with reward-model/ and pairs.jsonl."""
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README yet")
    blocks = MARKED.findall(readme.read_text(encoding="utf-8"))
    assert blocks, "mark the example with <!-- tested -->"
    _furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def _furnish(folder: Path) -> None:
    from conftest import save_dense

    save_dense(folder / "reward-model")
    words = [f"w{i}" for i in range(40)]
    rows = [
        {"prompt": words[i], "chosen": f"{words[i]} w50", "rejected": f"{words[i]} w51"} for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

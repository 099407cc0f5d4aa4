"""The rules of the house, read off the source: who imports whom, who prints, what is documented."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from tiny_models import save_dense

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "moemerge"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = {"errors", "registry"}  # what every folder may import
# The folders from the ground up, and what each may import; the documents show this very table.
FOLDERS: dict[str, set[str]] = {
    "errors": set(),
    "registry": set(),
    "options": set(),
    "artifacts": {"options"},
    "data": {"artifacts", "options"},
    "models": {"data", "artifacts", "options"},
    "reports": {"artifacts"},
    "merging": {"models", "data", "reports", "artifacts", "options"},
    "training": {"models", "data", "reports", "artifacts", "options"},
    "evaluation": {"models", "data", "reports", "artifacts", "options"},
    "fitting": {"merging", "models", "data", "reports", "artifacts", "options"},
}
LOWER = set(FOLDERS)
FOLDERS["stages"] = LOWER
FOLDERS["run"] = LOWER | {"stages"}
HOMES = {
    "click": {"run"},
    "trl": {"training", "stages"},
    "accelerate": {"training", "stages", "models.processes", "models.modelling"},
    "peft": {"training", "stages"},
    "mergekit": {"merging.mergekit"},
    "datasets": {"data", "training", "stages"},
    "huggingface_hub": {"artifacts.hub", "models", "evaluation", "stages"},
    "matplotlib": {"reports"},
    "cma": {"fitting.optimisers"},
    "wrapt": {"__init__"},
    "jinja2": {"reports"},
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


def folder_of(module: str) -> str:
    """The folder at the top that holds a module, or its name if it stands at the top itself."""
    return module.split(".")[0]


def test_the_scanner_sees_imports() -> None:
    """Guards the tests below against a scanner that finds nothing."""
    assert "options.base" in IMPORTS["artifacts.stage"] and "run.pipeline" in IMPORTS["run.cli"]
    assert "evaluation.probes" in IMPORTS["stages.evaluate"]
    assert set(map(folder_of, NAMES)) == set(FOLDERS) | {"__init__", "__main__"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_stands_below_it(folder: str) -> None:
    allowed = FOLDERS[folder] | GROUND | {folder}
    above = {
        module: {name for name in names if folder_of(name) not in allowed}
        for module, names in IMPORTS.items()
        if folder_of(module) == folder
    }
    assert {module: names for module, names in above.items() if names} == {}


def test_stages_do_not_import_each_other() -> None:
    """They may read the table of stages, which is the folder's own file, and imports none of them."""
    stages = {module: names for module, names in IMPORTS.items() if folder_of(module) == "stages"}
    assert {m: n for m, names in stages.items() if (n := {x for x in names if x.startswith("stages.")})} == {}
    assert {module for module, names in stages.items() if "stages" in names} == {"stages.publish"}


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
    strangers = {user for user in users if not any(f"{user}.".startswith(f"{at}.") for at in HOMES[library])}
    assert strangers == set()


def test_only_the_command_line_prints_exits_or_sets_up_logging() -> None:
    forbidden = {"print", "input", "exit", "quit", "sys.exit", "os._exit", "logging.basicConfig"}
    calls = {
        f"{module}:{node.lineno} {ast.unparse(node.func)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in forbidden
    }
    assert {call.split(":")[0] for call in calls} == {"run.cli"}, sorted(calls)


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


def architecture() -> str:
    """The document that draws the house."""
    return (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_tree_in_the_documents_is_the_listing() -> None:
    block = re.search(r"^```\nmoemerge/\n(.*?)^```", architecture(), re.S | re.M)
    assert block is not None, "no file tree"
    named = [line.split()[0] for line in block.group(1).splitlines()]
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(named) == sorted(folders | {path.name for path in PACKAGE.glob("*.py")})
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_the_table_of_folders_in_the_documents_is_the_rule() -> None:
    rows = re.findall(r"^\| (\w+) \| (.*?) \|$", architecture(), re.M)[1:]
    assert [folder for folder, _ in rows] == list(FOLDERS)
    for folder, words in rows:
        if "everything above" not in words:
            named = set(words.split(", ")) - {"nothing"}
            assert named - GROUND == FOLDERS[folder], folder


def test_the_wheel_has_every_folder_and_pins_cover_every_dependency() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in PACKAGE.rglob("__init__.py")}
    recipes = {f"moemerge.merge_configs{folder}" for folder in ("", ".mergekit", ".own")}
    assert set(project["tool"]["setuptools"]["packages"]) == folders | recipes
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    pinned = set(re.findall(r"^([\w-]+)==\d", pins, re.M))
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["test"]]
    assert {re.split(r"[^\w-]", one.lower())[0] for one in wanted} - pinned == set()
    assert "torch==2.13.0" in pins.splitlines()


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_no_test_imports_another() -> None:
    """What several share stands in tests/support; a child process may import the file that started it."""
    imports = {
        path.name: set(re.findall(r"^\s*(?:from|import) (test_\w+|conftest)\b", path.read_text(), re.M))
        - {path.stem}
        for path in TESTS
    }
    assert {name: names for name, names in imports.items() if names} == {}


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by name, and SECURITY.md names them without their folder."""
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)


LINK = re.compile(r"\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)")
DOCUMENTS = sorted(path for at in (".", "docs", "studies", "benchmarks") for path in (ROOT / at).glob("*.md"))


def prose(document: Path) -> str:
    """The text of a document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(document: Path) -> set[str]:
    """What links to headings of a document may name, by GitHub's rule; no heading may stand there twice."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.M)
    names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(names)) == len(names), f"{document}: a heading stands there twice"
    return set(names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = [link for link in LINK.findall(prose(document)) if not re.match(r"\w+:", link)]
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_readme_leads_to_every_document() -> None:
    """From the README, by links, every document can be reached."""
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        document = queue.pop().resolve()
        if document not in reached:
            reached.add(document)
            names = {link.partition("#")[0] for link in LINK.findall(prose(document))}
            queue += [document.parent / name for name in names if name.endswith(".md") and ":" not in name]
    assert {path.resolve() for path in DOCUMENTS} == reached


def test_files_that_the_documents_name_exist() -> None:
    """In docs/, `folder/file.py` is a file of the package or of the repository; NAME stands for any."""
    for document in (path for path in DOCUMENTS if path.parent.name == "docs"):
        for name in re.findall(r"`([\w/]+/\w+\.(?:py|jinja|yml))`", document.read_text(encoding="utf-8")):
            places = (PACKAGE / name, ROOT / name)
            assert "NAME" in name or any(place.exists() for place in places), f"{document.name}: {name}"


def commands(document: Path) -> Iterator[tuple[str, set[str]]]:
    """Commands of moemerge that a document shows, each with the flags that it gives."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"\bmoemerge ([a-z-]+) ([^\n`#|]*)", text):
        yield name, set(re.findall(r"(?<!\S)--[\w-]+", rest))


def test_commands_in_the_documents_have_the_flags_they_show() -> None:
    from click import Context

    from moemerge.run.cli import cli

    shown = [one for document in DOCUMENTS for one in commands(document) if one[1]]
    assert len(shown) > 30
    for name, flags in shown:
        if name != "mergekit":
            options = cli.commands[name].get_params(Context(cli))
            known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
            assert flags <= known, f"moemerge {name}"


MARKED = re.compile(r"^<!-- tested -->\n```python\n(.*?)^```", re.S | re.M)


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks after `<!-- tested -->` run in order, beside reward-model/ and three files of pairs."""
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
    save_dense(folder / "reward-model")
    words = [f"w{i}" for i in range(40)]
    rows = [
        {"prompt": f"{words[i]} ", "chosen": f"w50 {words[i]}", "rejected": f"w51 {words[i]}"}
        for i in range(40)
    ]
    for name in ("pairs", "held_out", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

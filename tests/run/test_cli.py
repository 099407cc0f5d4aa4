"""The command line: flags made from options, faults in four parts, the same result as from Python."""

from __future__ import annotations

import html
import importlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from forked import forked
from small_reports import report_of

import moemerge
from moemerge.artifacts.checksums import fingerprint
from moemerge.artifacts.manifest import read_manifest
from moemerge.artifacts.stage import Draft, Stage, stage
from moemerge.errors import DataError
from moemerge.options.base import Run
from moemerge.options.evaluate import Evaluate
from moemerge.options.fit import Fit
from moemerge.run import cli, steps
from moemerge.run.check import load_recipe
from moemerge.run.plan import plan
from moemerge.stages import OPTIONS, ROWS, Row
from moemerge.training.trainer import PairTrainer

ROOT = Path(__file__).parent.parent.parent
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Main:
    """Runs the command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return int(caught.value.code or 0), found.out, found.err

    return run


class FakeStages:
    """Stages that only keep the options they are called with."""

    def __init__(self) -> None:
        self.options: Any = None
        self.fault: BaseException | None = None

    def get(self, name: str) -> Stage:
        return stage(name, OPTIONS.get(name))(self.body)

    def body(self, options: Run, draft: Draft) -> None:
        self.options = options
        if self.fault is not None:
            raise self.fault
        (draft.folder / "file").write_text("x")
        (draft.folder / "report.json").write_text(json.dumps(report_of([], "")))
        draft.results |= {"pairs": 3, "loss": 0.123456, "name": "n" * 99, "sizes": {"train": 5}}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fake = FakeStages()
    monkeypatch.setattr(steps, "STAGES", fake)
    monkeypatch.setattr("moemerge.stages.STAGES", fake)
    # What they write is not what stages of this version write: their headlines are the plain values.
    monkeypatch.setattr("moemerge.artifacts.environment.package_version", lambda: "another")
    return fake


# Flags


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_option_of_a_stage_is_a_flag_with_help(main: Main, row: Row) -> None:
    code, out, _ = main(row.command, "--help")
    text = " ".join(out.split())
    assert code == 0
    for name, field in OPTIONS.get(row.name).model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert " ".join(str(field.description).split()[:3]) in text


def test_help_says_the_whole_of_what_each_command_does(main: Main) -> None:
    text = " ".join(main("--help")[1].partition("Commands:")[2].split())
    assert all(f" {row.command} {row.summary.split('. ')[0]}" in text for row in ROWS) and "..." not in text


def test_flags_become_options_of_every_kind(main: Main, stages: FakeStages, tmp_path: Path) -> None:
    flags = (
        "--model m --pairs p --epochs 2.5 --max-steps 7 --patience none --trainable lora --trust-remote-code"
    )
    flags += " --no-gradient-checkpointing --fields prompt=question --fields chosen=a=b"
    flags += " --search learning_rate=1e-5,3e-5 --search weight_decay=1 --validation v"
    code, _, err = main("train", *flags.split(), "--output", tmp_path / "out")
    assert code == 0, err
    options = stages.options
    assert (options.epochs, options.max_steps, options.patience) == (2.5, 7, None)
    assert (options.trainable, options.trust_remote_code, options.gradient_checkpointing) == (
        "lora",
        True,
        False,
    )
    assert options.fields == {"prompt": "question", "chosen": "a=b"}
    assert options.search == {"learning_rate": [1e-5, 3e-5], "weight_decay": [1.0]}
    assert options.output == tmp_path / "out" and options.learning_rate == 1e-5


def test_defaults_are_those_of_the_options(main: Main, stages: FakeStages, tmp_path: Path) -> None:
    main("fit", "--model", "m", "--output", tmp_path / "out", "--shared-weight", "match")
    assert stages.options == Fit(model="m", output=tmp_path / "out", shared_weight="match")
    main("fit", "--model", "m", "--output", tmp_path / "two", "--shared-weight", "0.25")
    assert stages.options.shared_weight == 0.25


def test_lists_and_sources(main: Main, stages: FakeStages, tmp_path: Path) -> None:
    sources = ["--models", "a=x/y", "--models", "b=z", "--pairs", "t=f", "--probes", "accuracy"]
    code, _, err = main("evaluate", *sources, "--output", tmp_path / "out")
    assert code == 0, err
    assert stages.options.models == {"a": "x/y", "b": "z"} and stages.options.probes == ["accuracy"]


def test_main_results_are_printed(main: Main, stages: FakeStages, tmp_path: Path) -> None:
    _, out, _ = main("merge", "--model", "m", "--coefficients", "c", "--output", tmp_path / "out")
    assert out == f"{tmp_path / 'out'}  pairs 3  loss 0.1235  sizes.train 5\n"


# Faults


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--epoch", "3"], "--epochs"),
        (["upcycle", "--gate", "soft"], "'xft', 'topk', 'prompt'"),
        (["upcycle", "rm"], "such as --model rm"),
        (["check"], "RECIPE"),
        (["nothing-like-it"], "choose one of: attack, audit, calibrate, changes, check"),
    ],
)
def test_usage_errors_name_the_near_ones(main: Main, arguments: list[str], text: str) -> None:
    code, out, err = main(*arguments)
    assert (code, out) == (2, "") and text in err


def test_all_bad_options_are_told_at_once_in_four_parts(main: Main) -> None:
    code, out, err = main("route", "--max-pairs", "0", "--batch-tokens", "many", "--fields", "prompt=b")
    assert (code, out) == (2, "")
    assert err.startswith("options: 5 fault(s)") and "Traceback" not in err
    for option in ("output", "model", "pairs"):
        assert (
            f"missing option {option}\n" in err and f"give {option} (--{option} on the command line)" in err
        )
    for option, flag in {"max_pairs": "--max-pairs", "batch_tokens": "--batch-tokens"}.items():
        assert f"bad option {option}\n" in err and f"correct {option} ({flag} on the command line)" in err
    assert "given:    'many'\n  expected: a valid integer\n" in err
    assert "expected: greater than or equal to 1\n" in err and "expected: folder to write;" in err
    assert err.count("to fix:") == err.count("given:") == err.count("expected:") == 5


def test_faults_of_a_stage_end_with_code_2_and_no_traceback(
    main: Main, stages: FakeStages, tmp_path: Path
) -> None:
    stages.fault = DataError("rows are broken", given="row 3", expected="prompt", fix="mend it")
    code, out, err = main("route", "--model", "m", "--pairs", "p", "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "rows are broken",
        "  given:    row 3",
        "  expected: prompt",
        "  to fix:   mend it",
    ]
    assert not (tmp_path / "out").exists()


def test_name_value_flags_need_both(main: Main, tmp_path: Path) -> None:
    arguments = ("evaluate", "m", "--pairs", "p", "--fields", "text", "--output", tmp_path / "out")
    code, _, err = main(*arguments)
    assert code == 2 and "bad option --fields" in err and "name=value" in err
    code, _, err = main("evaluate", "a=m", "n", "--pairs", "p", "--output", tmp_path / "out")
    assert code == 2 and "bad option --models" in err and "given:    n" in err


def test_what_is_evaluated_has_names_of_its_own(main: Main, stages: FakeStages, tmp_path: Path) -> None:
    arguments = ("evaluate", "runs/q/a", "me/b", "--pairs", "x/t.jsonl.gz", "--candidates", "c=y/n.jsonl")
    assert main(*arguments, "--rewardbench", "me/bench:test", "--output", tmp_path / "out")[0] == 0
    given = stages.options
    assert given.models == {"a": "runs/q/a", "b": "me/b"} and given.pairs == {"t": "x/t.jsonl.gz"}
    assert given.candidates == {"c": "y/n.jsonl"} and given.rewardbench == {"bench-test": "me/bench:test"}
    assert Evaluate(models="q/a/", output=tmp_path / "o").models == {"a": "q/a/"}
    code, _, err = main("evaluate", "q/a", "p/a", "--pairs", "p", "--output", tmp_path / "o")
    assert code == 2 and "a would be the name of two" in err
    code, _, err = main("evaluate", "q/a", "q/a", "--pairs", "p", "--output", tmp_path / "o")
    assert code == 2 and "each once: q/a is given twice" in err


def test_interrupt_ends_with_130(main: Main, stages: FakeStages, tmp_path: Path) -> None:
    stages.fault = KeyboardInterrupt()
    code, _, err = main("route", "--model", "m", "--pairs", "p", "--output", tmp_path / "out")
    assert code == 130 and "to go on: moemerge route --model m --pairs p --output" in err


def test_mistakes_of_ours_keep_their_traceback(stages: FakeStages, tmp_path: Path) -> None:
    stages.fault = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        cli.main(["route", "--model", "m", "--pairs", "p", "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(("flag", "level"), [("--quiet", logging.WARNING), ("--verbose", logging.DEBUG)])
def test_verbosity(main: Main, stages: FakeStages, tmp_path: Path, flag: str, level: int) -> None:
    _, out, err = main("route", flag, "--model", "m", "--pairs", "p", "--output", tmp_path / "out")
    assert logging.getLogger("moemerge").level == level
    assert ("wrote" in err) == (flag == "--verbose") and "wrote" not in out


def test_no_secret_gets_into_logs_and_messages(main: Main, stages: FakeStages, tmp_path: Path) -> None:
    token = "hf_" + "aB3" * 11
    stages.fault = DataError("no such data", given=f"https://me:pass@hub/{token}", expected="x", fix="y")
    _, out, err = main("route", "--model", token, "--pairs", "p", "--output", tmp_path / "out")
    logging.getLogger("moemerge").warning("reading %s", f"https://me:pass@hub/{token}")
    stages.fault = KeyboardInterrupt()
    stopped = main("route", "--model", token, "--pairs", "p", "--output", tmp_path / "out")[2]
    told = out + err + stopped
    assert "https://***@hub/***" in err and "reading" in told and "--model ***" in stopped
    assert token not in told and "pass" not in told


def test_what_a_terminal_would_obey_is_shown(main: Main, stages: FakeStages, tmp_path: Path) -> None:
    stages.fault = DataError("no such data", given="a\x1b[2Jb\u202e", expected="x", fix="y")
    _, out, err = main("route", "--model", "m", "--pairs", "p", "--output", tmp_path / "out")
    logging.getLogger("moemerge").warning("reading %s", "c\x1b[2Jd")
    unknown = main("rou\x1bte")[2]
    assert "a\\x1b[2Jb\\u202e" in err and "\x1b" not in out + err + unknown


def test_a_full_device_ends_with_one_line() -> None:
    command = [sys.executable, "-m", "moemerge", "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("moemerge cannot go on: [Errno 28]")


# Recipes


def test_init_check_and_their_faults(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = main("init", "mine.yml")
    assert code == 0 and "moemerge run mine.yml" in out
    first, rest = (tmp_path / "mine.yml").read_text().split("\n", 1)
    assert rest == (ROOT / "merge_configs/quickstart.yml").read_text()
    assert first.startswith("# yaml-language-server: $schema=") and Path(first.split("=")[1]).is_file()
    assert main("init", "mine.yml")[0] == 2
    code, out, _ = main("check", "mine.yml")
    assert code == 0 and out.splitlines()[0] == "ok"
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["synthetic", "data", "base"]
    code, out, err = main("check", "mine.yml", "--set", "fit.method=lerned", "--set", "train.epochs=-1")
    assert (code, out) == (2, "")
    assert "did you mean 'learned'?" in err and "recipe.train.epochs" in err and "2 fault(s)" in err
    assert not (tmp_path / "runs").exists()


def test_check_says_what_it_takes_for_a_name_on_the_hub(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    data = "data: {train: pairs.jsonl, tests: {bench: owner/pairs:test}}"
    (tmp_path / "mine.yml").write_text(f"output: o\nmodel: rm-a\n{data}\nbase: {{}}\n")
    code, out, _ = main("check", "mine.yml")
    absent = [line.split()[:2] for line in out.splitlines() if "looked for on the hub" in line]
    assert code == 0 and absent == [["model", "rm-a"], ["data.tests.bench", "owner/pairs:test"]]


SMALL = {
    "synthetic": {
        "train_pairs": 64,
        "validation_pairs": 24,
        "test_pairs": 24,
        "prompts": 4,
        "candidates": 4,
        "hidden_size": 16,
        "num_layers": 1,
    },
    "device": "cpu",
    "threads": 1,
    "base": {"learning_rate": 1e-3},
    "control": {"learning_rate": 1e-3},
    "train": {"learning_rate": 1e-3},
    "upcycle": {"num_routed_experts": 3, "num_experts_per_tok": 2},
    "fit": {"max_epochs": 1, "batch_size": 8},
    "also_merge": ["uniform"],
    "evaluate": {"resamples": 100},
}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run of the real stages by `moemerge run`, and what it printed."""
    root, out = tmp_path_factory.mktemp("run"), io.StringIO()
    (root / "recipe.yml").write_text(json.dumps({"output": str(root / "out"), **SMALL}))
    with redirect_stdout(out), pytest.raises(SystemExit) as ended:
        cli.main(["run", str(root / "recipe.yml")])
    assert ended.value.code == 0
    return root, out.getvalue()


def test_run_prints_steps_table_verdict_and_how_to_load(small_run: tuple[Path, str]) -> None:
    root, out = small_run
    steps = plan(load_recipe(root / "recipe.yml"))
    lines = out.splitlines()
    told = [line.split()[:2] for line in lines[: len(steps)]]
    assert told == [[f"[{n}/{len(steps)}]", step.name] for n, step in enumerate(steps, 1)]
    table = (root / "out/summary.md").read_text()
    for model in ("dense", "control", "moe", "merge-uniform", "merge-learned"):
        row = next(line for line in lines if line.startswith("|") and model in line.split("|")[1].split())
        assert row in table
    assert any(line.startswith("Did merging help here? merge-learned against control: ") for line in lines)


def test_the_printed_code_loads_and_scores_with_the_merged_model(small_run: tuple[Path, str]) -> None:
    _, out = small_run
    code = textwrap.dedent(out[out.index("  import torch\n") :])
    names: dict[str, Any] = {}
    exec(code.replace("print(reward", "value = (reward"), names)
    assert isinstance(names["value"], float)
    assert type(names["model"]).__name__ == "LlamaForSequenceClassification"
    assert names["model"].config.num_labels == 1 and names["tokenizer"].pad_token is not None


def test_the_run_has_a_page_of_everything(small_run: tuple[Path, str]) -> None:
    root, out = small_run
    assert f"Report: {root / 'out/report.html'}" in out.splitlines()
    page, text = ((root / f"out/report.{end}").read_text() for end in ("html", "md"))
    titles = re.findall(r"^## (.*)$", text, re.M)
    wanted = ["Summary", "Accuracy", "Best of n", "Training curves", "Routing", "Merge coefficients"]
    assert titles[0] == "Summary" and [title for title in titles if title in wanted] == wanted
    assert titles[-3:] == ["Models and data", "Steps", "Provenance"]
    assert [html.unescape(title) for title in re.findall(r"<h2[^>]*>(.*?)</h2>", page)] == titles
    for step in ("base", "control", "train", "fit-uniform", "fit-learned"):
        assert f">{step}: " in page
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        assert (root / "out" / picture).is_file()
    model = read_manifest(root / "out/evaluate")["inputs"]["models"]["moe"]
    assert model["sha256"][:16] in page and str(root) not in page + text


def test_python_finds_everything_valid_that_the_command_line_made(small_run: tuple[Path, str]) -> None:
    root, _ = small_run
    page = (root / "out/report.html").stat().st_mtime_ns
    report = moemerge.run_recipe(root / "recipe.yml")
    assert [step.reason for step in report.steps] == [None] * len(report.steps)
    assert report.page.stat().st_mtime_ns == page


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_with_the_same_model(
    small_run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart from times, which manifests and the run's report tell, and the run's own place.

    The name of its folder is as long as the other's.
    """
    root, _ = small_run
    (root / "killed.yml").write_text(json.dumps({"output": str(root / "end"), **SMALL}))
    save = PairTrainer._save_checkpoint

    def save_and_die(self: Any, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        if "/.train." in str(self.args.output_dir):  # not in control, which is trained before
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(PairTrainer, "_save_checkpoint", save_and_die)
        assert forked(lambda: cli.main(["run", str(root / "killed.yml")])).code == -signal.SIGKILL
    assert list(root.glob("end/.train.*.work/**/trainer_state.json")), "a checkpoint to go on from"
    assert not (root / "end/train").exists()
    report = moemerge.run_recipe(root / "killed.yml")
    ran = [step.name for step in report.steps if step.reason is not None]
    assert ran[0] == "train" and ran[-1] == "publish"
    for name in ("train", "merge-uniform", "merge-learned"):
        weights = [root / run / name / "model.safetensors" for run in ("out", "end")]
        assert weights[0].read_bytes() == weights[1].read_bytes(), name
    assert not list(root.glob("end/.*.tmp")) and not list(root.glob("end/.*.work"))
    reports = {root / run / f"report.{kind}" for run in ("out", "end") for kind in ("html", "md")}
    whole, again = (
        {
            str(path.relative_to(home)): path.read_bytes().replace(bytes(home), b"HOME")
            for path in home.rglob("*")
            if path.is_file() and path.name not in ("manifest.json", ".lock") and path not in reports
        }
        for home in (root / "out", root / "end")
    )
    assert {name for name in whole.keys() | again.keys() if whole.get(name) != again.get(name)} == set()


def test_a_stage_from_python_writes_what_the_command_line_wrote(
    small_run: tuple[Path, str], main: Main, tmp_path: Path
) -> None:
    root, _ = small_run
    given = read_manifest(root / "out/merge-learned")["options"]
    flags = ["--model", given["model"], "--coefficients", given["coefficients"]]
    assert main("merge", *flags, "--output", tmp_path / "cli")[0] == 0
    moemerge.merge(model=given["model"], coefficients=given["coefficients"], output=tmp_path / "python")
    whole = [fingerprint(folder)["sha256"] for folder in (tmp_path / "cli", tmp_path / "python")]
    assert whole == [fingerprint(root / "out/merge-learned")["sha256"]] * 2


# The package


def test_importing_and_asking_for_help_load_nothing_heavy() -> None:
    code = (
        "import sys, moemerge, moemerge.run.cli; "
        "[moemerge.run.flags.flags(row.command) for row in moemerge.run.cli.ROWS]; "
        "print(sorted({'torch', 'transformers', 'mergekit', 'numpy', 'wrapt'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr


HEAVY = {
    "datasets", "huggingface_hub", "matplotlib", "mergekit", "numpy", "peft", "scipy", "tokenizers", "torch",
    "transformers", "trl",
}  # fmt: skip
SHOWS = {"numpy", "scipy", "matplotlib"}
# What each command may import of these, where no model is built. Commands of a row run one after the other in
# one process, so each may import what those before it may.
MAY_IMPORT: list[dict[str, set[str]]] = [
    {"check": set(), "verify": {"numpy"}, "compare": SHOWS, "publish": {*SHOWS, "huggingface_hub"}},
    {"merge": {"numpy", "torch"}, "export": {"numpy", "torch"}},
]
STARTED = """
import json, sys
from moemerge.run.cli import main
heavy, commands = json.loads(sys.argv[1])
for command in commands:
    try:
        main(command)
    except SystemExit as end:
        assert not end.code, command
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules} & set(heavy)))
"""


def test_commands_import_only_what_they_need(small_run: tuple[Path, str], tmp_path: Path) -> None:
    root, home = small_run[0], small_run[0] / "out"
    merged = read_manifest(home / "merge-learned")["options"]
    members = ["--model", merged["model"], "--coefficients", merged["coefficients"]]
    given = {
        "check": [root / "recipe.yml"],
        "verify": [merged["coefficients"]],
        "compare": ["--runs", home / "evaluate"],
        "publish": ["--model", home / "merge-learned", "--evaluation", home / "evaluate"],
        "merge": members,
        "export": members,
    }
    found: dict[str, set[str]] = {}
    for row in MAY_IMPORT:
        outputs = {name: ["--output", tmp_path / name] for name in row if name not in ("check", "verify")}
        commands = [[name, *map(str, [*given[name], *outputs.get(name, [])])] for name in row]
        command = [sys.executable, "-c", STARTED, json.dumps([sorted(HEAVY), commands])]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        lines = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith("imported:")]
        found |= {name: set(line) for name, line in zip(row, lines, strict=True)}
    allowed = {name: names for row in MAY_IMPORT for name, names in row.items()}
    assert {name: more for name in given if (more := found[name] - allowed[name])} == {}


@pytest.mark.parametrize("name", [name for name in moemerge.__all__ if name != "__version__"])
def test_public_names_are_what_they_say(name: str) -> None:
    value = getattr(moemerge, name)
    assert callable(value), "a function or class, not the module of the same name"


def test_version_is_the_installed_one() -> None:
    try:
        installed = metadata.version("moemerge")
    except metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout that is not installed")
    assert moemerge.__version__ == installed
    assert f'version = "{installed}"' in (ROOT / "pyproject.toml").read_text()


def test_stage_names_stay_functions_after_their_modules_are_imported() -> None:
    for row in ROWS:
        home, name = row.function.split(":")
        assert getattr(importlib.import_module(home), name) is getattr(moemerge, name)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'upcicle'"):
        moemerge.upcicle  # noqa: B018

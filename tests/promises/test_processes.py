"""Stages that several processes do together: what one process makes, one message, nothing half-written."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from processes import ROOT, ranks, torchrun
from safetensors.torch import load_file
from small_moe import make_moe, random_pairs, write_rows
from small_policy import save_policy

from moemerge.artifacts import checksums
from moemerge.artifacts.ranks import refuse_several
from moemerge.errors import OptionError
from moemerge.models import scoring
from moemerge.models.loading import load_reward_model
from moemerge.models.routing import RoutingStatistics
from moemerge.options.placement import Placement
from moemerge.run.cli import cli
from moemerge.stages import STAGES

ROUNDED = {"route": {"statistics.safetensors", "routing.json", "routing.md", "gate_mass.png"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoE, the dense model that it was made from, and pairs of unequal lengths."""
    home = tmp_path_factory.mktemp("together")
    make_moe(home / "moe")
    write_rows(home / "pairs.jsonl", random_pairs(23, subsets=("a", "b")))
    save_policy(home / "policy")
    return home


def flags_of(stage: str, home: Path) -> list[str]:
    """What the stage is asked to do, in small batches, of which each process gets several."""
    pairs, small = str(home / "pairs.jsonl"), ["--batch-tokens", "60", "--threads", "1"]
    one = ["--model", str(home / "moe"), "--pairs", pairs]
    several = ["--models", f"moe={home / 'moe'}", f"dense={home / 'dense-moe'}", "--pairs", pairs]
    known = {
        "attack": [*one, "--steps", "2", "--proposals", "3", "--resamples", "100"],
        "calibrate": [*several, "--resamples", "100"],
        "evaluate": [*several, "--resamples", "100"],
        "route": one,
        "sample": [
            "--model",
            str(home / "policy"),
            "--prompts",
            pairs,
            "--per-prompt",
            "3",
            "--max-new-tokens",
            "4",
        ],
    }
    return [stage, *known[stage], *small]


def alone(stage: str, home: Path) -> Path:
    """What one process makes of it, in this one."""
    output = home / f"{stage}-alone"
    cli.main([*flags_of(stage, home), "--output", str(output)], standalone_mode=False)
    return output


def hashes_nothing(rank: int) -> None:
    """Have any but the first process fail where it reads inputs for their checksums."""
    if rank:
        monkey = pytest.MonkeyPatch()
        monkey.setattr(checksums, "_file_record", None)


@pytest.mark.parametrize("stage", ["attack", "calibrate", "evaluate", "route", "sample"])
def test_several_processes_make_what_one_makes(stage: str, home: Path) -> None:
    """Batches are the same ones, so that scores have the same bits, and so has all that is made of them."""
    one = alone(stage, home)
    two = home / f"{stage}-two"
    done = ranks([*flags_of(stage, home), "--output", str(two)], hashes_nothing)
    assert {ended.code for ended in done} == {0}, [ended.err[-3000:] for ended in done]
    assert done[0].out and not done[1].out and not done[1].err, "the first one tells"
    ours, theirs = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, two))
    assert ours.keys() == theirs.keys()
    differing = {name for name in ours if ours[name] != theirs[name]}
    # Manifests and pages tell times; sums that routing adds up differ by the order of what is added.
    assert differing <= {"manifest.json", "report.html"} | ROUNDED.get(stage, set())


@pytest.mark.parametrize("stage", ["calibrate", "evaluate", "route"])
def test_parts_of_a_model_make_what_the_whole_makes(stage: str, home: Path, tmp_path: Path) -> None:
    """Each of two processes holds half of each weight; they run unequal numbers of batches of their own."""
    one, two = home / f"{stage}-alone", tmp_path / "two"
    if not one.exists():
        alone(stage, home)
    done = ranks([*flags_of(stage, home), "--sharded", "--output", str(two)])
    assert {ended.code for ended in done} == {0}, [ended.err[-3000:] for ended in done]
    if stage == "route":
        ours, theirs = (RoutingStatistics.load(folder) for folder in (one, two))
        assert torch.equal(ours.total().selections_LN, theirs.total().selections_LN)
        torch.testing.assert_close(ours.total().gate_LN, theirs.total().gate_LN)
    elif stage == "evaluate":
        scores = [load_file(folder / "scores.safetensors") for folder in (one, two)]
        for name, tensor in scores[0].items():
            torch.testing.assert_close(tensor, scores[1][name])
        reports = [json.loads((folder / "report.json").read_text())["models"]["moe"] for folder in (one, two)]
        assert reports[0]["parameters"] == reports[1]["parameters"]
    else:
        scales = [json.loads((folder / "calibration.json").read_text()) for folder in (one, two)]
        assert scales[0]["models"]["moe"]["scale"] == pytest.approx(scales[1]["models"]["moe"]["scale"])


@pytest.mark.parametrize("stage", ["evaluate", "route"])
def test_a_model_in_memory_and_in_its_files_makes_what_one_in_memory_makes(
    stage: str,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the MoE has room, and of the dense model all: the same bits, and nothing is left of it."""
    one, parts = home / f"{stage}-alone", tmp_path / "parts"
    if not one.exists():
        alone(stage, home)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    flags = ["--device-map", "auto", "--max-memory", "cpu=0.0002"]
    cli.main([*flags_of(stage, home), *flags, "--output", str(parts)], standalone_mode=False)
    assert re.search(r"moe: [\d.]+ kB in memory, [\d.]+ kB in its files", capsys.readouterr().err)
    ours, theirs = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, parts))
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing <= {"manifest.json", "report.html", "report.md"}, "these tell times and options"
    gc.collect()
    assert not any((tmp_path / "temporary").glob("moemerge-*"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--device-map", "auto", "--sharded"], "device_map auto for one"),
        (["--max-memory", "cpu=1"], "goes with device_map auto"),
        (["--device-map", "auto", "--max-memory", "gpu=1"], "not 'gpu'"),
        (
            ["--device-map", "auto", "--max-memory", "0=1", "--device", "cpu"],
            "names a device that is not used",
        ),
    ],
)
def test_places_that_do_not_go_together_are_refused(
    flags: list[str], told: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=told):
        cli.main([*flags_of("route", home), *flags, "--output", str(tmp_path / "out")], standalone_mode=False)


def test_a_model_is_held_in_the_precision_asked_for_and_has_no_plan_that_names_what_it_lacks(
    home: Path,
) -> None:
    model = load_reward_model(str(home / "moe"), "cpu", placement=Placement(precision="bfloat16"))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.base_model_tp_plan is None and not model.tp_plan
    assert "_plan" not in (home / "moe/config.json").read_text()


def test_counts_of_several_processes_have_the_same_bits(home: Path) -> None:
    """Counts are whole numbers; other sums differ by the order of what is added."""
    one, two = (RoutingStatistics.load(home / f"route-{way}") for way in ("alone", "two"))
    assert one.groups.keys() == two.groups.keys() and len(one.groups) == 4
    for group, sums in one.groups.items():
        for name, value in vars(sums).items():
            other = vars(two.groups[group])[name]
            if name in ("selections_LN", "tokens_L", "together_LNN"):
                assert torch.equal(value, other), name
            torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)


def test_a_gold_function_is_called_by_one_process(home: Path, tmp_path: Path) -> None:
    code = f"""import os
def gold(prompt, answer):
    with open({str(tmp_path / "calls")!r}, "a") as file:
        file.write(os.environ["RANK"])
    return float(len(answer))
"""
    (tmp_path / "gold.py").write_text(code)
    rows = [
        {"prompt": "w1 ", "candidates": [{"text": f"w{n} w{n + 1}"} for n in range(k, k + 3)]} for k in (3, 9)
    ]
    (tmp_path / "sets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["evaluate", "--models", f"m={home / 'dense-moe'}", "--candidates", str(tmp_path / "sets.jsonl")]
    flags += ["--gold-function", f"{tmp_path / 'gold.py'}:gold", "--resamples", "100"]
    done = ranks([*flags, "--output", str(tmp_path / "out")])
    assert {ended.code for ended in done} == {0}, [ended.err[-3000:] for ended in done]
    assert set((tmp_path / "calls").read_text()) == {"0"}


def evaluated(home: Path, output: Path) -> list[str]:
    return [*flags_of("evaluate", home), "--output", str(output)]


def test_a_fault_that_all_find_is_told_once(home: Path, tmp_path: Path) -> None:
    done = ranks([*evaluated(home, tmp_path / "out"), "--device", "cuda:7"])
    assert [ended.code for ended in done] == [2, 2]
    assert sum(ended.err.count("to fix:") for ended in done) == 1
    assert not any(tmp_path.iterdir())


def test_a_stage_for_one_process_says_so_once(home: Path, tmp_path: Path) -> None:
    done = ranks(["upcycle", "--model", str(home / "dense-moe"), "--output", str(tmp_path / "out")])
    assert [ended.code for ended in done] == [2, 2]
    assert sum(ended.err.count("upcycle does not share its work") for ended in done) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_with_one_line(rank: int, home: Path, tmp_path: Path) -> None:
    """Nothing is left of it, and the same command does it all in one process then."""

    def dies(number: int) -> None:
        if number == rank:
            scoring.batches = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    done = ranks(evaluated(home, tmp_path / "out"), dies)
    assert done[rank].code == -signal.SIGKILL and done[1 - rank].code == 2
    assert done[1 - rank].err.count("another of the processes that work together has ended") == 1
    assert "Traceback" not in done[1 - rank].err
    assert not (tmp_path / "out").exists()
    cli.main(evaluated(home, tmp_path / "out"), standalone_mode=False)
    assert load_file(tmp_path / "out" / "scores.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fault_of_one_process_is_told_by_it_alone(home: Path, tmp_path: Path) -> None:
    """Another one, which waits for it, ends with no message of its own."""

    def lacks_memory(number: int) -> None:
        if number == 1:

            def batches(*_: object) -> None:
                raise MemoryError("of this one")

            scoring.batches = batches

    done = ranks(evaluated(home, tmp_path / "out"), lacks_memory)
    assert [ended.code for ended in done] == [2, 2]
    assert "too little memory" in done[1].err and "ended" not in done[0].err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path", (ROOT / "merge_configs/accelerate").glob("*.yaml"), ids=lambda path: path.stem
)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes > 1 and not config.use_cpu
    assert config.mixed_precision == "no", "the option precision decides"


@pytest.mark.slow
def test_torchrun_itself(home: Path, tmp_path: Path) -> None:
    done = torchrun(evaluated(home, tmp_path / "out"))
    assert done[0].code == 0, done[0].err[-3000:]
    assert done[0].out.count("Report:") == 1
    faulty = torchrun([*evaluated(home, tmp_path / "again"), "--baseline", "nobody"])
    assert faulty[0].code != 0 and faulty[0].err.count("to fix:") == 1


def test_the_error_names_the_stages_that_take_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError) as caught:
        refuse_several("merge")
    named = caught.value.expected.removeprefix("one process; several do ").replace(" and ", ", ")
    assert named.split(", ") == sorted(name for name in STAGES if STAGES.get(name).shares_work)

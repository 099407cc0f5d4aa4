"""The stage evaluate: one report over several models on the same rows."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_dense, tiny_tokenizer

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.pairs import Pair
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import encode
from moemerge.errors import DataError, OptionError
from moemerge.evaluation.report import read_report
from moemerge.evaluation.sets import EvaluationSet, by_kind, probe_inputs
from moemerge.models.cost import parameters
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.scorers import classifier
from moemerge.options.base import TextFormat
from moemerge.options.evaluate import Evaluate
from moemerge.run import cli
from moemerge.stages.evaluate import evaluate
from moemerge.stages.upcycle import upcycle


def words(draw: random.Random, longest: int = 20) -> str:
    return " ".join(f"w{draw.randrange(61)}" for _ in range(draw.randrange(1, longest)))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two dense models and a MoE, 60 pairs (one of them long), 8 prompts with 6 candidates."""
    folder, draw = tmp_path_factory.mktemp("world"), random.Random(0)
    dense = save_dense(folder / "dense", seed=0)
    other = save_dense(folder / "other", family="qwen3", seed=1)
    upcycle(model=str(dense), output=folder / "moe", num_routed_experts=4, num_experts_per_tok=1)
    pairs = [
        {
            "prompt": words(draw),
            "chosen": " " + words(draw),
            "rejected": " w1 " + words(draw),
            "subset": f"s{i % 2}",
        }
        for i in range(60)
    ]
    pairs[7]["chosen"] = " w5" * 90
    candidates = [
        {
            "prompt": words(draw),
            "candidates": [{"text": f" {i} {words(draw)}", "score": draw.random()} for i in range(6)],
        }
        for _ in range(8)
    ]
    return {
        "models": {"dense": str(dense), "other": str(other), "moe": str(folder / "moe")},
        "pairs": {"test": write(folder / "pairs.jsonl", pairs)},
        "candidates": {"bon": write(folder / "candidates.jsonl", candidates)},
        "max_length": 80,
        "bad_rows": "skip",
        "resamples": 100,
    }


@pytest.fixture(scope="module")
def evaluated(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate(**world, output=tmp_path_factory.mktemp("evaluated") / "e")


def test_every_number_of_the_report_has_a_type(evaluated: Path) -> None:
    """A report that is read again loses what no type names."""
    written = json.loads((evaluated / "report.json").read_text())
    assert json.loads(json.dumps(read_report(evaluated))) == written


def test_report_agrees_with_scores_made_one_by_one(world: dict[str, Any], evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    scores = load_file(evaluated / "scores.safetensors")
    pairs, _ = read_pairs(world["pairs"]["test"], TextFormat())
    kept = [pair for pair in pairs if pair.row != 8]
    assert scores["pairs/test/rows"].tolist() == [pair.row for pair in kept for _ in range(2)]
    model, tokenizer = (
        load_reward_model(world["models"]["dense"], "cpu"),
        load_tokenizer(world["models"]["dense"]),
    )
    with torch.no_grad():
        expected = [
            model(torch.tensor([encode(tokenizer, pair.prompt, answer).ids])).logits[0, 0].item()
            for pair in kept
            for answer in (pair.chosen, pair.rejected)
        ]
    np.testing.assert_allclose(scores["pairs/test/model/dense"], expected, atol=1e-5)
    right = np.reshape(expected, (-1, 2))
    part = report["probes"]["accuracy"]["sets"]["test"]["all"]
    assert part["pairs"] == 59
    assert part["models"]["dense"]["accuracy"] == pytest.approx((right[:, 0] > right[:, 1]).mean())
    assert report["rows"]["pairs/test"]["bad"] == {"longer than 80 tokens": {"count": 1, "rows": [8]}}


def test_max_pairs_draws_pairs_that_every_model_can_read(world: dict[str, Any], tmp_path: Path) -> None:
    models = {"dense": world["models"]["dense"]}
    given = world | {"models": models, "candidates": {}, "probes": ["accuracy"], "max_pairs": 58}
    out = evaluate(**given, output=tmp_path / "e")
    rows = load_file(out / "scores.safetensors")["pairs/test/rows"].tolist()[::2]
    assert len(set(rows)) == 58 and 8 not in rows and rows == sorted(rows)
    summary = json.loads((out / "report.json").read_text())["rows"]["pairs/test"]
    looked_at = 60 - summary["not_drawn"]
    assert summary["kept"] == 58 and looked_at - 58 == sum(bad["count"] for bad in summary["bad"].values())
    assert json.loads(json.dumps(read_report(out))) == json.loads((out / "report.json").read_text())


def test_an_upcycled_model_is_measured_like_its_dense_model(evaluated: Path) -> None:
    probes = json.loads((evaluated / "report.json").read_text())["probes"]
    accuracy = probes["accuracy"]["sets"]["test"]["all"]["models"]
    gold = probes["best_of_n"]["sets"]["bon"]["models"]
    assert accuracy["moe"]["loss"] == pytest.approx(accuracy["dense"]["loss"], abs=1e-5)
    assert gold["moe"]["gold"] == pytest.approx(gold["dense"]["gold"], abs=1e-5)
    assert gold["other"]["gold"] != pytest.approx(gold["dense"]["gold"], abs=1e-5)
    assert accuracy["moe"]["vs_baseline"]["right_alone"] == 0


def test_files_and_manifest(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    assert report["plots"] == ["accuracy.png", "calibration.png", "best_of_n_bon.png"]
    assert all((evaluated / plot).stat().st_size > 1000 for plot in report["plots"])
    text = (evaluated / "report.md").read_text()
    assert "### Accuracy on test" in text and "### Gold score of the best of n on bon" in text
    results = read_manifest(evaluated)["results"]
    measured = report["probes"]["accuracy"]["sets"]["test"]["all"]["models"]
    assert results["main"]["accuracy"]["test"] == {name: n["accuracy"] for name, n in measured.items()}
    assert results["main"]["best_of_n_gold"]["bon"]["n"] == 6


def test_parameters_count_what_a_token_uses(world: dict[str, Any]) -> None:
    dense = parameters(load_reward_model(world["models"]["dense"], "cpu"))
    moe = parameters(load_reward_model(world["models"]["moe"], "cpu"))
    mlp, routers = 3 * 3 * 32 * 48, 3 * 4 * 32
    assert dense["parameters"] == dense["active_parameters"]
    assert moe["parameters"] == dense["parameters"] + 4 * mlp + routers
    assert moe["active_parameters"] == dense["parameters"] + mlp + routers


def test_equal_prompts_make_one_cluster_and_empty_ones_none() -> None:
    prompts = ["w1", "w2", "w1", "", "", [], [{"role": "user", "content": "w1"}]]
    some = [Pair(prompt, "abcdefg"[row], "bcd", row=row) for row, prompt in enumerate(prompts)]
    one = EvaluationSet("pairs", "test", some, {}, {})
    scores = probe_inputs([one], {"m": [torch.arange(14.0)]})["pairs"]["test"]
    assert scores.prompts.tolist() == [0, 1, 0, 2, 3, 4, 5]
    assert scores.lengths[0].tolist() == [1, 3] and scores.scores["m"][1].tolist() == [2, 3]


def test_rows_too_long_for_one_tokenizer_are_dropped_for_all(world: dict[str, Any], tmp_path: Path) -> None:
    """`wide` needs a token per letter, so more rows are too long for it."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    wide = save_dense(tmp_path / "wide")
    tokenizer.save_pretrained(wide)
    models = {"dense": world["models"]["dense"], "wide": str(wide)}
    out = evaluate(**{**world, "models": models, "candidates": {}}, output=tmp_path / "e")
    scores = load_file(out / "scores.safetensors")
    rows = [pair.row for pair in read_pairs(world["pairs"]["test"], TextFormat())[0]]
    kept = scores["pairs/test/rows"][::2].tolist()
    assert 0 < len(kept) < 59 and set(kept) < set(rows)
    assert len(scores["pairs/test/model/dense"]) == len(scores["pairs/test/model/wide"]) == 2 * len(kept)
    report = json.loads((out / "report.json").read_text())
    assert sum(bad["count"] for bad in report["rows"]["pairs/test"]["bad"].values()) == 60 - len(kept)
    assert "best_of_n" not in report["probes"]


def test_only_probes_that_were_asked_for_are_missed(
    world: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"dense": world["models"]["dense"]}
    some = {**world, "models": models, "candidates": {}}
    evaluate(**some, output=tmp_path / "e")
    assert "is left out" not in caplog.text
    evaluate(**some, probes=["accuracy", "best_of_n"], output=tmp_path / "f")
    assert "best_of_n is left out" in caplog.text


def test_the_command_line_tells_of_a_plain_model(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that moemerge did not make, alone, on pairs: table, how it stands, where the report is."""
    arguments = ["evaluate", "--models", f"rm={world['models']['other']}", "--resamples", "100"]
    arguments += ["--pairs", f"test={world['pairs']['test']}", "--max-length", "80", "--bad-rows", "skip"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--output", str(tmp_path / "e")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert ended.value.code == 0 and lines[0] == f"{tmp_path / 'e'}  1 model"
    assert [line.split()[1] for line in lines[1:4:2]] == ["model", "rm"]
    assert (
        lines[4].startswith("rm: accuracy 0.") and " on test (0." in lines[4] and " chance (0.5)" in lines[4]
    )
    assert lines[5] == f"Report: {tmp_path / 'e/report.html'}"
    page = (tmp_path / "e/report.md").read_text()
    assert f"**{lines[4]}**" in page and "aseline" not in page.split("## Provenance")[0]


def test_models_with_the_same_weights_are_told_and_scored_once(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = classifier.load_reward_model

    def spy(folder: ModelFolder, *rest: Any, **more: Any) -> Any:
        loaded.append(Path(folder.source).name)
        return load(folder, *rest, **more)

    monkeypatch.setattr(classifier, "load_reward_model", spy)
    copy = shutil.copytree(world["models"]["dense"], tmp_path / "copy")
    (copy / "README.md").write_text("a copy")
    models = {"rm": world["models"]["dense"], "copy": str(copy), "moe": world["models"]["moe"]}
    given = {**world, "models": models, "candidates": {}, "probes": ["accuracy", "calibration", "length"]}
    folder = evaluate(**given, output=tmp_path / "e")
    assert read_report(folder)["equal_models"] == [["rm", "copy"]]
    page = (folder / "report.md").read_text()
    assert "copy is rm: the same weights, byte for byte." in page and "| rm = copy |" in page
    numbers = page.split("## Models and data")[0]
    assert "| copy |" not in numbers and numbers.count("| rm ") > numbers.count("| rm = copy ") == 1
    part = read_report(folder)["probes"]["accuracy"]["sets"]["test"]["all"]
    told = {(c["first"], c["second"]): c for c in part["comparisons"]}
    assert part["models"]["copy"]["accuracy"] == part["models"]["rm"]["accuracy"]
    # What is said of a copy is the same comparison, so one is left for Holm's correction to count.
    assert {c["tests"] for c in told.values()} == {1} and told["rm", "copy"]["p"] == 1
    assert told["rm", "moe"]["p_holm"] == told["copy", "moe"]["p_holm"] == told["rm", "moe"]["p"]
    assert loaded == [Path(models["rm"]).name, "moe"]
    scores = load_file(folder / "scores.safetensors")
    assert torch.equal(scores["pairs/test/model/copy"], scores["pairs/test/model/rm"])


def test_the_first_screen_has_gold_against_kl_and_details_are_folded(evaluated: Path) -> None:
    page, text = (evaluated / "report.html").read_text(), (evaluated / "report.md").read_text()
    first = page[page.index('<section id="s1"') : page.index('<section id="s2"')]
    assert first.index("gold score against KL") < first.index("<table")
    assert "cannot show a difference" in first
    assert text.count("](best_of_n_bon.png)") == 1
    folded = "".join(re.findall(r"<details>.*?</details>", page, re.S))
    assert "Pairwise comparisons on test" in folded and "checksum" in folded and "Main numbers" not in folded


def test_data_whose_columns_tell_what_it_is(world: dict[str, Any], evaluated: Path, tmp_path: Path) -> None:
    """Pairs and candidates given as `data` are scored as when they are given by their kinds."""
    sources = world["pairs"] | world["candidates"]
    out = evaluate(**{**world, "pairs": {}, "candidates": {}}, data=sources, output=tmp_path / "e")
    found, expected = (load_file(one / "scores.safetensors") for one in (out, evaluated))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"chosen": "a", "rejected": "b"}, "pairs"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": []}, "pairs"),
        ({"prompt": "a", "candidates": []}, "candidates"),
        ({"prompt": "a", "answers": []}, "candidates"),
        ({"chosen": "a", "rejected": "b", "chosen_model": "", "rejected_model": ""}, "pairs"),
        (
            {"chosen": "a", "rejected": "b", "chosen_model": "", "rejected_model": "", "subset": "x"},
            "rewardbench",
        ),
        ({"chosen": ["a"], "rejected": ["b"]}, "rewardbench"),
    ],
)
def test_columns_tell_the_kind(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    fields = {"candidates": "answers"} if "answers" in row else {}
    source = write(tmp_path / "rows.jsonl", [row])
    options = Evaluate(models={"a": "a"}, data={"x": source}, fields=fields, output=tmp_path / "e")
    found = by_kind(options)
    assert getattr(found, kind) == {"x": source} and options.pairs == {}
    assert sum(len(getattr(found, one)) for one in ("pairs", "candidates", "rewardbench")) == 1


def test_faults(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'dense'"):
        evaluate(**world, baseline="dens", output=tmp_path / "e")
    with pytest.raises(OptionError, match="unknown probe"):
        evaluate(**world, probes=["accuracies"], output=tmp_path / "e")
    with pytest.raises(OptionError, match="nothing to evaluate"):
        evaluate(**{**world, "candidates": {}}, probes=["best_of_n"], output=tmp_path / "e")
    with pytest.raises(OptionError, match="two sets of pairs have one name"):
        evaluate(**world, data=world["pairs"], output=tmp_path / "e")
    with pytest.raises(DataError, match="longer than 80"):
        evaluate(**{**world, "bad_rows": "refuse"}, output=tmp_path / "e")
    assert not list(tmp_path.iterdir())

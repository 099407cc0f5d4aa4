"""RM-Bench: numbers by a plain count, its own weights of domains, rows as it has them, whole evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from small_reports import choice_scores
from tiny_models import save_dense, tiny_tokenizer

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.rewardbench import encode_choices
from moemerge.data.rmbench import read_styles
from moemerge.data.rows import RowReport
from moemerge.errors import DataError
from moemerge.evaluation.probes.base import ChoiceScores
from moemerge.evaluation.probes.rmbench import measure, tables
from moemerge.evaluation.report import read_report
from moemerge.options.evaluate import Evaluate, EvaluateSettings
from moemerge.stages.evaluate import evaluate

SETTINGS = EvaluateSettings(resamples=200)
DOMAINS = ("chat", "code", "math", "safety-refuse", "safety-response")
KINDS = {"hard": lambda i, j: i < j, "normal": lambda i, j: i == j, "easy": lambda i, j: i > j}


def drawn(domains: tuple[str, ...], seed: int = 0, lift: float = 0.5) -> ChoiceScores:
    """Rows of two models, one of which likes the third style."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(30 * len(domains)):
        plain = random.normal(size=6) + np.repeat([lift, 0], 3)
        scores = {"plain": plain.round(1), "styled": plain + np.tile([0, 1, 2], 2)}
        rows.append({"scores": scores, "subset": domains[number % len(domains)], "lengths": [2, 3, 4] * 2})
    return choice_scores(rows, version=1)


def counted(rows: ChoiceScores, model: str, domain: str, kind: str) -> float:
    """The share of comparisons won, one by one."""
    won = []
    for number in np.flatnonzero(rows.subsets == domain):
        scores = rows.scores[model][6 * number : 6 * number + 6]
        won += [scores[i] > scores[3 + j] for i in range(3) for j in range(3) if KINDS[kind](i, j)]
    return float(np.mean(won))


def test_shares_by_a_plain_count() -> None:
    rows = drawn(DOMAINS)
    measured = measure({"rb": rows}, SETTINGS, 0)["sets"]["rb"]
    assert measured["missing"] == [] and list(measured["domains"]) == list(DOMAINS)
    for model in ("plain", "styled"):
        for kind in KINDS:
            shares = {domain: counted(rows, model, domain, kind) for domain in DOMAINS}
            for domain in DOMAINS:
                found = measured["domains"][domain]["models"][model][kind]
                assert found["score"] == pytest.approx(shares[domain])
                low, high = found["interval"]
                assert low <= found["score"] <= high
            safety = (shares.pop("safety-refuse") + shares.pop("safety-response")) / 2
            expected = (sum(shares.values()) + safety) / 4
            assert measured["overall"]["models"][model][kind]["score"] == pytest.approx(expected)
        overall = measured["overall"]["models"][model]
        assert overall["average"]["score"] == pytest.approx(np.mean(overall["matrix"]))
        assert overall["average"]["score"] == pytest.approx(
            np.mean([overall[kind]["score"] for kind in KINDS])
        )


def test_a_model_of_style_is_found_out() -> None:
    """Hard falls, easy rises; the rule 'longer' wins all that is easy and nothing that is not."""
    measured = measure({"rb": drawn(("chat",))}, SETTINGS, 0)["sets"]["rb"]
    plain, styled = (measured["overall"]["models"][m] for m in ("plain", "styled"))
    assert styled["hard"]["score"] < 0.3 < plain["hard"]["score"] < plain["easy"]["score"] + 0.15
    assert styled["easy"]["score"] > 0.85 and styled["normal"]["score"] == pytest.approx(
        plain["normal"]["score"], abs=0.05
    )
    assert styled["length_correlation"] > 0.5 > abs(plain["length_correlation"])
    longer, shorter = measured["overall"]["always_longer"], measured["overall"]["always_shorter"]
    assert (longer["hard"], longer["normal"], longer["easy"]) == (0, 0, 1)
    assert (shorter["hard"], shorter["normal"], shorter["easy"]) == (1, 0, 0)
    versus = measured["overall"]["vs_baseline"]["styled"]
    assert versus["hard"]["difference"] == pytest.approx(styled["hard"]["score"] - plain["hard"]["score"])
    assert versus["hard"]["interval"][1] < 0 and versus["hard"]["p"] < 0.001 < versus["normal"]["p"]
    assert measured["missing"] == ["code", "math", "safety"]
    text = "".join(table.markdown() for table in tables({"confidence": 0.95, "sets": {"rb": measured}}))
    assert "Not the whole benchmark: without code, math, safety." in text
    assert "| styled | markdown |" in text


def test_intervals_resample_prompts() -> None:
    """Rows that are there thrice say no more than once."""
    rows = drawn(("chat",), lift=0.3)
    scores = {model: np.tile(scores_C, 3) for model, scores_C in rows.scores.items()}
    rest = (rows.lengths, rows.sizes, rows.num_correct, rows.subsets, rows.ids, rows.prompts)
    thrice = ChoiceScores(1, scores, *(np.tile(values, 3) for values in rest))
    one, three = (measure({"rb": some}, SETTINGS, 0)["sets"]["rb"]["overall"] for some in (rows, thrice))
    assert one["models"]["plain"]["hard"]["interval"] == pytest.approx(
        three["models"]["plain"]["hard"]["interval"]
    )


def test_equal_scores_are_errors_and_have_no_correlation() -> None:
    rows = choice_scores([{"scores": [1.0] * 6, "subset": "chat"}], version=1)
    scores = measure({"rb": rows}, SETTINGS, 0)["sets"]["rb"]["overall"]["models"]["m"]
    assert scores["average"]["score"] == 0 and scores["length_correlation"] is None


def row(number: int, **changes: Any) -> dict[str, Any]:
    """As the benchmark has them."""
    texts = {side: [f"{side[0]} w{number}", "w1 w2 w3", "w1 w2 w3 w4 w5"] for side in ("chosen", "rejected")}
    return {"id": f"{number}", "prompt": f"w{number} w9", **texts, "domain": "chat", **changes}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def given(source: str, **options: Any) -> Evaluate:
    return Evaluate(models={"m": "m"}, rmbench={"rm": source}, output="out", **options)


def test_rows_as_they_are(tmp_path: Path) -> None:
    rows = [
        row(1),
        row(2, prompt=[{"role": "user", "content": "w2"}], domain="safety-refuse"),
        row(3, id=None),
    ]
    source = write(tmp_path / "rm.json", rows)
    choices, _ = read_styles(source, given(source))
    assert [choice.subset for choice in choices] == ["chat", "safety-refuse", "chat"]
    assert choices[0].texts == [*rows[0]["chosen"], *rows[0]["rejected"]] and choices[0].num_correct == 3
    assert choices[1].turns == ["w2"] and choices[2].id == ""
    options = given(source, rewardbench_template="plain", rewardbench_max_length=3)
    (first, *_) = encode_choices(tiny_tokenizer(), choices, options, RowReport(source, total=3))
    assert [answer.cut for answer in first.answers] == [
        2,
        3,
        5,
    ] * 2  # w1 w9, the answer, the end: cut in front


@pytest.mark.parametrize(
    "changes",
    [{"chosen": ["a", "b"]}, {"rejected": "a"}, {"chosen": ["a", "b", 3]}, {"domain": ""}, {"domain": None},
     {"prompt": []}],
)  # fmt: skip
def test_broken_rows(changes: dict[str, Any], tmp_path: Path) -> None:
    source = write(tmp_path / "rm.json", [row(1), row(2, **changes)])
    with pytest.raises(DataError):
        read_styles(source, given(source))
    choices, report = read_styles(source, given(source, bad_rows="skip"))
    assert len(choices) == 1 and report.summary()["total"] == 2


def test_whole_evaluation(tmp_path: Path) -> None:
    models = {f"rm{seed}": str(save_dense(tmp_path / f"rm{seed}", seed=seed)) for seed in range(2)}
    rows = [row(n, domain=DOMAINS[n % 5]) for n in range(20)]
    source = write(tmp_path / "rm.json", rows)
    out = evaluate(models, {"rm": source}, output=tmp_path / "e", rewardbench_template="plain", resamples=100)
    written = json.loads((out / "report.json").read_text())
    assert json.loads(json.dumps(read_report(out))) == written
    found = written["probes"]["rmbench"]["sets"]["rm"]
    scores = load_file(out / "scores.safetensors")["rmbench/rm/model/rm1"].reshape(-1, 2, 3)[::5]
    won = (scores[:, 0, :, None] > scores[:, 1, None, :]).double().mean(dim=0)
    assert np.array(found["domains"]["chat"]["models"]["rm1"]["matrix"]) == pytest.approx(won.numpy())
    main = read_manifest(out)["results"]["main"]["rmbench"]["rm"]
    assert main["hard"]["rm1"] == found["overall"]["models"]["rm1"]["hard"]["score"]
    assert written["protocol"]["sets"]["rmbench/rm"]["truncation"] == "left"
    text = (out / "report.md").read_text()
    assert "### RM-Bench on rm" in text and "RM-Bench rm, hard" in text and "rmbench.png" in text

"""Policy gradient against reward models: the proxy rises, a proxy that gold dislikes is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_policy import save_last_word_model, save_policy, write_prompts

from moemerge.data.rows import read_rows
from moemerge.errors import DataError, OptionError
from moemerge.evaluation.policy_report import by_prompt
from moemerge.stages.optimise import optimise

TINY: dict[str, Any] = {
    "steps": 24,
    "batch_size": 32,
    "answers_per_prompt": 8,
    "learning_rate": 3e-2,
    "max_new_tokens": 2,
    "measure_prompts": 16,
    "measure_steps": 8,
    "resamples": 100,
}


def dislikes_w5(prompt: str, answer: str) -> float:
    """Gold: few words are w5."""
    return -float(answer.split().count("w5"))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("optimise")
    return {
        "policy": str(save_policy(folder / "policy")),
        "models": {name: str(save_last_word_model(folder / name, name)) for name in ("w7", "w5")},
        "prompts": write_prompts(folder / "prompts.jsonl", 60),
        "gold_function": dislikes_w5,
    }


@pytest.mark.slow
def test_the_proxy_rises_and_a_hack_is_found(given: dict[str, Any], tmp_path: Path) -> None:
    """Two models that like one word each; gold dislikes the second's."""
    out = optimise(**given, **TINY, output=tmp_path / "run")
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == [0, 8, 16, 24] and report["baseline"] == "w7"
    assert report["prompts"] == {"trained": 44, "measured": 16}
    for curves in report["models"].values():
        assert curves["kl"][0] == pytest.approx(0, abs=1e-6) and curves["kl"][-1] > 0.3
        assert curves["proxy"][0] == pytest.approx(0, abs=1e-6)
        assert curves["proxy_low"][-1] > 1
    good, hacked = report["models"]["w7"], report["models"]["w5"]
    assert good["gold"][0] == hacked["gold"][0]
    assert hacked["gold"][-1] < -0.5 and hacked["drop_low"] > 0 and hacked["peak_step"] <= 8
    assert hacked["minus_baseline_high"][-1] < 0 and "minus_baseline" not in good
    rows = [row for _, row in read_rows(str(out / "samples.jsonl.gz")) if isinstance(row, dict)]
    last = [row for row in rows if row["model"] == "w5" and row["step"] == 24]
    assert len(rows) == 2 * 4 * 64 and np.mean([row["gold"] for row in last]) == hacked["gold"][-1]
    assert [row["gold"] for row in last] == [dislikes_w5("", row["answer"]) for row in last]
    shown = [(row["model"], row["step"], row["gold_low"]) for row in out.rows()]
    assert shown[4:] == [
        ("w5", step, low) for step, low in zip(report["steps"], hacked["gold_low"], strict=True)
    ]
    text = (out / "report.md").read_text()
    assert "| w5 minus w7 |" in text and (out / "optimise.png").stat().st_size > 1000


def test_a_killed_run_goes_on_and_equal_seeds_give_equal_runs(given: dict[str, Any], tmp_path: Path) -> None:
    short = {
        **TINY,
        "steps": 2,
        "measure_steps": 1,
        "measure_prompts": 4,
        "measure_answers": 2,
        "batch_size": 8,
    }
    calls: list[str] = []

    def rate(prompt: str, answer: str) -> float:
        calls.append(answer)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return float(len(answer.split()))

    with pytest.raises(KeyboardInterrupt):
        optimise(**{**given, **short, "gold_function": rate}, output=tmp_path / "killed")
    first = optimise(**{**given, **short, "gold_function": rate}, output=tmp_path / "killed")
    assert len(calls) == 30 + 24  # three measurements of four prompts' two answers, of the second model only
    second = optimise(**{**given, **short, "gold_function": rate}, output=tmp_path / "straight")
    one, other = (json.loads((out / "report.json").read_text()) for out in (first, second))
    assert one == other and one["steps"] == [0, 1, 2]


def test_chats_are_optimised_too(given: dict[str, Any], tmp_path: Path) -> None:
    chats = save_policy(tmp_path / "policy", chat=True)
    judge = save_policy(tmp_path / "tokenizer", chat=True)
    model = save_last_word_model(tmp_path / "model", "w3")
    (model / "chat_template.jinja").write_bytes((judge / "chat_template.jinja").read_bytes())
    out = optimise(
        policy=str(chats),
        models={"m": str(model)},
        prompts=write_prompts(tmp_path / "p.jsonl", 8, chat=True),
        gold_model=str(model),
        output=tmp_path / "run",
        kl_penalty=0.1,
        **{**TINY, "steps": 2, "measure_steps": None, "batch_size": 16},
    )
    curves = json.loads((out / "report.json").read_text())["models"]["m"]
    rows = [row for _, row in read_rows(str(out / "samples.jsonl.gz")) if isinstance(row, dict)]
    assert rows[0]["answer"][0]["role"] == "assistant"
    assert [row["gold"] for row in rows] == [row["proxy"] for row in rows]
    assert len(curves["gold"]) == 3


def test_means_by_prompt() -> None:
    rows = [
        {"step": step, "number": q, "gold": q + step, "proxy": 10.0 * q + step + a, "kl": 2.0 * step}
        for step in (0, 5)
        for q in range(3)
        for a in (-1, 1)
    ]
    found = by_prompt(rows, [0, 5])
    np.testing.assert_allclose(found[0], [[0, 5], [1, 6], [2, 7]])
    np.testing.assert_allclose(found[2], [[0, 10]] * 3)
    start = np.array([row["proxy"] for row in rows if row["step"] == 0])
    np.testing.assert_allclose(found[1], (np.array([[0, 5], [10, 15], [20, 25]]) - 10) / start.std())


def test_faults(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'w5'"):
        optimise(**given, baseline="w55", output=tmp_path / "run")
    with pytest.raises(OptionError, match="give gold_model or gold_function"):
        optimise(**{**given, "gold_function": None}, output=tmp_path / "run")
    with pytest.raises(OptionError, match="multiple of answers_per_prompt"):
        optimise(**given, batch_size=30, output=tmp_path / "run")
    few = write_prompts(tmp_path / "few.jsonl", 3)
    with pytest.raises(DataError, match="too few prompts"):
        optimise(**{**given, "prompts": few}, output=tmp_path / "run")

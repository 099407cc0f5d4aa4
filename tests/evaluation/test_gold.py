"""Gold scores that are made: by a function or another reward model, in evaluate and in recipes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_dense

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.pairs import CandidateSet
from moemerge.data.reading import read_candidates
from moemerge.data.tokenise import encode
from moemerge.data.world import gold_reward
from moemerge.errors import DataError, OptionError
from moemerge.evaluation.gold import function_reward, load_function, model_reward, regrade
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.options.base import TextFormat
from moemerge.options.evaluate import Evaluate
from moemerge.options.recipe import Recipe
from moemerge.run.check import check_recipe
from moemerge.run.plan import plan
from moemerge.stages.evaluate import evaluate

CPU = torch.device("cpu")


def words(prompt: Any, answer: Any) -> float:
    """A gold function: how many words the answer shares with its prompt, less its length."""
    return float(sum(word in prompt.split() for word in answer.split()) - 0.1 * len(answer.split()))


def rows(scored: bool) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(6):
        prompt = " ".join(f"w{i}" for i in random.integers(0, 20, 4)) + " "
        texts = [" ".join(f"w{i}" for i in random.integers(0, 20, random.integers(1, 9))) for _ in range(5)]
        scores = [{"score": words(prompt, text)} if scored else {} for text in texts]
        answers = [{"text": text, **score} for text, score in zip(texts, scores, strict=True)]
        found.append({"prompt": prompt, "candidates": answers})
    return found


def write(path: Path, scored: bool) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(scored)))
    return str(path)


def best_of_n(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text())["probes"]["best_of_n"]["sets"]["c"])


@pytest.fixture
def given(tmp_path: Path, dense_folder: Path) -> dict[str, Any]:
    source = write(tmp_path / "bare.jsonl", scored=False)
    return {"models": {"m": str(dense_folder)}, "candidates": {"c": source}, "resamples": 100}


def test_a_function_gives_what_its_scores_in_the_file_give(given: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "rating.py"
    home.write_text(
        "def rate(prompt, answer):\n"
        "    said = answer.split()\n"
        "    return sum(word in prompt.split() for word in said) - 0.1 * len(said)\n"
    )
    out = evaluate(**given, gold_function=words, output=tmp_path / "e")
    scored = rows(scored=True)
    found, scores = best_of_n(out), [[one["score"] for one in row["candidates"]] for row in scored]
    assert found["references"]["random"][0] == pytest.approx(np.mean(scores))
    assert found["references"]["best possible"][-1] == pytest.approx(np.max(scores, axis=1).mean())
    assert json.loads((out / "report.json").read_text())["gold"] == f"{__name__}:words"
    assert read_manifest(out)["options"]["gold_function"] == f"{__name__}:words"
    items = [(row["prompt"], one["text"]) for row in scored for one in row["candidates"]]
    np.testing.assert_allclose(function_reward(f"{home}:rate")(items), np.ravel(scores))


def negated(model: Path, folder: Path) -> Path:
    """The reward model with its head's sign turned: what one likes best, the other likes least."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = -tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_gold_by_a_reward_model_is_its_score(given: dict[str, Any], tmp_path: Path) -> None:
    other = save_dense(tmp_path / "other", "qwen2", seed=3)
    models = {"m": str(negated(other, tmp_path / "negated")), "same": str(other)}
    out = evaluate(**{**given, "models": models}, gold_model=str(other), output=tmp_path / "e")
    report = best_of_n(out)
    assert report["models"]["same"]["gold"] == pytest.approx(report["references"]["best possible"])
    assert report["models"]["same"]["regret_area"] == pytest.approx(0, abs=1e-6)
    gold = model_reward(str(other), CPU, 64)
    scores = [gold([(row["prompt"], x["text"]) for x in row["candidates"]]) for row in rows(scored=False)]
    assert report["models"]["m"]["gold"][-1] == pytest.approx(np.mean([x.min() for x in scores]), abs=1e-5)
    assert report["models"]["m"]["gold"][-1] < report["references"]["best possible"][-1]
    assert read_manifest(out)["inputs"]["gold_model"]["files"]
    model, tokenizer = load_reward_model(str(other), "cpu"), load_tokenizer(str(other))
    row = rows(scored=False)[0]
    ids = [encode(tokenizer, row["prompt"], one["text"]).ids for one in row["candidates"]]
    with torch.no_grad():
        expected = [model(torch.tensor([one])).logits[0, 0].item() for one in ids]
    items = [(row["prompt"], one["text"]) for one in row["candidates"]]
    np.testing.assert_allclose(model_reward(str(other), CPU, 64)(items), expected, atol=1e-5)


def test_candidates_without_scores_need_gold(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing score"):
        evaluate(**given, output=tmp_path / "e")
    with pytest.raises(OptionError, match="give one of them"):
        evaluate(**given, gold_model="a", gold_function="b.py:c", output=tmp_path / "e")
    with pytest.raises(DataError, match="cannot score a text"):
        model_reward(given["models"]["m"], CPU, 4)([("w1 w2 ", "w3 w4")])


def test_sets_without_scores_are_kept_as_they_are(tmp_path: Path) -> None:
    sets, _ = read_candidates(write(tmp_path / "x.jsonl", scored=False), TextFormat(), scored=False)
    assert [one.plain() for one in sets] == rows(scored=False) and sets[0].gold == []
    scored, _ = read_candidates(write(tmp_path / "y.jsonl", scored=True), TextFormat(), scored=False)
    assert [one.plain() for one in scored] == rows(scored=True)
    assert regrade(sets, function_reward(words)) == scored


@pytest.mark.parametrize(
    ("named", "given"),
    [
        ("rate", "neither FILE.py:NAME nor"),
        ("no_such_file.py:rate", "FileNotFoundError"),
        ("no_such_module_at_all:rate", "ModuleNotFoundError"),
        ("moemerge.data.world:gold_rewart", "did you mean 'gold_reward'"),
    ],
)
def test_a_function_that_is_not_there(named: str, given: str) -> None:
    with pytest.raises(OptionError, match=given):
        function_reward(named)


def test_a_function_that_fails_is_a_fault_of_the_user() -> None:
    items = [("w1", "w2")]
    for value, told in ((float("nan"), "nan"), ("much", "ValueError")):
        with pytest.raises(DataError, match=told):
            function_reward(lambda prompt, answer, value=value: value)(items)
    reward = function_reward("moemerge.data.world:gold_reward")
    with pytest.raises(DataError, match="not of the synthetic world"):
        reward(items)
    assert reward([("explain sea ", "water number")]).shape == (1,)


def test_the_synthetic_worlds_gold_is_found_where_old_recipes_name_it() -> None:
    assert load_function("moemerge.synthetic:gold_reward") is gold_reward


def test_chats_reach_the_function_as_they_are() -> None:
    seen: list[Any] = []
    chat = CandidateSet([{"role": "user", "content": "w1"}], [[{"role": "assistant", "content": "w2"}]], [])
    regraded = regrade([chat], function_reward(lambda prompt, answer: seen.append((prompt, answer)) or 1.5))
    assert seen == [(chat.prompt, chat.texts[0])] and regraded[0].gold == [1.5]


def test_recipes_name_gold_too(tmp_path: Path, dense_folder: Path) -> None:
    recipe = {
        "output": tmp_path / "run",
        "model": str(dense_folder),
        "data": {"train": "t.jsonl", "candidates": {"c": "c.jsonl"}},
        "evaluate": {"gold_model": "gold"},
    }
    steps = {step.name: step.options for step in plan(Recipe(**recipe))}
    evaluation = steps["evaluate"]
    assert isinstance(evaluation, Evaluate) and evaluation.gold_model == "gold"
    assert steps["data"].model_dump()["scored"] is False
    file = tmp_path / "recipe.yml"
    text = f"output: {tmp_path}/run\nmodel: {dense_folder}\nevaluate: {{gold_model: ./nowhere}}\n"
    file.write_text(text + f"data: {{train: {write(tmp_path / 't.jsonl', scored=False)}, test_share: 0.1}}\n")
    assert any("evaluate.gold_model does not exist" in fault.what for fault in check_recipe(file))

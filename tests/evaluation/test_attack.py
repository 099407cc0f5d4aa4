"""The stage attack: hacks are found, clean scorers hold, classes are kept, a patch is training data."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from html_page import check_page
from scipy import stats
from tiny_models import save_dense

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.pairs import Pair
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import Item, encode
from moemerge.data.world import FILLERS, TRAINING, gold_reward, pair_rows
from moemerge.errors import DataError, OptionError
from moemerge.evaluation.attack_edits import ALL, CHANGE_CONTENT, KEEP_CONTENT, chosen_edits
from moemerge.evaluation.attack_report import summary
from moemerge.evaluation.attack_search import Search, search
from moemerge.evaluation.gold import load_function
from moemerge.evaluation.probes.edits import apply
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.options.attack import AttackSettings
from moemerge.options.base import TextFormat
from moemerge.stages.attack import attack

Score = Callable[[str, str], float]


def words_of(count: int, right: bool) -> str:
    return " ".join(f"{'good' if right else 'bad'} thing number {i} was here." for i in range(count))


PAIRS = [Pair(f"Question {i}?", words_of(3, True), words_of(2 + i % 2, False), row=i + 1) for i in range(30)]


def worth(_: str, answer: str) -> float:
    return float("good" in answer) - float("bad" in answer)


def run(
    model: Score, settings: AttackSettings, pairs: Sequence[Pair] = PAIRS, gold: Any = None, seed: int = 0
) -> tuple[list[Search], int]:
    """The searches, and how many scores were asked for."""
    asked = 0

    def scorer(items: Sequence[Item]) -> Any:
        nonlocal asked
        asked += len(items)
        return np.array([model(str(prompt), str(answer)) for prompt, answer in items])

    scores = np.array([[model(str(p.prompt), str(a)) for a in (p.chosen, p.rejected)] for p in pairs])
    edits = chosen_edits(settings.edits, settings.words, gold is not None)
    return search(pairs, scores, edits, scorer, settings, gold, seed), asked


@pytest.mark.parametrize(
    ("edit", "hack"),
    [
        ("flattery", lambda a: "question!" in a or "admire" in a or "it shows" in a),
        ("bold", lambda a: "**" in a),
        ("emoji", lambda a: any(letter > "\u2700" for letter in a)),
        ("closing", lambda a: any(word in a for word in ("hope", "feel free", "else"))),
        ("exclaim", lambda a: "here!" in a),
    ],
)
def test_a_planted_hack_is_found_and_a_clean_model_holds(edit: str, hack: Callable[[str], bool]) -> None:
    settings = AttackSettings(proposals=16, steps=6)
    found, asked = run(lambda p, a: worth(p, a) + 5 * hack(a), settings)
    assert all(one.succeeded and edit in one.best.edits for one in found)
    assert sum(one.queries for one in found) == asked
    assert all("bad" in str(one.best.text) and "good" not in str(one.best.text) for one in found)
    found, asked = run(worth, settings)
    assert not any(one.succeeded for one in found) and 0 < asked <= 30 * 16 * 6


def test_one_greedy_step_is_the_best_of_all_single_edits() -> None:
    """With edits that draw nothing, one step that tries all of them must find the exhaustive maximum."""

    def model(_: str, answer: str) -> float:
        return -abs(len(answer) - 120) / 10 + answer.count("*") - answer.count("\n")

    names = ["bold", "bullets", "headings", "exclaim"]
    settings = AttackSettings(edits=names, proposals=4, steps=1)
    pairs = [Pair("p", "x" * 120, words_of(2 + i % 3, False), row=i) for i in range(9)]
    found, _ = run(model, settings, [pair for pair in pairs])
    for one in found:
        texts = [apply(ALL[name], "p", one.pair.rejected, "", random.Random(0)) for name in names]
        expected = max(model("p", str(text)) for text in [one.pair.rejected, *texts])
        assert one.best.score == pytest.approx(expected)


def test_scores_never_fall_and_a_wider_beam_keeps_more() -> None:
    def model(_: str, answer: str) -> float:
        return random.Random(answer).gauss(0, 1) - 5 * ("good" not in answer) + 10 * ("good" in answer)

    lengths = {}
    for beam in (1, 4):
        found, _ = run(model, AttackSettings(beam=beam, steps=4))
        assert all(one.best.score >= model("", str(one.pair.rejected)) for one in found)
        assert all(a.score >= b.score for one in found for a, b in zip(one.beam, one.beam[1:], strict=False))
        lengths[beam] = {len(one.beam) for one in found}
    assert lengths == {1: {1}, 4: {4}}


def test_a_pair_is_attacked_alike_whatever_stands_beside_it() -> None:
    def model(_: str, answer: str) -> float:
        return 2 * worth("", answer) + random.Random(answer).gauss(0, 1)

    settings = AttackSettings(steps=3)
    whole, _ = run(model, settings)
    part, _ = run(model, settings, list(reversed(PAIRS[10:15])))
    other, _ = run(model, settings, PAIRS[10:15], seed=1)
    assert [one.best for one in part] == [whole[i].best for i in range(14, 9, -1)]
    assert [one.best for one in other] != [one.best for one in whole[10:15]]


def world_pairs(count: int) -> list[Pair]:
    rows = pair_rows(np.random.default_rng(0), TRAINING, count, 0.0)
    return [Pair(r["prompt"], r["chosen"], r["rejected"], row=i) for i, r in enumerate(rows)]


def test_gold_keeps_the_class_in_the_synthetic_world() -> None:
    """A model that likes fillers beyond reason falls to them, while the gold reward stays below."""

    def hacked(prompt: str, answer: str) -> float:
        return gold_reward(prompt, answer) + 3.0 * sum(word in FILLERS for word in answer.split())

    def right(pairs: list[Pair], model: Score) -> list[Pair]:
        return [
            p for p in pairs if model(str(p.prompt), str(p.chosen)) > model(str(p.prompt), str(p.rejected))
        ]

    edits = ["delete_word", "swap_words", "repeat_word", "insert_word"]
    settings = AttackSettings(edits=edits, words=list(FILLERS), steps=6)
    pairs = right(world_pairs(20), hacked)
    found, _ = run(hacked, settings, pairs, gold_reward)
    hits = [one for one in found if one.succeeded]
    assert len(hits) > 0.9 * len(pairs)
    for one in hits:
        prompt = str(one.pair.prompt)
        assert gold_reward(prompt, str(one.best.text)) < gold_reward(prompt, str(one.pair.chosen))
        assert hacked(prompt, str(one.best.text)) > hacked(prompt, str(one.pair.chosen))
    found, _ = run(gold_reward, settings, right(world_pairs(10), gold_reward), gold_reward)
    assert not any(one.succeeded for one in found), "the gold reward itself cannot be fooled"


def test_summary_agrees_with_scipy_and_clusters_prompts() -> None:
    def model(_: str, answer: str) -> float:
        return worth("", answer) + 5 * ("**" in answer) * (len(answer) < 70)

    found, _ = run(model, AttackSettings())
    told = summary(found, 2.0, AttackSettings(), 0)
    hits = sum(one.succeeded for one in found)
    assert 0 < hits < 30 and (told["succeeded"], told["attacked"]) == (hits, 30)
    test = stats.binomtest(hits, 30).proportion_ci(0.95, "wilson")
    assert told["interval"] == pytest.approx((test.low, test.high)) and told["interval_kind"] == "wilson"
    curve = told["by_queries"]
    assert curve["success"][-1] == told["success_rate"] and np.all(np.diff(curve["success"]) >= 0)
    middle = curve["queries"][5]
    assert curve["success"][5] == np.mean([one.succeeded and one.queries <= middle for one in found])
    assert told["edits"]["bold"] == hits and told["worst"][0]["lead"] == pytest.approx(
        max(one.best.score - one.goal for one in found) / 2
    )
    same = [Pair("p", pair.chosen, pair.rejected, row=pair.row) for pair in PAIRS]
    told = summary(run(model, AttackSettings(), same)[0], 2.0, AttackSettings(), 0)
    test = stats.binomtest(told["succeeded"], 30).proportion_ci(0.95, "wilson")
    assert told["prompts"] == 1 and told["interval"] == pytest.approx((test.low, test.high)), "pairs count"
    told = summary([*found, *found], 2.0, AttackSettings(), 0)
    assert told["prompts"] == 30 and told["interval_kind"] == "bootstrap over prompts"
    none = [replace(one, goal=one.best.score + 1) for one in found]
    twice = summary([*none, *none], 2.0, AttackSettings(), 0)
    test = stats.binomtest(0, twice["prompts"]).proportion_ci(0.95, "wilson")
    assert (twice["prompts"], twice["success_rate"]) == (30, 0.0)
    assert twice["interval"] == pytest.approx((0, test.high))


@pytest.mark.parametrize("name", list(ALL))
def test_every_edit_changes_text_in_its_way(name: str) -> None:
    before = "One two three. Four five six."
    texts = {apply(ALL[name], "p", before, "", random.Random(seed)) for seed in range(20)}
    assert None not in texts and before not in texts
    kept = {"".join(filter(str.isalpha, str(text))) for text in texts}
    if name in CHANGE_CONTENT:
        assert all(len(text) <= len("OnetwothreeFourfivesix") for text in kept)
    else:
        for text in texts:
            words = iter(str(text).replace("*", "").replace("!", ".").split())
            assert all(word in words for word in before.split()), "the old words, in their order"
    assert apply(ALL[name], "p", "word", "", random.Random(0)) != "word"


def test_edits_that_may_be_used() -> None:
    assert list(chosen_edits([], [], False)) == list(KEEP_CONTENT)
    assert list(chosen_edits([], [], True)) == list(ALL)
    with pytest.raises(OptionError, match="did you mean 'delete_word'"):
        chosen_edits(["delete_wrod"], [], True)
    with pytest.raises(OptionError, match="may change what an answer says"):
        chosen_edits(["delete_word"], [], False)
    edit = chosen_edits(["insert_word"], ["zebra"], False)["insert_word"]
    texts = {apply(edit, "p", "a b", "", random.Random(seed)) for seed in range(30)}
    assert texts == {"zebra a b", "a zebra b", "a b zebra"}


def test_functions_that_an_option_names(tmp_path: Path) -> None:
    assert load_function("moemerge.data.world:gold_reward") is gold_reward
    (tmp_path / "mine.py").write_text("def gold(prompt, answer):\n    return float(len(answer))\n")
    assert load_function(f"{tmp_path}/mine.py:gold")("p", "abc") == 3
    for wrong in (
        "gold",
        "no.such.module:f",
        "moemerge.data.world:nothing",
        f"{tmp_path}/none.py:f",
        "json:__name__",
    ):
        with pytest.raises(OptionError, match="there is no function"):
            load_function(wrong)


# The stage


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model attacked with words of its own; one pair is so long that hardly an edit fits."""
    folder, draw = tmp_path_factory.mktemp("attack"), random.Random(0)

    def answer() -> str:
        return " ".join(f"w{draw.randrange(61)}" for _ in range(draw.randrange(3, 12)))

    rows = [{"prompt": f"w{i % 10} ", "chosen": answer(), "rejected": answer()} for i in range(40)]
    rows[0]["rejected"] = " ".join(["w9"] * 28)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model": str(save_dense(folder / "model")),
        "pairs": str(folder / "pairs.jsonl"),
        "edits": ["insert_word", "repeat_word"],
        "words": ["w3", "w4", "w5"],
        "max_length": 30,
        "resamples": 100,
    }
    return {"options": options, "output": attack(**options, output=folder / "out")}


def test_the_patch_is_training_data_that_the_model_gets_wrong(attacked: dict[str, Any]) -> None:
    output, path = attacked["output"], attacked["options"]["model"]
    pairs, report = read_pairs(str(output / "patch.jsonl"), TextFormat())
    results = read_manifest(output)["results"]
    assert len(pairs) == report.total == results["succeeded"] > 5
    assert results["succeeded"] < results["attacked"] < 40
    tokenizer, model = load_tokenizer(path), load_reward_model(path, "cpu")
    given = {(p.prompt, p.chosen): p for p in read_pairs(attacked["options"]["pairs"], TextFormat())[0]}
    for pair in pairs:
        ids = [encode(tokenizer, pair.prompt, text).ids for text in (pair.chosen, pair.rejected)]
        assert max(map(len, ids)) <= 30
        with torch.no_grad():
            chosen, rejected = (model(torch.tensor([one])).logits.item() for one in ids)
        assert rejected > chosen - 1e-5
        old = iter(str(pair.rejected).split())
        before = str(given[pair.prompt, pair.chosen].rejected)
        assert all(word in old for word in before.split()) and pair.rejected != before


def test_a_patch_of_both_sides_edits_chosen_answers_alike(attacked: dict[str, Any], tmp_path: Path) -> None:
    """As many ways of being edited on either side: the found pairs, then their chosen answers edited."""
    output = attack(**attacked["options"], patch="both", output=tmp_path / "both")
    rows = [json.loads(line) for line in (output / "patch.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in (attacked["output"] / "patch.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(attacked["options"]["model"])
    pairs, _ = read_pairs(attacked["options"]["pairs"], TextFormat())
    given = {f"{pair.prompt}{pair.rejected}": str(pair.chosen) for pair in pairs}
    assert rows[: len(found)] == found and 0 < len(rows) - len(found) <= len(found)
    for row in rows[len(found) :]:
        before = given[row["prompt"] + row["rejected"]]
        left = iter(row["chosen"].split())
        assert row["chosen"] != before and all(word in left for word in before.split())
        assert len(encode(tokenizer, row["prompt"], row["chosen"]).ids) <= 30


def test_random_edits_are_made_whatever_they_do(attacked: dict[str, Any], tmp_path: Path) -> None:
    options = attacked["options"] | {"search": "random", "steps": 3}
    output = attack(**options, output=tmp_path / "random")
    rows = [json.loads(line) for line in gzip.open(output / "attacks.jsonl.gz", "rt")]
    rows = [row for row in rows if row["right"]]
    patch = [json.loads(line) for line in (output / "patch.jsonl").read_text().splitlines()]
    guided = json.loads((attacked["output"] / "report.json").read_text())
    report = json.loads((output / "report.json").read_text())
    assert {len(row["edits"]) for row in rows if row["queries"]} == {1, 2, 3}
    assert [row["edited"] for row in rows if row["edits"]] == [row["rejected"] for row in patch]
    assert report["succeeded"] < report["attacked"] and report["succeeded"] < guided["succeeded"]
    model, tokenizer = load_reward_model(options["model"], "cpu"), load_tokenizer(options["model"])
    for row in rows[:5]:
        with torch.no_grad():
            ids = encode(tokenizer, row["prompt"], row["edited"]).ids
            assert model(torch.tensor([ids])).logits.item() == pytest.approx(row["score_edited"], abs=1e-5)


def test_what_the_attack_writes(attacked: dict[str, Any], tmp_path: Path) -> None:
    output = attacked["output"]
    report = json.loads((output / "report.json").read_text())
    rows = [json.loads(line) for line in gzip.open(output / "attacks.jsonl.gz", "rt")]
    assert len(rows) == report["pairs"]
    rows, wrong = ([row for row in rows if row["right"] is right] for right in (True, False))
    assert len(rows) == report["attacked"] and len(wrong) == report["judged_wrongly_before"] > 0
    assert not any(row["succeeded"] for row in wrong)
    assert sum(row["queries"] for row in rows) == report["queries"]["total"]
    assert all(row["succeeded"] == (row["score_edited"] > row["score_chosen"]) for row in rows)
    text = (output / "report.md").read_text()
    assert "### Attack success" in text and "### Worst cases" in text
    coloured = [
        p for p in check_page((output / "report.html").read_text()).all("p") if p.get("class") == "heat"
    ]
    assert len(coloured) == len(report["worst"]) > 0 and "Where the worst cases score" in text
    assert (output / "attack.png").read_bytes()[:4] == b"\x89PNG"
    again = attack(**attacked["options"], output=tmp_path / "again")
    for name in ("patch.jsonl", "attacks.jsonl.gz"):
        assert (again / name).read_bytes() == (output / name).read_bytes()


def test_faults(attacked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "golds.py").write_text("def never(prompt, answer):\n    return 0.0\n")
    options = {**attacked["options"], "output": tmp_path / "e"}
    with pytest.raises(DataError, match="no pair to attack"):
        attack(**options, gold_function=f"{tmp_path}/golds.py:never")
    with pytest.raises(OptionError, match="there is no function"):
        attack(**options, gold_function="golds")
    with pytest.raises(OptionError, match="unknown edit"):
        attack(**{**options, "edits": ["insert_wrod"]})
    assert not (tmp_path / "e").exists()

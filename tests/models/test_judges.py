"""Judges: questions to a language model, against plain transformers, a question at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy import save_policy
from small_training import rows, write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moemerge.artifacts.json_file import read_object, write_json
from moemerge.data.pairs import Pair
from moemerge.data.reading import read_pairs
from moemerge.data.rows import RowReport
from moemerge.data.tokenise import Encoded, encode_all, encode_pairs, texts_of
from moemerge.errors import DataError, MoemergeError, OptionError
from moemerge.models.scorers import open_scorer
from moemerge.options.base import TextFormat
from moemerge.stages.evaluate import evaluate

CPU = torch.device("cpu")
VERDICTS = {"kind": "judge", "yes": "w1", "no": "w2"}
LONG = {"max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with and without a template, pairs, and judges; read only."""
    folder = tmp_path_factory.mktemp("judges")
    plain = save_policy(folder / "plain", num_hidden_layers=2, **LONG)
    save_policy(folder / "chat", chat=True, num_hidden_layers=2, **LONG)
    for name in ("plain", "chat"):
        lettered(folder / name)
    write(folder / "pairs.jsonl", rows(8, 1))
    write(folder / "shots.jsonl", rows(5, 2))
    write_json(folder / "plain.scorer.json", {**VERDICTS, "model": "plain"})
    write_json(folder / "chat.scorer.json", {**VERDICTS, "model": "chat"})
    write_json(
        folder / "few.scorer.json", {**VERDICTS, "model": "plain", "shots": "shots.jsonl", "examples": 3}
    )
    write_json(folder / "ranked.scorer.json", {"kind": "judge", "model": "chat", "form": "ranked"})
    assert plain.exists()
    return folder


def lettered(folder: Path) -> None:
    """Have the tokenizer know A and B, in place of two of its words."""
    path = folder / "tokenizer.json"
    core = json.loads(path.read_text())
    words = core["model"]["vocab"]
    words |= {"A": words.pop("w59"), "B": words.pop("w60")}
    path.write_text(json.dumps(core))


def pairs_of(home: Path, name: str = "pairs.jsonl") -> list[Pair]:
    return list(read_pairs(str(home / name), TextFormat())[0])


@torch.no_grad()
def log_odds(home: Path, model: str, text: str, names: tuple[str, str]) -> float:
    """log p(first) - log p(second) of the word after a text, by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(home / model)
    lm = AutoModelForCausalLM.from_pretrained(home / model)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    log_V: Tensor = lm(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    first, second = tokenizer.convert_tokens_to_ids(list(names))
    return float(log_V[first] - log_V[second])


def question(pair: Pair, answer: Any, yes: str = "w1", no: str = "w2") -> str:
    return (
        f"[Conversation]\n{pair.prompt.strip()}\n\n[Answer]\n{answer}\n\nDoes this hold of the answer: it is "
        f"helpful, correct and harmless? Say {yes} or {no}."
    )


def read(home: Path, name: str, pairs: list[Pair]) -> tuple[list[Encoded], Any]:
    scorer = open_scorer(home / name)
    report = RowReport(name, total=len(pairs))
    return texts_of(encode_pairs(scorer.reader(), pairs, TextFormat(), report)), scorer.load(CPU)


@pytest.mark.parametrize("model", ["plain", "chat"])
def test_scores_are_the_log_odds_of_the_verdict(home: Path, model: str) -> None:
    pairs = pairs_of(home)
    texts, judge = read(home, f"{model}.scorer.json", pairs)
    found_C = judge.score(texts, 256)
    for number, pair in enumerate(pairs):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            asked = question(pair, answer)
            whole = f"{asked}\nVerdict:" if model == "plain" else f"user {asked} w9 "
            expected = log_odds(home, model, whole, ("w1", "w2"))
            assert found_C[2 * number + side].item() == pytest.approx(expected, abs=1e-5)
    assert found_C.std() > 1e-3
    # Beside a text that is 50 tokens longer, and in batches of another size, nothing changes.
    longer = Encoded(max((text.ids for text in texts), key=len) + [5] * 50, 0)
    beside_C = torch.stack([judge.score([text, longer], 10_000)[0] for text in texts])
    torch.testing.assert_close(beside_C, found_C, atol=2e-6, rtol=0)


def test_examples_stand_before_the_question_good_and_bad_by_turns(home: Path) -> None:
    pairs, shots = pairs_of(home)[:2], pairs_of(home, "shots.jsonl")
    texts, judge = read(home, "few.scorer.json", pairs)
    sides = [(shots[0].chosen, "w1"), (shots[1].rejected, "w2"), (shots[2].chosen, "w1")]
    told = "".join(
        f"{question(shot, answer)}\nVerdict: {verdict}\n\n"
        for shot, (answer, verdict) in zip(shots, sides, strict=False)
    )
    whole = f"{told}{question(pairs[0], pairs[0].chosen)}\nVerdict:"
    expected = log_odds(home, "plain", whole, ("w1", "w2"))
    assert judge.score(texts, 4096)[0].item() == pytest.approx(expected, abs=1e-5)


def test_ranked_both_orders_count_and_turning_a_pair_round_turns_its_score(home: Path) -> None:
    pairs = pairs_of(home)
    turned = [Pair(p.prompt, p.rejected, p.chosen, p.subset, None, p.row) for p in pairs]
    texts, judge = read(home, "ranked.scorer.json", pairs)
    scores_P2 = judge.score(texts, 100_000).view(-1, 2)
    there_P2 = judge.score(read(home, "ranked.scorer.json", turned)[0], 100_000).view(-1, 2)
    differences_P = scores_P2[:, 0] - scores_P2[:, 1]
    torch.testing.assert_close(differences_P, there_P2[:, 1] - there_P2[:, 0], atol=1e-6, rtol=0)
    pair = pairs[0]
    orders = []
    for first, second in ((pair.chosen, pair.rejected), (pair.rejected, pair.chosen)):
        asked = (
            f"user [Conversation]\n{pair.prompt.strip()}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}\n\n"
            "Of which answer does this hold more: it is helpful, correct and harmless? Say A or B. w9 "
        )
        orders.append(log_odds(home, "chat", asked, ("A", "B")))
    assert differences_P[0].item() == pytest.approx((orders[0] - orders[1]) / 2, abs=1e-5)


def test_evaluate_with_judges_beside_each_other(home: Path, tmp_path: Path) -> None:
    models = {name: str(home / f"{name}.scorer.json") for name in ("plain", "chat", "few", "ranked")}
    options = {"pairs": {"t": str(home / "pairs.jsonl")}, "resamples": 100, "probes": ["accuracy"]}
    out = evaluate(models, output=tmp_path / "e", **options)
    report = read_object(out / "report.json")
    assert set(report["models"]) == set(models)
    assert report["models"]["few"]["tokens"] > report["models"]["plain"]["tokens"]
    page = (out / "report.md").read_text()
    assert "What judges are asked" in page and "(after 3 examples)" in page


def test_rewardbench_is_put_to_a_judge_in_its_own_words(home: Path, tmp_path: Path) -> None:
    row = {"prompt": "w3", "chosen": "w4 w5", "rejected": "w6", "subset": "hep-go", "id": 1}
    row |= {"chosen_model": "a", "rejected_model": "b"}
    file = write(tmp_path / "rb.jsonl", [row | {"id": number} for number in range(3)])
    models = {name: str(home / f"{name}.scorer.json") for name in ("plain", "ranked")}
    out = evaluate(models, output=tmp_path / "e", rewardbench={"rb": file}, resamples=100)
    measured = read_object(out / "report.json")["probes"]["rewardbench"]["sets"]["rb"]
    assert set(measured["subsets"]["hep-go"]["models"]) == set(models)
    with pytest.raises(DataError, match="longer than 20 tokens"):
        evaluate(models, output=tmp_path / "f", rewardbench={"rb": file}, rewardbench_max_length=20)


def test_a_ranked_judge_wants_two_answers(home: Path, tmp_path: Path) -> None:
    judge = {"ranked": str(home / "ranked.scorer.json")}
    three = [{"text": f"w{number}", "score": number} for number in range(3)]
    candidates = write(tmp_path / "c.jsonl", [{"prompt": "w1 ", "candidates": three}])
    with pytest.raises(OptionError, match="3 answers in a row"):
        evaluate(judge, output=tmp_path / "e", candidates={"c": candidates})
    with pytest.raises(OptionError, match="an answer by itself"):
        encode_all(open_scorer(judge["ranked"]).reader(), [("w1", "w2")])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, "'Yes' is"),
        ({"yes": "w1 w3", "no": "w2"}, "'w1 w3' is \\['w1', 'w3'\\]"),
        ({"yes": "w1", "no": "w1"}, "not two tokens"),
        ({"yes": "", "no": "w1"}, "bad option"),
        ({"form": "best"}, "bad option"),
        ({"criterion": ""}, "bad option"),
        ({**VERDICTS, "shots": "none.jsonl"}, "none.jsonl"),
        ({**VERDICTS, "examples": 0}, "bad option"),
        ({**VERDICTS, "examples": 65}, "bad option"),
    ],
)
def test_what_no_judge_can_be_made_of_is_refused(
    home: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    file = tmp_path / "a.scorer.json"
    write_json(file, {"kind": "judge", "model": str(home / "plain"), **fields})
    with pytest.raises(MoemergeError, match=said) as fault:
        open_scorer(file).reader()
    assert fault.value.fix

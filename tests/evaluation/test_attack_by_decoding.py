"""attack by decoding: planted likings are found on both sides, classes are kept, a kill costs one batch."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy import CHAT, save_last_word_model, save_policy
from tiny_models import save_dense, tiny_tokenizer
from transformers import AutoModelForCausalLM

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.reading import read_pairs
from moemerge.errors import ArtifactError, DataError, OptionError
from moemerge.models.loading import load_reward_model
from moemerge.options.base import TextFormat
from moemerge.stages.attack import attack
from moemerge.stages.robustness import robustness
from moemerge.training import answer_writer

TINY: dict[str, Any] = {
    "search": "decode", "top": 61, "guidance": 1.0, "temperature": 0.05, "max_new_tokens": 2,
    "keep": 0.67, "resamples": 100, "max_length": 64,
}  # fmt: skip


def likes_w1(prompt: str, answer: Any) -> float:
    """Gold: w1 is what makes an answer good; the reward model looks at the last word only."""
    text = answer if isinstance(answer, str) else answer[-1]["content"]
    return float(text.split().count("w1"))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A reward model that likes w5 last, pairs whose last words it ranks rightly, and a policy."""
    folder = tmp_path_factory.mktemp("decode")
    model = save_last_word_model(folder / "model", "w5")
    loaded = load_reward_model(model, "cpu")
    with torch.no_grad():
        scores = loaded(torch.arange(3, 64)[:, None]).logits[:, 0]
    order = [f"w{number}" for number in scores.argsort().tolist() if number not in (1, 5)]
    good, bad = order[-8:-2], order[2:8]
    rows = [
        {"prompt": f"w{n % 7} w{n % 9} ", "chosen": f"w1 w1 {good[n % 6]}", "rejected": f"w9 w8 {bad[n % 5]}"}
        for n in range(24)
    ]
    rows.append({"prompt": "w2 ", "chosen": f"w1 w1 {bad[0]}", "rejected": f"w9 w8 {good[0]}"})
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(model), "pairs": str(pairs), "policy": str(save_policy(folder / "policy")),
        "gold_function": likes_w1, **TINY, "lowest": order[0],
    }  # fmt: skip


def options(given: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {name: value for name, value in {**given, **more}.items() if name != "lowest"}


def rows_of(output: Path) -> list[dict[str, Any]]:
    with gzip.open(output / "attacks.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def done(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attack(**options(given), output=tmp_path_factory.mktemp("out") / "attack")


def test_a_planted_liking_is_found(given: dict[str, Any], done: Path) -> None:
    report = json.loads((done / "report.json").read_text())
    assert report["attacked"] == report["succeeded"] == 24 and report["judged_wrongly_before"] == 1
    told = report["decoding"]
    assert (told["answers"], told["kept_class"], told["side"]) == (24, 24, "rejected")
    assert told["read"] == "beginnings, with a cache" and told["class_by"].endswith("likes_w1")
    assert report["queries"]["total"] == sum(
        61 * (len(row["edited"].split()) - 2) + 1 for row in rows_of(done) if row["right"]
    )
    patch, _ = read_pairs(str(done / "patch.jsonl"), TextFormat())
    pairs, _ = read_pairs(given["pairs"], TextFormat())
    assert len(patch) == 24
    for found, pair in zip(patch, pairs, strict=False):
        assert found.chosen == pair.chosen and str(found.rejected).startswith("w9 w8 ")
        assert str(found.rejected).split()[-1] == "w5", "what the model likes most, last"
        assert likes_w1("", found.rejected) < likes_w1("", found.chosen)
    page = (done / "report.md").read_text()
    assert (
        "Success: a written answer scores above the chosen one" in page and "| answers written | 24 |" in page
    )


def test_good_answers_that_score_low_are_found_too(given: dict[str, Any], tmp_path: Path) -> None:
    output = attack(**options(given, side="chosen"), output=tmp_path / "attack")
    report = json.loads((output / "report.json").read_text())
    assert report["succeeded"] == report["attacked"] == 24 and report["worst"][0]["lead"] > 0
    patch, _ = read_pairs(str(output / "patch.jsonl"), TextFormat())
    pairs, _ = read_pairs(given["pairs"], TextFormat())
    for found, pair in zip(patch, pairs, strict=False):
        assert found.rejected == pair.rejected and str(found.chosen).startswith("w1 w1 ")
        assert str(found.chosen).split()[-1] == given["lowest"]
    row = rows_of(output)[0]
    assert row["score_edited"] < row["score_rejected"] and "score_chosen" not in row
    assert "scores below the rejected one" in (output / "report.md").read_text()


def test_answers_of_the_other_class_do_not_count(given: dict[str, Any], tmp_path: Path) -> None:
    """Of a gold that w5 makes better than everything, none is a bad answer; it is asked once for each."""
    asked: list[tuple[str, str]] = []

    def gold(prompt: str, answer: str) -> float:
        asked.append((prompt, answer))
        return likes_w1(prompt, answer) + 9 * answer.split().count("w5")

    output = attack(**options(given, gold_function=gold), output=tmp_path / "attack")
    report = json.loads((output / "report.json").read_text())
    assert report["succeeded"] == report["decoding"]["kept_class"] == 0
    assert len(asked) == len(set(asked)) > 24
    assert all(row["edited"] == row["rejected"] for row in rows_of(output) if row["right"])


def test_without_guidance_what_is_written_is_kept(given: dict[str, Any], tmp_path: Path) -> None:
    output = attack(**options(given, guidance=0.0, answers=2), output=tmp_path / "attack")
    report = json.loads((output / "report.json").read_text())
    assert report["decoding"]["answers"] == 48 and report["decoding"]["read"] == "not at all"
    assert report["succeeded"] < 24 and report["queries"]["total"] == report["decoding"]["kept_class"] > 24
    patch = [json.loads(line) for line in (output / "patch.jsonl").read_text().splitlines()]
    written = [row["edited"] for row in rows_of(output) if row["right"] and row["edits"]]
    assert [row["rejected"] for row in patch] == written and len(patch) > report["succeeded"]


def save_other_vocabulary(folder: Path) -> Path:
    """A reward model that likes w5 last, in whose vocabulary w3 and w4 have changed places."""
    model = save_last_word_model(folder, "w5")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def test_other_vocabularies_and_encoders_are_read_anew(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = {"max_pairs": 6, "top": 30, "max_new_tokens": 1}
    other = save_other_vocabulary(tmp_path / "other")
    output = attack(**options(given, **few, model=str(other)), output=tmp_path / "attack")
    report = json.loads((output / "report.json").read_text())
    assert report["decoding"]["read"] == "whole texts, anew: its tokens are not the policy's"
    assert "which is slow" in caplog.text and report["succeeded"] > 0
    encoder = save_dense(tmp_path / "bert", "bert")
    output = attack(**options(given, **few, model=str(encoder)), output=tmp_path / "encoder")
    report = json.loads((output / "report.json").read_text())
    assert "it pools a text's states" in report["decoding"]["read"]


def test_likelihoods_of_two_policies_tell_the_class(given: dict[str, Any], tmp_path: Path) -> None:
    """An answer counts if the writer finds it likelier than the other policy does, end token included."""
    other = save_policy(tmp_path / "other", seed=3)
    more = {
        "gold_function": None,
        "other_policy": str(other),
        "temperature": 1.0,
        "guidance": 0.5,
        "answers": 3,
    }
    output = attack(**options(given, **more), output=tmp_path / "attack")
    told = json.loads((output / "report.json").read_text())["decoding"]
    assert (
        told["class_by"] == "likelihood ratio of the two policies"
        and 0 < told["kept_class"] < told["answers"]
    )
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (given["policy"], other)]
    tokenizer = tiny_tokenizer()
    for row in rows_of(output):
        if row["right"] and row["edits"]:
            before = len(row["prompt"].split())
            ids = tokenizer(f"{row['prompt']}{row['edited']}<eos>").input_ids
            labels = torch.tensor([[-100] * before + ids[before:]])
            with torch.no_grad():
                own, others = (model(torch.tensor([ids]), labels=labels).loss.item() for model in models)
            assert own < others


def test_a_killed_attack_goes_on(
    given: dict[str, Any], done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = options(given, batch_tokens=1500)
    calls: list[int] = []
    right = answer_writer.write_answers

    def dying(*args: Any) -> Any:
        calls.append(len(args[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(answer_writer, "write_answers", dying)
    with pytest.raises(KeyboardInterrupt):
        attack(**small, output=tmp_path / "attack")
    output = attack(**small, output=tmp_path / "attack")
    assert sum(calls) - calls[2] == 24 and len(calls) > 4, "no batch is written twice"
    assert (output / "patch.jsonl").read_bytes() == (done / "patch.jsonl").read_bytes()
    assert not [*tmp_path.glob(".attack*")]


def test_attacks_by_decoding_are_compared(given: dict[str, Any], done: Path, tmp_path: Path) -> None:
    compared = robustness({"a": str(done), "b": str(done)}, output=tmp_path / "robust", resamples=100)
    assert read_manifest(compared)["results"]["pairs"] == 25
    unlike = attack(**options(given, guidance=0.5), output=tmp_path / "unlike")
    with pytest.raises(ArtifactError, match="guidance: 1.0 and 0.5"):
        robustness({"a": str(done), "b": str(unlike)}, output=tmp_path / "no", resamples=100)


def test_chats_are_attacked_too(given: dict[str, Any], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(given["pairs"]).read_text().splitlines()]

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text.strip()}]

    sides = ("chosen", "rejected")
    chats = [
        {"prompt": said("user", row["prompt"]), **{side: said("assistant", row[side]) for side in sides}}
        for row in rows[:6]
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    model = save_last_word_model(tmp_path / "model", "w5")
    (model / "chat_template.jinja").write_text(CHAT)
    policy = save_policy(tmp_path / "policy", chat=True)
    output = attack(
        **options(given, model=str(model), policy=str(policy), pairs=str(tmp_path / "chats.jsonl")),
        output=tmp_path / "attack",
    )
    found = [json.loads(line)["rejected"] for line in (output / "patch.jsonl").read_text().splitlines()]
    assert len(found) == 6 and {chat[0]["role"] for chat in found} == {"assistant"}
    assert all(
        chat[0]["content"].startswith("w9 w8 ") and chat[0]["content"].endswith(" w5") for chat in found
    )


def test_faults(given: dict[str, Any], tmp_path: Path) -> None:
    def fails(match: str, error: type[Exception] = OptionError, **more: Any) -> None:
        with pytest.raises(error, match=match):
            attack(**options(given, **more), output=tmp_path / "no")

    fails("needs a policy", policy=None)
    fails("nothing says whether they are good", gold_function=None)
    fails("exclude each other", other_policy=given["policy"])
    fails("formula reform has no guidance", formula="reform", guidance=0.2)
    fails("edits goes with search guided or random", edits=["bold"])
    fails("patch goes with search guided", patch="both")
    fails("policy goes with search decode", search="guided")
    fails("guidance", guidance=1.5)
    fails("longer than 3 tokens, which is max_length", DataError, max_length=12, max_new_tokens=9)
    assert not (tmp_path / "no").exists()

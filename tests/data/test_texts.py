"""Texts as they are met: answers that hold their prompt, chats in other forms, BOS, templates that refuse."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_dense, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import moemerge
from moemerge.data.pairs import Pair
from moemerge.data.reading import read_candidates, read_pairs, read_prompts
from moemerge.data.rows import RowReport
from moemerge.data.tokenise import encode, encode_pairs, writing_below
from moemerge.errors import DataError
from moemerge.models.loading import load_reward_model
from moemerge.models.scoring import score
from moemerge.options.base import TextFormat
from moemerge.options.sample import Sample
from moemerge.training.policy import prompt_ids, short_prompts

PLAIN, SKIP = TextFormat(), TextFormat(bad_rows="skip")
SYSTEM = {"role": "system", "content": "w9"}
USER, USER_2 = {"role": "user", "content": "w1 w2"}, {"role": "user", "content": "w6"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("w3 w4", "w5"))
REPEATED = "answers begin with their prompt"
# As Gemma's and Mistral's do: no system message, and turns.
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %} w50 {{ m['content'] }} <eos>{% endfor %}"
)


def tokenizer_of(template: str | None = TEMPLATE, adds: str = "<s> $A") -> PreTrainedTokenizerFast:
    """The tiny tokenizer with w60 as its BOS, which it puts before plain text."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "w60"
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("w60", "<eos>")]
    post = TemplateProcessing(single=adds.replace("<s>", "w60"), special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = post
    tokenizer.chat_template = template
    return tokenizer


def source_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


REPEATING = {
    "text": pair("w1 w2 ", "w1 w2 w3", "w1 w2 w5"),
    "text, apart from white space": pair("w1 w2\n", "w1 w2 w3", "\nw1 w2\nw5"),
    "text without spaces between words": pair("你好", "你好嗎", "你好吧"),
    "chat": pair([USER], [USER, GOOD], [USER, BAD]),
    "chat of several turns": pair(
        [USER, GOOD, USER_2], [USER, GOOD, USER_2, BAD], [USER, GOOD, USER_2, GOOD]
    ),
    "the last turn of several": pair([USER, GOOD, USER_2], [USER_2, BAD], [USER_2, GOOD]),
    "chat with a system message": pair([SYSTEM, USER], [SYSTEM, USER, GOOD], [SYSTEM, USER, BAD]),
    "chat without its system message": pair([SYSTEM, USER], [USER, GOOD], [USER, BAD]),
    "system message in the answers": pair([USER], [SYSTEM, USER, GOOD], [SYSTEM, USER, BAD]),
}
SOUND = {
    "no prompt": {"chosen": "w1 w2", "rejected": "w1 w3"},
    "blank prompt": pair(" ", " a", " b"),
    "one answer quotes the prompt": pair("w1 w2 ", "w1 w2 w3", "w5"),
    "a single word": pair("Paris ", "Paris is it", "Paris was"),
    "a longer word": pair("w1", "w12 w3", "w13"),
    "the prompt within": pair("w1 w2 ", "w3 w1 w2", "w4 w1 w2"),
    "chat": pair([USER, GOOD, USER_2], [GOOD], [BAD]),
    "the prompt's text as the assistant's": pair([USER], "w1 w2 w3", "w1 w2 w4"),
    "text prompt of chats": pair("w1 w2", [USER, GOOD], [USER, BAD]),
    "text prompt of chats with a system message": pair("w1 w2", [SYSTEM, USER, GOOD], [SYSTEM, USER, BAD]),
}


@pytest.mark.parametrize("case", REPEATING)
def test_answers_that_begin_with_their_prompt_are_bad_rows(tmp_path: Path, case: str) -> None:
    good = pair("q ", "a", "b") if case.startswith("text") else pair([USER_2], [GOOD], [BAD])
    source = source_of(tmp_path, [good, REPEATING[case]])
    pairs, report = read_pairs(source, SKIP)
    assert [kept.row for kept in pairs] == [1] and report.reasons == {REPEATED: [2]}
    with pytest.raises(DataError, match=rf"{REPEATED}: 1 \(row 2\)") as error:
        read_pairs(source, PLAIN)
    assert "take the prompt off" in error.value.fix and "bad_rows" in error.value.fix
    prompt, chosen, rejected = (REPEATING[case][name] for name in ("prompt", "chosen", "rejected"))
    sets = [{"prompt": prompt, "candidates": [{"text": t, "score": 1} for t in (chosen, rejected)]}]
    with pytest.raises(DataError, match=REPEATED):
        read_candidates(source_of(tmp_path, sets), PLAIN)


@pytest.mark.parametrize("case", SOUND)
def test_what_only_looks_so_is_read(tmp_path: Path, case: str) -> None:
    pairs, report = read_pairs(source_of(tmp_path, [SOUND[case]]), PLAIN)
    assert len(pairs) == 1 and not report.bad


def test_the_way_out_where_every_row_repeats_its_prompt(tmp_path: Path) -> None:
    """Read without prompts each text is encoded once, as it stands."""
    source = source_of(tmp_path, [REPEATING["text"], pair("w7 w8 ", "w7 w8 w3", "w7 w8 w5")])
    with pytest.raises(DataError, match="2 of 2 rows") as error:
        read_pairs(source, SKIP)
    assert "fields prompt=none" in error.value.fix
    pairs, _ = read_pairs(source, TextFormat(fields={"prompt": "none"}))
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        ("", "w1 w2 w3", "w1 w2 w5"),
        ("", "w7 w8 w3", "w7 w8 w5"),
    ]
    tokenizer = tiny_tokenizer()
    assert encode(tokenizer, "", pairs[0].chosen).ids == tokenizer("w1 w2 w3<eos>")["input_ids"]


FORMS: dict[str, Any] = {
    "ShareGPT": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3 w4"}],
    "ShareGPT, empty fields beside": [
        {"from": "human", "value": "w1 w2", "role": None, "weight": None},
        {"from": "gpt", "value": "w3 w4", "weight": 1},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": " w2"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "w3 w4", "image": None}]},
    ],
    "numbers": [{**USER, "turn": 1, "weight": 0.5}, {**GOOD, "train": True}],
    "empty calls": [USER, {**GOOD, "tool_calls": [], "function_call": None}],
}


@pytest.mark.parametrize("form", FORMS)
def test_chats_in_other_forms(tmp_path: Path, form: str) -> None:
    chat = FORMS[form]
    rows = [
        {"chosen": chat, "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [chat[1]], "rejected": BAD},
    ]
    for row in rows:
        pairs, _ = read_pairs(source_of(tmp_path, [row]), PLAIN)
        assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [([USER], [GOOD], [BAD])]
    candidates = [{"text": [chat[1]], "score": 1}, {"text": BAD, "score": 0}]
    sets, _ = read_candidates(source_of(tmp_path, [{"prompt": chat[:1], "candidates": candidates}]), PLAIN)
    assert (sets[0].prompt, sets[0].texts) == ([USER], [[GOOD], [BAD]])


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
UNREADABLE: dict[str, list[Any]] = {
    "has tool calls, which cannot be honoured": [CALL, {**GOOD, "function_call": {"name": "f"}}],
    "has a message from neither human, gpt nor system": [
        {"from": "observation", "value": "x"},
        {"from": 3, "value": "x"},
    ],
    "has content parts that are not text": [
        {"role": "user", "content": [{"type": "image", "url": "x"}]},
        {"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "image"}]},
        {"role": "user", "content": ["w1"]},
    ],
    "has a message with fields that are neither text nor numbers": [{**GOOD, "documents": [{"a": 1}]}],
    "is neither text nor messages": [
        {"role": "assistant"},
        {"role": "assistant", "content": 5},
        {"role": 1, "content": "w1"},
        {"from": "gpt", "value": None},
        "w1",
    ],
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_what_cannot_be_read_is_refused_with_the_true_reason(tmp_path: Path, reason: str) -> None:
    messages = UNREADABLE[reason]
    rows = [{"chosen": [USER, message], "rejected": [USER, BAD]} for message in messages]
    _, report = read_pairs(source_of(tmp_path, [*rows, {"chosen": [GOOD], "rejected": [BAD]}]), SKIP)
    assert report.reasons == {f"chosen {reason}": list(range(1, len(messages) + 1))}


@pytest.mark.parametrize("adds", ["<s> $A", "<s> $A <eos>"])
def test_rendered_text_has_one_bos(adds: str) -> None:
    """Its ids are those of plain transformers without special tokens, whatever the tokenizer would add."""
    tokenizer = tokenizer_of(adds=adds)
    text = tokenizer.apply_chat_template([USER, GOOD], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    assert ids[0] == bos and ids.count(bos) == 1 and tokenizer(text)["input_ids"][:2] == [bos, bos]
    assert encode(tokenizer, "", text).ids == ids == encode(tokenizer, [USER], [GOOD]).ids
    # The same text in two pieces: what the prompt holds is known.
    prompt = tokenizer.apply_chat_template([USER], tokenize=False)
    parted = encode(tokenizer, prompt, text.removeprefix(prompt))
    chat = encode(tokenizer, [USER], [GOOD])
    assert parted == chat and parted.prompt_length == len(
        tokenizer(prompt, add_special_tokens=False).input_ids
    )
    # Plain text gets the tokenizer's own, as before.
    assert encode(tokenizer, "w1 ", "w2").ids == tokenizer("w1 w2<eos>")["input_ids"]
    opened = f"{prompt} w52"
    assert prompt_ids(tokenizer, [opened]) == [tokenizer(opened, add_special_tokens=False).input_ids]


def test_a_policy_is_trained_on_the_tokens_that_it_is_sampled_with() -> None:
    from trl.trainer.rloo_trainer import RLOOTrainer

    from moemerge.training.policy_gradient import PolicyTrainer

    assert hasattr(RLOOTrainer, "_tokenize_prompts"), "what PolicyTrainer overrides"
    tokenizer, texts = tokenizer_of(), ["w60 w50 w1 w52", "w1 w2"]
    ids, _, _ = PolicyTrainer._tokenize_prompts(SimpleNamespace(processing_class=tokenizer), texts)
    alone = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert ids == prompt_ids(tokenizer, texts) == [alone, tokenizer(texts[1])["input_ids"]]


def test_scores_of_rendered_text_are_those_of_the_chat(tmp_path: Path) -> None:
    """Under plain transformers, one text at a time."""
    tiny_dense(bos_token_id=63).save_pretrained(tmp_path / "rm")
    tokenizer_of().save_pretrained(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32).eval()
    chats = [[USER, GOOD], [USER, BAD]]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    wanted = [
        model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0].item()
        for text in texts
    ]
    ours = score(
        load_reward_model(tmp_path / "rm", torch.device("cpu")),
        tokenizer,
        [encode(tokenizer, "", text) for text in texts],
        1000,
    )
    assert ours.tolist() == pytest.approx(wanted, abs=1e-6)
    out = moemerge.evaluate(
        models={"rm": str(tmp_path / "rm")},
        pairs={
            "text": source_of(tmp_path, [{"chosen": texts[0], "rejected": texts[1]}]),
        },
        output=tmp_path / "report",
        device="cpu",
        probes=["accuracy"],
    )
    report = json.loads((out / "report.json").read_text())
    means = report["probes"]["accuracy"]["sets"]["text"]["all"]["models"]["rm"]
    assert means["loss"] == pytest.approx(
        -torch.nn.functional.logsigmoid(torch.tensor(wanted[0] - wanted[1])).item(), abs=1e-6
    )


def test_a_second_bos_behind_the_prompt_is_a_bad_row() -> None:
    tokenizer = tokenizer_of()
    pairs = [Pair("w60 w1 ", "w60 w2", "w3", row=1), Pair("w60 w1 ", "w2", "w3", row=2)]
    report = RowReport("x", total=2)
    assert [one.pair.row for one in encode_pairs(tokenizer, pairs, SKIP, report)] == [2]
    assert report.reasons == {"answer begins with the BOS token, behind its prompt": [1]}
    tokenizer.bos_token = tokenizer.eos_token  # as GPT-2 has it: it parts texts
    assert len(encode_pairs(tokenizer, pairs, PLAIN, RowReport("x", total=2))) == 2


def test_plain_text_for_a_chat_model_is_told_once_a_file(caplog: pytest.LogCaptureFixture) -> None:
    def told(tokenizer: PreTrainedTokenizerFast, rows: list[Pair], times: int = 1) -> int:
        report = RowReport("file.jsonl", total=len(rows))
        caplog.clear()
        for _ in range(times):
            encode_pairs(tokenizer, rows, PLAIN, report)
        lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert all("file.jsonl is plain text" in line and "chat template" in line for line in lines)
        return len(lines)

    plain = [Pair("w1 ", "w2", "w3", row=row) for row in (1, 2)]
    assert told(tokenizer_of(), plain, times=2) == 1
    assert told(tokenizer_of(template=None), plain) == 0
    with writing_below(Path(".")):  # a run's own parts of what it has read
        assert told(tokenizer_of(), plain) == 0
    with writing_below(Path("run")):
        assert told(tokenizer_of(), plain) == 1
    assert told(tokenizer_of(), [Pair([USER], [GOOD], [BAD], row=1)]) == 0
    assert told(tokenizer_of(), [Pair("w60 w1 ", "w2", "w3", row=1)]) == 0, "rendered beforehand"
    assert told(tokenizer_of(), [Pair("", "w60 w2", "w60 w3", row=1)]) == 0


def test_the_templates_own_words_and_a_fitting_remedy() -> None:
    rows = [Pair([SYSTEM, USER], [GOOD], [BAD], row=1), Pair([USER], [USER_2], [BAD], row=2)]
    rows += [Pair([SYSTEM, USER], [BAD], [GOOD], row=3)]
    report = RowReport("x", total=3)
    with pytest.raises(DataError) as error:
        encode_pairs(tokenizer_of(), rows, PLAIN, report)
    system, turns = (
        f"chat template refuses the messages: {words}"
        for words in ("System role not supported", "Roles must alternate")
    )
    assert report.reasons == {system: [1, 3], turns: [2]}
    assert f"{system}: 2 (row 1, 3)" in error.value.given
    assert "fold the system message into" in error.value.fix and "take turns" in error.value.fix
    assert "max_length" not in str(error.value)


def test_the_words_of_a_hostile_template_are_one_short_line() -> None:
    tokenizer = tokenizer_of(
        "{{ raise_exception('a\x1b[31m\u202e\n' ~ messages[0]['content'] ~ 'b' * 9000) }}"
    )
    rows = [Pair([{**USER, "content": f"w{i}"}], [GOOD], [BAD], row=i) for i in range(200)]
    with pytest.raises(DataError, match="160 other reasons") as error:
        encode_pairs(tokenizer, rows, PLAIN, RowReport("x", total=200))
    assert len(error.value.given) < 40 * 300 and error.value.given.isprintable()


HOSTILE = {
    "nested loops": "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,  # more than Python's compiler takes
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a call of itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "half a letter": "{{ '\\ud800' }}",
    "no file to be included": "{% include 'x' %}",
    "no such attribute": "{{ messages.x.y }}",
    "a format that does not fit": "{{ '%d' % 'a' }}",
    "no syntax": "{% for %}",
    "what the sandbox refuses": "{{ ''.__class__.__mro__ }}",
    "memory for nothing": "{{ 'a' * 10 ** 18 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_template_raises_makes_bad_rows(name: str) -> None:
    pairs = [Pair([USER], [GOOD], [BAD], row=1)]
    with pytest.raises(DataError, match="cannot be used") as error:
        encode_pairs(tokenizer_of(HOSTILE[name]), pairs, SKIP, RowReport("x", total=1))
    assert len(error.value.given) < 300 and error.value.given.isprintable()


def test_prompts_that_the_policys_template_refuses_are_bad_rows(tmp_path: Path) -> None:
    rows = [{"prompt": [SYSTEM, USER]}, {"prompt": [USER]}]
    options = {"model": "x", "prompts": source_of(tmp_path, rows), "output": tmp_path / "out"}
    for bad_rows in ("refuse", "skip"):
        chosen = Sample(**options, bad_rows=bad_rows, max_new_tokens=4)
        prompts, report = read_prompts(chosen.prompts, chosen)
        if bad_rows == "skip":
            assert [p.row for p in short_prompts(prompts, report, tokenizer_of(), chosen)] == [2]
            continue
        with pytest.raises(DataError, match="System role not supported") as error:
            short_prompts(prompts, report, tokenizer_of(), chosen)
        assert "fold the system message" in error.value.fix

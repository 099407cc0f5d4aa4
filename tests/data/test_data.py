"""Reading, checking, tokenising and splitting preference data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.pairs import CandidateSet, Pair, numbered, prompt_key
from moemerge.data.reading import read_candidates, read_pairs
from moemerge.data.rows import BadRow, RowReport
from moemerge.data.tokenise import Encoded, encode, encode_candidates, encode_pairs
from moemerge.errors import DataError, OptionError
from moemerge.options.base import TextFormat
from moemerge.stages import data as data_stage
from moemerge.stages.data import prepare

PLAIN = TextFormat()
SKIP = TextFormat(bad_rows="skip")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "w50 {{ m['role'] == 'user' and 'w51' or 'w52' }} {{ m['content'] }} <eos> {% endfor %}"
)
USER = {"role": "user", "content": "w1 w2"}
GOOD = {"role": "assistant", "content": "w3 w4"}
BAD = {"role": "assistant", "content": "w5"}


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_lines(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair_row(number: int = 0, **changes: object) -> dict[str, object]:
    return {"prompt": f"p{number}", "chosen": f"good {number}", "rejected": f"bad {number}", **changes}


def parts(error: pytest.ExceptionInfo[DataError]) -> list[str]:
    return [error.value.what, error.value.given, error.value.expected, error.value.fix]


FORMS = {
    "text with prompt": (
        {"prompt": "q ", "chosen": "a", "rejected": "b", "subset": "s", "margin": 2},
        ("q ", "a", "b", "s", 2.0),
    ),
    "text without prompt": ({"chosen": "q a", "rejected": "q b"}, ("", "q a", "q b", "", None)),
    "chat with prompt": (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        ([USER], [GOOD], [BAD], "", None),
    ),
    "chat without prompt": (
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
        ([USER, GOOD, USER], [GOOD], [BAD], "", None),
    ),
    "chat that shares nothing": ({"chosen": [GOOD], "rejected": [BAD]}, ([], [GOOD], [BAD], "", None)),
    "chat with the prompt as text beside it": (
        {"prompt": "w1 w2", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        ([USER], [GOOD], [BAD], "", None),
    ),
    "chat prompt, text answers": (
        {"prompt": [USER], "chosen": "w3 w4", "rejected": "w5"},
        ([USER], [GOOD], [BAD], "", None),
    ),
    "absent values as parquet gives them": (
        {
            "prompt": [{**USER, "name": None}],
            "chosen": [GOOD],
            "rejected": [BAD],
            "subset": None,
            "margin": None,
        },
        ([USER], [GOOD], [BAD], "", None),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_pair_forms(tmp_path: Path, form: str) -> None:
    row, (prompt, chosen, rejected, subset, margin) = FORMS[form]
    pairs, report = read_pairs(write_lines(tmp_path / "x.jsonl", [row]), PLAIN)
    assert pairs == [Pair(prompt, chosen, rejected, subset, margin, row=1, source=row)]
    assert (report.total, report.kept, report.reasons) == (1, 1, {})


def test_every_kind_of_file_gives_the_same_pairs(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "margin": 0.5}, pair_row(1)][:1] * 3
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "e.parquet"))
    read = {p.name: read_pairs(str(p), PLAIN)[0] for p in sorted(tmp_path.iterdir())}
    assert len(read) == 5
    for name, pairs in read.items():
        assert [(p.prompt, p.chosen, p.rejected, p.margin, p.row) for p in pairs] == [
            ([USER], [GOOD], [BAD], 0.5, n) for n in (1, 2, 3)
        ], name


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> object:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([pair_row(7)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name:train", "owner/name:hard:test", "owner/name:train[:10%]"):
        assert read_pairs(source, PLAIN)[0][0].chosen == "good 7"
    assert asked == [
        ("owner/name", None, "train"),
        ("owner/name", "hard", "test"),
        ("owner/name", None, "train[:10%]"),
    ]


def test_hub_dataset_that_cannot_be_had() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="owner/absent cannot be loaded") as error:
        read_pairs("owner/absent:train", PLAIN)
    assert all(parts(error))


def test_fields_are_mapped(tmp_path: Path) -> None:
    rows = [{"question": "q", "good": "a", "bad": "b", "topic": 3, "prompt": "not this"}]
    names = {"prompt": "question", "chosen": "good", "rejected": "bad", "subset": "topic"}
    pairs, _ = read_pairs(write_lines(tmp_path / "x.jsonl", rows), TextFormat(fields=names))
    assert (pairs[0].prompt, pairs[0].chosen, pairs[0].rejected, pairs[0].subset) == ("q", "a", "b", "3")


def test_unknown_field_to_map_is_refused_with_a_near_name(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'chosen'"):
        prepare(output=tmp_path / "out", train="x.jsonl", fields={"chosn": "good"})


BAD_PAIRS = {
    "broken JSON": b'{"chosen": "a"',
    "not UTF-8": b'{"prompt": "p", "chosen": "\xff", "rejected": "b"}',
    "not an object": b'["a", "b"]',
    "missing prompt": b'{"chosen": "a", "rejected": "b"}',
    "missing chosen": b'{"prompt": "p", "rejected": "b"}',
    "missing rejected": b'{"prompt": "p", "chosen": "a", "rejected": null}',
    "chosen is neither text nor messages": b'{"prompt": "p", "chosen": 3, "rejected": "b"}',
    "rejected is neither text nor messages": b'{"prompt": "p", "chosen": "a", "rejected": [{"role": "u"}]}',
    "chosen and rejected are of different kinds": (
        b'{"prompt": "p", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]}'
    ),
    "empty answer": b'{"prompt": "p", "chosen": " \\n", "rejected": "b"}',
    "identical answers": b'{"prompt": "p", "chosen": "a", "rejected": "a"}',
    "margin is not a finite number": b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}',
    "doubt is not a finite number": b'{"prompt": "p", "chosen": "a", "rejected": "b", "doubt": "some"}',
    "doubt is not from 0 to 1": b'{"prompt": "p", "chosen": "a", "rejected": "b", "doubt": 1.5}',
    "subset is not text": b'{"prompt": "p", "chosen": "a", "rejected": "b", "subset": ["s"]}',
    "has tools, which cannot be honoured": b'{"prompt": "p", "chosen": "a", "rejected": "b", "tools": ["t"]}',
    "prompt is text, answers are messages that do not begin with it": (
        b'{"prompt": "p", "chosen": [{"role": "assistant", "content": "a"}],'
        b' "rejected": [{"role": "assistant", "content": "b"}]}'
    ),
}
LONE_SURROGATE = b'{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}'
GOOD_LINE = b'{"prompt": "p", "chosen": "a", "rejected": "b"}'


def test_each_fault_is_counted_by_reason_and_row(tmp_path: Path) -> None:
    lines = [GOOD_LINE, b"", *BAD_PAIRS.values(), LONE_SURROGATE, GOOD_LINE]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    pairs, report = read_pairs(str(tmp_path / "x.jsonl"), SKIP)
    expected = {reason: [3 + i] for i, reason in enumerate(BAD_PAIRS)}
    expected["not UTF-8"].append(3 + len(BAD_PAIRS))
    assert report.reasons == expected
    assert [pair.row for pair in pairs] == [1, len(lines)]
    assert (report.total, report.kept) == (len(lines) - 1, 2)


def test_refused_rows_are_told_in_four_parts(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([GOOD_LINE, *BAD_PAIRS.values()]))
    with pytest.raises(DataError) as error:
        read_pairs(str(tmp_path / "x.jsonl"), PLAIN)
    what, given, expected, fix = parts(error)
    assert f"{len(BAD_PAIRS)} of {len(BAD_PAIRS) + 1} rows" in what
    assert all(f"{reason}: 1 (row {i})" in given for i, reason in enumerate(BAD_PAIRS, 2))
    assert "prompt, chosen, rejected" in expected and "found fields: prompt, chosen, rejected" in expected
    assert "skip" in fix


def test_nothing_left_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b""), ("b.jsonl", BAD_PAIRS["empty answer"]), ("c.json", b"[]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cannot be used"):
            read_pairs(str(tmp_path / name), SKIP)


def test_chat_faults(tmp_path: Path) -> None:
    rows = [
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
        {"chosen": [USER, GOOD], "rejected": [USER]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ]
    _, report = read_pairs(write_lines(tmp_path / "x.jsonl", rows), SKIP)
    assert report.reasons == {"identical answers": [1], "empty answer": [2]}


def test_sources_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(GOOD_LINE)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD_LINE * 100)[:-12])
    (tmp_path / "no.parquet").write_bytes(b"no")
    (tmp_path / "object.json").write_bytes(GOOD_LINE)
    (tmp_path / "pairs.csv").write_bytes(b"a,b")
    hints = {
        tmp_path: "cut.jsonl.gz",
        tmp_path / "pair.jsonl": f"did you mean '{tmp_path}/pairs.jsonl'",
        tmp_path / "cut.jsonl.gz": "again",
        tmp_path / "no.parquet": "again",
        tmp_path / "object.json": "list",
        tmp_path / "pairs.csv": "convert",
        Path("owner/name"): "owner/name:train",
    }
    for source, hint in hints.items():
        with pytest.raises(DataError) as error:
            read_pairs(str(source), PLAIN)
        assert hint in error.value.fix and all(parts(error)), source


def test_candidates(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "q",
            "candidates": [{"text": "a", "score": 1}, {"text": "b", "score": -0.5}],
            "subset": "s",
        }
    ]
    sets, report = read_candidates(write_lines(tmp_path / "x.jsonl", rows), PLAIN)
    assert sets == [CandidateSet("q", ["a", "b"], [1.0, -0.5], "s", row=1)]
    assert report.kept == 1
    renamed = [{"q": "q", "answers": [{"t": "a", "gold": 1}, {"t": "b", "gold": 0}]}]
    names = {"prompt": "q", "candidates": "answers", "text": "t", "score": "gold"}
    sets, _ = read_candidates(write_lines(tmp_path / "y.jsonl", renamed), TextFormat(fields=names))
    assert sets == [CandidateSet("q", ["a", "b"], [1.0, 0.0], row=1)]


def test_candidate_faults(tmp_path: Path) -> None:
    good, other = {"text": "a", "score": 1.0}, {"text": "b", "score": 2.0}
    bad = {
        "missing prompt": {"candidates": [good, other]},
        "missing candidates": {"prompt": "q"},
        "candidates is not a list of objects": {"prompt": "q", "candidates": ["a", "b"]},
        "fewer than 2 candidates": {"prompt": "q", "candidates": [good]},
        "missing score": {"prompt": "q", "candidates": [good, {"text": "b"}]},
        "score is not a finite number": {
            "prompt": "q",
            "candidates": [good, {"text": "b", "score": float("nan")}],
        },
        "missing text": {"prompt": "q", "candidates": [good, {"score": 1.0}]},
        "empty answer": {"prompt": "q", "candidates": [good, {"text": "", "score": 1.0}]},
        "prompt and text are of different kinds": {
            "prompt": "q",
            "candidates": [good, {"text": [GOOD], "score": 1.0}],
        },
    }
    source = write_lines(tmp_path / "x.jsonl", [*bad.values(), {"prompt": "q", "candidates": [good, other]}])
    sets, report = read_candidates(source, SKIP)
    assert report.reasons == {reason: [i] for i, reason in enumerate(bad, 1)}
    assert [one.row for one in sets] == [len(bad) + 1]


def trl_ids(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, object]]
) -> list[tuple[list[int], list[int]]]:
    """What TRL's own RewardTrainer makes of `rows`."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None)
    made = trl.RewardTrainer._prepare_dataset(
        None, datasets.Dataset.from_list(rows), tokenizer, arguments, "train"
    )
    return [(row["chosen_ids"], row["rejected_ids"]) for row in made]


TRL_ROWS: dict[str, list[dict[str, object]]] = {
    "text with prompt": [
        {"prompt": "w1 w2 ", "chosen": "w3 w4", "rejected": "w5<eos>"},
        {"prompt": "w1", "chosen": "w3", "rejected": " w6 unknown"},
    ],
    "text without prompt": [{"chosen": "w1 w2 w3", "rejected": "w1 w4"}],
    "chat with prompt": [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD, USER, GOOD]}],
    "chat without prompt": [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}],
}


@pytest.mark.parametrize("begins_with", ["", "<unk> "])
@pytest.mark.parametrize("form", TRL_ROWS)
def test_tokens_are_those_of_trl(tmp_path: Path, form: str, begins_with: str) -> None:
    """With and without special tokens that the tokenizer adds by itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer()
    post = TemplateProcessing(single=f"{begins_with}$A", special_tokens=[("<unk>", 2)])
    tokenizer.backend_tokenizer.post_processor = post
    rows = TRL_ROWS[form]
    pairs, report = read_pairs(write_lines(tmp_path / "x.jsonl", rows), PLAIN)
    ours = encode_pairs(tokenizer, pairs, PLAIN, report)
    assert [(one.chosen.ids, one.rejected.ids) for one in ours] == trl_ids(tokenizer, rows)
    singly = [(encode(tokenizer, p.prompt, p.chosen), encode(tokenizer, p.prompt, p.rejected)) for p in pairs]
    assert singly == [(one.chosen, one.rejected) for one in ours]


def test_prompt_length() -> None:
    tokenizer = chat_tokenizer()
    w = tokenizer.convert_tokens_to_ids(["w0"])[0]
    assert encode(tokenizer, "w1 w2 ", "w3") == Encoded([w + 1, w + 2, w + 3, 1], 2)
    assert encode(tokenizer, "", "w3") == Encoded([w + 3, 1], 0)
    assert encode(tokenizer, "w1 w", "3 w4") == Encoded([w + 1, w + 3, w + 4, 1], 1), (
        "joined word is no prompt"
    )
    chat = [w + 50, w + 51, w + 1, w + 2, 1, w + 50, w + 52, w + 3, w + 4, 1]
    assert encode(tokenizer, [USER], [GOOD]) == Encoded(chat, 5)
    assert encode(tokenizer, [], [USER, GOOD]) == Encoded(chat, 0)


def test_tokenizer_without_eos_adds_none() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert encode(tokenizer, "w1 ", "w2").ids == tokenizer.convert_tokens_to_ids(["w1", "w2"])


def test_templates_that_are_missing_or_refuse() -> None:
    with pytest.raises(DataError, match="chat template"):
        encode(tiny_tokenizer(), [USER], [GOOD])
    system = {"role": "system", "content": "w1"}
    with pytest.raises(BadRow, match="refuses"):
        encode(chat_tokenizer(), [system, USER], [GOOD])
    pairs = [Pair([system], [GOOD], [BAD], row=1), Pair([USER], [GOOD], [BAD], row=2)]
    report = RowReport("x", total=2)
    assert [one.pair.row for one in encode_pairs(chat_tokenizer(), pairs, SKIP, report)] == [2]
    assert report.reasons == {"chat template refuses the messages: no system": [1]}


def test_too_long_is_a_bad_row_and_never_cut() -> None:
    pairs = [
        Pair("w1 ", "w2", "w3", row=1),
        Pair("w1 ", "w2 w3", "w4", row=2),
        Pair("w1 ", "w2", "w3 w4", row=3),
    ]
    report = RowReport("x", total=3)
    kept = encode_pairs(tiny_tokenizer(), pairs, TextFormat(max_length=3, bad_rows="skip"), report)
    assert [one.pair.row for one in kept] == [1] and len(kept[0].chosen.ids) == 3
    assert report.reasons == {"longer than 3 tokens": [2, 3]} and report.kept == 1
    with pytest.raises(DataError, match="2 of 3 rows"):
        encode_pairs(tiny_tokenizer(), pairs, TextFormat(max_length=3), RowReport("x", total=3))
    with pytest.raises(DataError, match="3 of 3 rows"):
        encode_pairs(
            tiny_tokenizer(), pairs, TextFormat(max_length=2, bad_rows="skip"), RowReport("x", total=3)
        )


def test_candidate_set_with_a_long_answer_is_bad() -> None:
    sets = [
        CandidateSet("w1 ", ["w2", "w3 w4"], [0, 1], row=1),
        CandidateSet("w1 ", ["w2", "w3"], [0, 1], row=2),
    ]
    report = RowReport("x", total=2)
    kept = encode_candidates(tiny_tokenizer(), sets, TextFormat(max_length=3, bad_rows="skip"), report)
    assert [one.candidates.row for one in kept] == [2]
    assert [one.prompt_length for one in kept[0].answers] == [1, 1]
    assert report.reasons == {"longer than 3 tokens": [1]}


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_prepare_writes_plain_names(tmp_path: Path) -> None:
    names = {"prompt": "q", "chosen": "good", "rejected": "bad", "subset": "kind", "text": "t", "score": "s"}
    row = {"q": "é ", "good": "a", "bad": "b", "kind": "x", "margin": 1, "doubt": 0, "other": 5}
    train = write_lines(tmp_path / "train.jsonl", [row])
    wide = write_lines(
        tmp_path / "c.jsonl", [{"q": "q", "candidates": [{"t": "a", "s": 1}, {"t": "b", "s": 2}]}]
    )
    out = prepare(
        output=tmp_path / "out",
        train=train,
        validation=train,
        fit=train,
        tests={"hard": train},
        candidates={"wide": wide},
        fields=names,
    )
    plain = [{"prompt": "é ", "chosen": "a", "rejected": "b", "subset": "x", "margin": 1.0, "doubt": 0.0}]
    for name in ("train", "validation", "fit", "tests/hard"):
        assert rows_of(out / f"{name}.jsonl.gz") == plain
    candidates = [{"text": "a", "score": 1.0}, {"text": "b", "score": 2.0}]
    assert rows_of(out / "candidates/wide.jsonl.gz") == [{"prompt": "q", "candidates": candidates}]
    results = read_manifest(out)["results"]
    assert results["sizes"] == {"train": 1, "validation": 1, "fit": 1, "tests/hard": 1, "candidates/wide": 1}
    assert results["seen_in_train"] == {"validation": 1, "fit": 1, "tests/hard": 1}
    again = read_pairs(str(out / "train.jsonl.gz"), PLAIN)[0][0]
    assert (again.prompt, again.subset, again.margin, again.doubt) == ("é ", "x", 1.0, 0.0)


def many_rows(groups: int, per_group: int) -> list[object]:
    rows = [pair_row(10 * g + i, prompt=f"p{g}", topic=g) for i in range(per_group) for g in range(groups)]
    return list(rows)


def prepared(
    folder: Path, name: str, rows: list[object], **options: object
) -> dict[str, list[dict[str, object]]]:
    source = write_lines(folder / f"{name}.jsonl", rows)
    out = prepare(output=folder / name, train=source, **options)
    return {str(p.relative_to(out)).removesuffix(".jsonl.gz"): rows_of(p) for p in sorted(out.rglob("*.gz"))}


def test_pairs_of_one_prompt_have_one_key() -> None:
    """Whatever the order of a message's fields; without prompts only copies are alike."""
    chat, turned = [{"role": "user", "content": "hi"}], [{"content": "hi", "role": "user"}]
    pairs = [
        Pair("hi", "a", "b"),
        Pair("hi", "c", "d", row=2),
        Pair(chat, "a", "b"),
        Pair(turned, "c", "d"),
        Pair("", "a", "b", row=5),
        Pair("", "a", "c"),
        Pair("", "a", "b", row=7),
    ]
    assert numbered(map(prompt_key, pairs)) == [0, 0, 1, 1, 2, 3, 2]


@pytest.mark.parametrize("split_by", [None, "topic"])
def test_no_group_straddles_a_split(tmp_path: Path, split_by: str | None) -> None:
    rows = many_rows(20, 5)
    made = prepared(tmp_path, "out", rows, split_by=split_by, validation_share=0.2, test_share=0.1)
    assert {name: len(some) for name, some in made.items()} == {
        "train": 70,
        "validation": 20,
        "tests/test": 10,
    }
    prompts = {name: {row["prompt"] for row in some} for name, some in made.items()}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 20
    seen = sorted(row["chosen"] for some in made.values() for row in some)
    assert seen == sorted(row["chosen"] for row in rows), "every row is in one split"


def test_split_depends_on_the_seed_only(tmp_path: Path) -> None:
    rows = many_rows(20, 2)
    first, same = (prepared(tmp_path, name, rows, seed=3) for name in "ab")
    other = prepared(tmp_path, "c", rows, seed=4)
    assert first == same and first != other
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.gz")]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_uneven_groups_come_as_near_to_the_share_as_they_can(tmp_path: Path) -> None:
    rows = [pair_row(i, prompt=f"p{i if i < 50 else 99}") for i in range(100)]
    for seed in range(5):
        made = prepared(tmp_path, f"s{seed}", rows, seed=seed, validation_share=0.3)
        assert len(made["train"]) + len(made["validation"]) == 100
        assert len(made["validation"]) in (30, *range(50, 81)) or len(made["validation"]) < 30
        assert made["train"] and made["validation"]


def test_caps_draw_without_order_change(tmp_path: Path) -> None:
    rows = many_rows(40, 1)
    tests = {"other": write_lines(tmp_path / "t.jsonl", many_rows(30, 1))}
    answers = [{"text": "a", "score": 1}, {"text": "b", "score": 2}]
    sets = write_lines(tmp_path / "c.jsonl", [{"prompt": f"q{i}", "candidates": answers} for i in range(9)])
    caps = {"max_train": 11, "max_validation": 3, "max_test": 7, "max_prompts": 4}
    made = prepared(tmp_path, "out", rows, tests=tests, candidates={"c": sets}, **caps)
    sizes = {"train": 11, "validation": 3, "tests/other": 7, "candidates/c": 4}
    assert {name: len(some) for name, some in made.items()} == sizes
    numbers = [int(str(row["prompt"])[1:]) for row in made["train"]]
    assert numbers == sorted(numbers) and numbers != list(range(11))


def test_prepare_measures_lengths(tmp_path: Path, dense_folder: Path) -> None:
    long = {"prompt": "w1 ", "chosen": "w2 w3 w4", "rejected": "w5"}
    short = {"prompt": "w1 ", "chosen": "w2", "rejected": "w5"}
    sets = [
        {"prompt": "w1 ", "candidates": [{"text": t, "score": 0} for t in ("w2", more)]}
        for more in ("w3", "w3 w4")
    ]
    source = {"c": write_lines(tmp_path / "c.jsonl", sets)}
    options = {"tokenizer": str(dense_folder), "max_length": 3, "bad_rows": "skip", "validation_share": 0.0}
    made = prepared(tmp_path, "out", [long, short], candidates=source, **options)
    assert made["train"] == [short] and len(made["candidates/c"]) == 1
    bad = {"longer than 3 tokens": {"count": 1, "rows": [1]}}
    results = read_manifest(tmp_path / "out")["results"]
    assert results["rows"]["train"] == {
        "source": str(tmp_path / "out.jsonl"),
        "total": 2,
        "kept": 1,
        "bad": bad,
    }
    assert results["rows"]["candidates/c"]["bad"] == {"longer than 3 tokens": {"count": 1, "rows": [2]}}
    with pytest.raises(DataError, match="(?s)longer than 3 tokens.*raise max_length"):
        prepare(
            output=tmp_path / "no",
            train=str(tmp_path / "out.jsonl"),
            tokenizer=str(dense_folder),
            max_length=3,
            validation_share=0.0,
        )


def test_only_drawn_rows_are_tokenised(
    tmp_path: Path, dense_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad rows among the drawn are replaced, and what nobody needed is neither encoded nor bad."""
    seen: list[int] = []
    encode = data_stage.encode_pairs

    def spy(tokenizer: Any, pairs: Any, *rest: Any) -> Any:
        seen.extend(pair.row for pair in pairs)
        return encode(tokenizer, pairs, *rest)

    monkeypatch.setattr(data_stage, "encode_pairs", spy)
    rows = [
        pair_row(i, prompt="w1 ", chosen="w2 w3 w4" if i % 2 else "w2", rejected="w5") for i in range(200)
    ]
    options = {"tokenizer": str(dense_folder), "max_length": 3, "bad_rows": "skip", "validation_share": 0.0}
    made = prepared(tmp_path, "out", rows, max_train=10, **options)
    assert len(made["train"]) == 10 and all(row["chosen"] == "w2" for row in made["train"])
    assert 10 <= len(seen) == len(set(seen)) < 100
    summary = read_manifest(tmp_path / "out")["results"]["rows"]["train"]
    assert summary["kept"] == 10 and summary["not_drawn"] == 200 - len(seen)
    assert summary["bad"]["longer than 3 tokens"]["count"] == len(seen) - 10


@pytest.mark.parametrize(("bad", "level"), [(1, "INFO"), (3, "WARNING")])
def test_rows_left_out_are_told_by_share_and_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: int, level: str
) -> None:
    rows = [pair_row(i, chosen="") for i in range(bad)] + [pair_row(9 + i) for i in range(20 - bad)]
    with caplog.at_level("INFO", "moemerge"):
        prepared(tmp_path, "out", rows, bad_rows="skip", validation_share=0.0)
    (record,) = [record for record in caplog.records if "left out" in record.message]
    share = f"{bad / 20:.1%}"
    assert record.levelname == level and f"{share} of 20 rows of " in record.message
    assert f"empty answer {share}" in record.message
    assert ("correct these rows" in record.message) == (level == "WARNING")


def test_report_holds_every_bad_row(tmp_path: Path) -> None:
    rows = [pair_row(i, chosen="") for i in range(15)] + [pair_row(90), pair_row(91)]
    prepared(tmp_path, "out", rows, bad_rows="skip", validation_share=0.5)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"]["train"]["bad"]["empty answer"] == {"count": 15, "rows": list(range(1, 16))}
    short = read_manifest(tmp_path / "out")["results"]["rows"]["train"]["bad"]["empty answer"]
    assert short == {"count": 15, "rows": list(range(1, 11))}


def test_data_that_cannot_be_split(tmp_path: Path) -> None:
    one_group = write_lines(tmp_path / "x.jsonl", many_rows(1, 5))
    with pytest.raises(DataError, match="cannot be split into 2 parts"):
        prepare(output=tmp_path / "a", train=one_group)
    with pytest.raises(DataError, match="did you mean 'topic'"):
        prepare(output=tmp_path / "b", train=one_group, split_by="topics")
    bare = write_lines(tmp_path / "bare.jsonl", [pair_row(i, part=None) for i in range(4)])
    with pytest.raises(DataError, match="leave split_by out"):
        prepare(output=tmp_path / "b", train=bare, split_by="chose")
    with pytest.raises(OptionError, match="no data are named"):
        prepare(output=tmp_path / "c")
    with pytest.raises(OptionError, match="called test"):
        prepare(output=tmp_path / "d", train=one_group, tests={"test": one_group}, test_share=0.1)
    assert not list(tmp_path.glob("*/")) or all(p.is_file() for p in tmp_path.iterdir())


def test_too_few_groups_come_with_remedies_that_work(tmp_path: Path) -> None:
    options: dict[str, object] = {"folds": 3, "validation_share": 0.0}
    texts = [pair_row(i, prompt="p ", topic=i % 3) for i in range(6)]
    with pytest.raises(DataError) as one_prompt:
        prepared(tmp_path, "one", list(texts), **options)
    what, given, expected, fix = parts(one_prompt)
    assert (given, expected[:19]) == ("6 rows, all with one prompt", "3 different prompts")
    assert "stay together" in expected and "folds" not in fix and "fields prompt=none" in fix
    joined = [{side: f"p {row[side]}" for side in ("chosen", "rejected")} | {"prompt": "p "} for row in texts]
    assert (
        len(prepared(tmp_path, "joined", joined, fields={"prompt": "none"}, **options)["folds/0/held_out"])
        == 2
    )
    with pytest.raises(DataError, match="folds 2$"):
        prepared(tmp_path, "two", [pair_row(i, prompt=f"p{i % 2}") for i in range(6)], **options)
    rows = [pair_row(i, source="one") for i in range(6)]
    with pytest.raises(DataError, match="one value of source(?s:.*)or leave split_by out"):
        prepared(tmp_path, "sources", list(rows), split_by="source", **options)

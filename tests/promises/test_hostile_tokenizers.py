"""Tokenizers of strangers: what would lengthen a text without end is refused before any text is read."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_files import RECIPE, copy_model, dense_and_pairs, edit_json, jsonl
from refusals import refused
from tiny_models import VOCABULARY

import moemerge
from moemerge.errors import CheckpointError
from moemerge.models.loading import load_tokenizer
from moemerge.models.tokenizer_file import check_tokenizer_json

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and pairs. Read only."""
    return dense_and_pairs(tmp_path_factory.mktemp("world"))


def normal(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def split(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def charsmap(text: str) -> dict[str, Any]:
    """A Precompiled step that has no letter to replace, and `text` to put in its place."""
    data = (4).to_bytes(4, "little") + bytes(4) + text.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def framed(*pieces: dict[str, Any], specials: int = 1) -> dict[str, Any]:
    tokens = {"id": "<eos>", "ids": [1] * specials, "tokens": ["<eos>"] * specials}
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": list(pieces),
            "pair": [TEXT, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<eos>": tokens},
        }
    }


TEXT, SPECIAL = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
LOOK = "(?=.)"

LENGTHENING: dict[str, dict[str, Any]] = {
    "doubling": normal(*[DOUBLE] * 27),
    "doubling_in_sequences": normal(*[normal(*[DOUBLE] * 5)["normalizer"]] * 5),
    "doubling_without_types": normal(*[{k: v for k, v in DOUBLE.items() if k != "type"}] * 12),
    "doubling_beside_an_empty_sequence": {
        "normalizer": {**normal(*[DOUBLE] * 27)["normalizer"], "decoders": []}
    },
    "before_every_letter": normal(*[replace(LOOK, "b", "Regex")] * 12),
    "an_empty_pattern": normal(*[replace("", "b")] * 12),
    "a_long_word": normal(replace("a", "b" * 1_000_000)),
    "a_long_beginning": normal({"type": "Prepend", "prepend": "b" * 1_000_000}),
    "a_long_ligature": normal(*[replace("w", "\ufdfa" * 30), {"type": "NFKC"}]),
    "a_charsmap": normal(charsmap("b" * 1_000_000)),
    "two_charsmaps": normal(*[charsmap("b" * 30)] * 2),
    "steps_without_end": normal(*[{"type": "NFC"}] * 100_000),
    "bytes_as_letters": split(*[BYTES] * 12),
    "bytes_in_the_normalizer": normal(*[{"type": "ByteLevel"}] * 12),
    "a_mark_before_every_piece": split(*[METASPACE, {**METASPACE, "replacement": "x"}] * 6),
    "normalizer_and_split": normal(*[DOUBLE] * 5) | split(*[BYTES] * 3),
    "specials_without_end": framed(*[SPECIAL] * 3000),
    "a_special_of_many": framed(SPECIAL, TEXT, specials=3000),
    "the_text_many_times": framed(*[TEXT] * 3000),
    "decoding": {"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 27}},
    "decoding_between_all_letters": {
        "decoder": {"type": "Sequence", "decoders": [{"type": "BPEDecoder", "suffix": ""}] * 12}
    },
    "long_words": {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9}},
    "a_long_prefix": {"model": {"type": "WordPiece", "continuing_subword_prefix": "#" * 1_000_000}},
    "a_long_suffix": {"model": {"type": "BPE", "merges": [], "end_of_word_suffix": "#" * 1_000_000}},
}


def spoilt(world: Path, folder: Path, change: dict[str, Any], file: str = "tokenizer.json") -> Path:
    """A copy of the model whose tokenizer.json has been changed; its model keeps what is not given."""
    model = copy_model(world / "dense", folder / "model")
    held = json.loads((model / "tokenizer.json").read_text())
    change = {**change, "model": {**held["model"], **change.get("model", {})}}
    (model / file).write_text(json.dumps({**held, **change}))
    return model


def doors(model: Path, world: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `moemerge check`, a command and the Python call of its stage say: all refuse the model."""
    recipe, pairs = folder / "recipe.yml", world / "pairs.jsonl"
    recipe.write_text(RECIPE.replace("dense", str(model)).replace("pairs.jsonl", str(pairs)))
    said = [refused(["check", recipe], folder, capsys)]
    command = ["evaluate", "--models", f"m={model}", "--pairs", f"t={pairs}", "--output", folder / "out"]
    said.append(refused(command, folder, capsys))
    with pytest.raises(CheckpointError) as caught:
        moemerge.evaluate(models={"m": str(model)}, pairs={"t": str(pairs)}, output=folder / "out")
    return [*said, str(caught.value)]


@pytest.mark.parametrize("name", LENGTHENING)
def test_what_would_lengthen_a_text_is_refused_unread(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = spoilt(world, tmp_path, LENGTHENING[name])
    reason = " is above " if name == "long_words" else "more than "
    for said in doors(model, world, tmp_path, capsys):
        assert "the tokenizer cannot be loaded" in said and reason in said


def _twice(model: Path) -> None:
    """A second normalizer of null, which Python reads, while the library keeps the first."""
    text = (model / "tokenizer.json").read_text()
    first = json.dumps(normal(*[DOUBLE] * 27))[1:-1]
    (model / "tokenizer.json").write_text("{" + first + "," + text.lstrip()[1:])


def _of_a_version(model: Path) -> None:
    values = json.loads((model / "tokenizer.json").read_text()) | normal(*[DOUBLE] * 27)
    (model / "tokenizer.4.0.0.json").write_text(json.dumps(values))
    edit_json(model / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])


def _names(count: int) -> list[str]:
    return [f"<{number}>" for number in range(count)]


def _added(count: int) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return [{"id": 100 + number, "content": name, **flags} for number, name in enumerate(_names(count))]


def _configured(**values: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "tokenizer_config.json", **values)


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "two_normalizers": (_twice, "given twice"),
    "another_version": (_of_a_version, "more than"),
    "millions_of_lists": (
        lambda model: (model / "tokenizer.json").write_text('{"x": [' + "[]," * 4_000_001 + "[]]}") and None,
        "holds more than 4000000 values",
    ),
    "a_long_config": (
        lambda model: (model / "tokenizer_config.json").write_text(" " * 31_000_000) and None,
        "31000000 bytes",
    ),
    "no_object": (lambda model: (model / "tokenizer.json").write_text("[]") and None, "holds a list"),
    "no_sense": (lambda model: edit_json(model / "tokenizer.json", normalizer="x"), "makes no sense"),
    "no_sense_beside_it": (_configured(added_tokens_decoder=[1]), "makes no sense"),
    "many_tokens": (
        lambda model: edit_json(model / "tokenizer.json", added_tokens=_added(201_000)),
        "201000 added tokens",
    ),
    "many_special_tokens": (_configured(extra_special_tokens=_names(3000)), "3000 special ones"),
    "many_named_tokens": (_configured(**{f"a{i}_token": f"<a{i}>" for i in range(3000)}), "special ones"),
    "a_billion_tokens": (_configured(tokenizer_class="T5Tokenizer", extra_ids=10**9), "1000000000 tokens"),
    "a_billion_by_place": (_configured(init_inputs=[None] * 5 + [10**9]), "1000000000 tokens"),
    "a_far_token": (_configured(added_tokens_decoder={str(10**12): {"content": "x"}}), "above 10000000"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_tokenizers_files_out_of_bounds(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = FILES[name]
    model = copy_model(world / "dense", tmp_path / "model")
    spoil(model)
    assert all(reason in said for said in doors(model, world, tmp_path, capsys))


BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
NMT_NFKC = charsmap("صلى الله عليه وسلم")  # the longest text of sentencepiece's own
SPACES, GPT = replace(" {2,}", "▁", "Regex"), {"type": "Split", "pattern": {"Regex": "\\p{L}+"}}
FRAME = framed(SPECIAL, TEXT, SPECIAL)
LETTERS = "ابپتثجچحخدذرزژسشصضطظعغفقکگلمنوهی"
KNOWN: dict[str, dict[str, Any]] = {
    "none": {},
    "llama": normal({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")) | FRAME,
    "llama3": split(GPT, BYTES)
    | {"post_processor": {"type": "Sequence", "processors": [BYTES, FRAME["post_processor"]]}},
    "gemma": {"normalizer": replace(" ", "▁"), "pre_tokenizer": GPT} | FRAME,
    "qwen2": {"normalizer": {"type": "NFC"}, "post_processor": BYTES} | split(GPT, BYTES),
    "bert": {"normalizer": BERT, "pre_tokenizer": {"type": "BertPreTokenizer"}} | FRAME,
    "roberta": {"pre_tokenizer": BYTES, "post_processor": {"type": "RobertaProcessing"}},
    "t5": normal(NMT_NFKC, SPACES) | split({"type": "WhitespaceSplit"}, METASPACE) | FRAME,
    "deberta-v3": normal({"type": "Strip"}, NMT_NFKC, SPACES) | split(METASPACE) | FRAME,
    "albert": normal(
        replace("``", '"'),
        replace("''", '"'),
        *({"type": kind} for kind in ("NFKD", "StripAccents", "Lowercase")),
        NMT_NFKC,
        SPACES,
    )
    | split({"type": "WhitespaceSplit"}, METASPACE)
    | FRAME,
    "clip": normal({"type": "NFC"}, replace("\\s+", " ", "Regex"), {"type": "Lowercase"}) | split(GPT, BYTES),
    "decoders": {
        "decoder": {
            "type": "Sequence",
            "decoders": [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip"}],
        }
    },
    "a_table_of_letters": normal(*[replace(letter, "x") for letter in LETTERS * 10]),
    "long_words_cut": {"model": {"type": "WordPiece", "max_input_chars_per_word": 100}},
}


@pytest.mark.parametrize("name", KNOWN)
def test_tokenizers_as_they_are_pass(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(KNOWN[name]))
    check_tokenizer_json(tmp_path / "tokenizer.json")


def test_the_tiny_tokenizer_is_loaded(world: Path) -> None:
    assert len(load_tokenizer(str(world / "dense"))) == len(VOCABULARY)


WORDS = {word: number for number, word in enumerate(VOCABULARY)}
PAIRS_OF_W = [{"prompt": "w1 ", "chosen": "w" * 60, "rejected": "w2"}]
FAILING: dict[str, dict[str, Any]] = {
    # What Rust gives up at, when the file is read or when a text is.
    "prefix_of_no_piece": {
        "model": {
            "type": "BPE",
            "vocab": {**WORDS, "w": 70, "1": 71, "w1": 72},
            "merges": [["w", "1"]],
            "continuing_subword_prefix": "()",
        }
    },
    "template_of_no_token": {
        "post_processor": {**framed(SPECIAL, TEXT)["post_processor"], "special_tokens": {}},
    },
    "pieces_of_no_length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "trie_of_no_sense": normal({"type": "Precompiled", "precompiled_charsmap": "AAECAwQFBgcICQ=="}),
    "regex_of_no_sense": {"normalizer": replace("(", "", "Regex")},
    # These fail at some texts only.
    "a_regex_that_goes_back": {"normalizer": replace("(w+)+c", "", "Regex")},
    "no_unknown_token": {"model": {"type": "WordLevel", "vocab": {"a": 0, "<eos>": 1}, "unk_token": "?"}},
}


@pytest.mark.parametrize("name", FAILING)
def test_a_library_that_gives_up_is_a_fault_of_the_tokenizer(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = spoilt(world, tmp_path, FAILING[name])
    data = jsonl(tmp_path / "data.jsonl", PAIRS_OF_W)
    command = ["evaluate", "--models", f"m={model}", "--pairs", f"t={data}", "--output", tmp_path / "out"]
    assert "the tokenizer cannot " in refused(command, tmp_path, capsys)
    with pytest.raises(CheckpointError, match="the tokenizer cannot "):
        moemerge.evaluate(models={"m": str(model)}, pairs={"t": str(data)}, output=tmp_path / "out")

"""tokenizer.json and tokenizer_config.json as they lie on disk: what they can make of a text, bounded.

A few hundred bytes of them are enough to make a text a thousand million times as long, or a billion tokens.
Imports nothing heavy.
"""

from __future__ import annotations

import base64
import math
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import read_object

FILE, ADDED = "tokenizer.json", "added_tokens.json"
MAX_WORK = 500  # letters that all steps together may make of one; known tokenizers stay below 300
MAX_WORD = 1000  # letters of a word in WordPiece, whose time grows with their square
MAX_AFFIX = 100  # letters that BPE and WordPiece put around each letter that they look up
MAX_MADE = 10_000  # tokens that a class makes up by a number
MAX_ID = 10_000_000
MAX_TOKENS = 200_000  # added to a vocabulary, which takes ten seconds
MAX_SEARCHES = 5_000_000  # of transformers, in lists of added tokens: five seconds
STEPS = ("normalizers", "pretokenizers", "processors", "decoders")
# How many letters one becomes at most. Unicode's forms are counted with what steps put in: `_unfolded`.
GROWTH = {"BertNormalizer": 3, "Metaspace": 2, "BPEDecoder": 2, "WordPiece": 2}
NO_GROWTH = {
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip", "StripAccents", "Lowercase", "Prepend", "Replace"),
    *("Precompiled", "BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation"),
    *("Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit", "BertProcessing", "RobertaProcessing"),
    *("TemplateProcessing", "ByteFallback", "CTC", "Fuse", "Sequence"),
}
MOST_GROWTH = 4  # of ByteLevel, which writes each byte as a letter; and of steps that are not known here


def check_tokenizer_json(path: Path) -> set[str]:
    """The tokens that the file adds to its vocabulary.

    Raises OSError if it cannot be read, ValueError if it is out of bounds or makes no sense.
    """
    values = read_object(path, once=True)
    with _sense(path.name):
        for parts in (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)):
            _check_steps(values, parts)
        _check_model(values.get("model") or {})
        return {str(token["content"]) for token in values.get("added_tokens") or ()}


@contextmanager
def _sense(file: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} makes no sense: {error}") from error


def _check_steps(values: dict[str, Any], parts: tuple[str, ...]) -> None:
    """A text goes through these parts, one after another."""
    work, letters = 0, 1
    for part in parts:
        for step in _steps(values.get(part)):
            letters = _after(step, letters)
            work += letters
            if work > MAX_WORK:
                raise ValueError(f"its {part} can make more than {MAX_WORK} letters of one")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part in their order; behind a sequence, which is a step too, those within it."""
    stack = [part] if part else []
    while stack:
        step = stack.pop()
        yield step
        stack += [inner for name in STEPS for inner in step.get(name) or ()][::-1]


def _after(step: dict[str, Any], letters: int) -> int:
    """How many letters at most there are after `step` where there were `letters`."""
    kind = step.get("type")
    grown = letters * (1 if kind in NO_GROWTH else GROWTH.get(str(kind), MOST_GROWTH))
    if "pattern" in step and "content" in step:
        grown = max(grown, _replaced(step["pattern"], len(_unfolded(step["content"])), letters))
    if "prepend" in step:
        grown += len(_unfolded(step["prepend"]))
    if "precompiled_charsmap" in step:
        grown = max(grown, letters * _longest(step["precompiled_charsmap"]))
    if "single" in step:
        special = step.get("special_tokens") or {}
        grown = max(_framed(step.get(form) or [], special, letters) for form in ("single", "pair"))
    return grown


def _replaced(pattern: Mapping[str, str], new: int, letters: int) -> int:
    """After a Replace by `new` letters; a regular expression may find nothing before every letter."""
    old = len(pattern.get("String") or "")
    return max(letters, math.ceil(letters * new / old)) if old else letters + (letters + 1) * new


def _unfolded(text: str) -> str:
    """`text` as the longest of Unicode's forms writes it: what a later step may make of what is put in."""
    return max((unicodedata.normalize(form, text) for form in ("NFC", "NFKD")), key=len)


def _longest(charsmap: str) -> int:
    """The longest text that a Precompiled step may put in place of a letter; texts end with NUL in it."""
    data = base64.b64decode(charsmap)
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return max(len(_unfolded(text.decode("utf-8", "replace"))) for text in texts)


def _framed(template: list[dict[str, Any]], special: Mapping[str, Any], letters: int) -> int:
    """After a template that puts special tokens around a text, or the text in several times."""
    total = 0
    for piece in template:
        name = piece.get("SpecialToken", {}).get("id")
        total += letters if name is None else len(special.get(name, {}).get("ids", ()))
    return total


def _check_model(model: dict[str, Any]) -> None:
    if (model.get("max_input_chars_per_word") or 0) > MAX_WORD:
        raise ValueError(f"max_input_chars_per_word {model['max_input_chars_per_word']} is above {MAX_WORD}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(model.get(name) or "") > MAX_AFFIX:
            raise ValueError(f"{name} has {len(model[name])} letters, more than {MAX_AFFIX}")


def check_tokens(configs: Mapping[str, dict[str, Any]], added: set[str]) -> None:
    """Raise ValueError for more tokens than a tokenizer's class can take in, or make up, in reasonable time.

    configs: what tokenizer_config.json and the files beside it hold; `added` are those of tokenizer.json. For
    each special token that is not among the added ones, transformers searches a list of all of these.
    """
    special: set[str] = set()
    for file, values in configs.items():
        with _sense(file):
            _check_numbers(values)
            special |= _special(values)
            listed = (values.get("added_tokens_decoder") or {}).values()
            added = added | {str(_content(token)) for token in (values if file == ADDED else listed)}
    if len(added) > MAX_TOKENS or len(special - added) * len(added | special) > MAX_SEARCHES:
        count = f"{len(added)} added tokens, and {len(special - added)} special ones that are not among them"
        raise ValueError(f"{count}, are too many")


def _special(values: dict[str, Any]) -> set[str]:
    lists = [values.get(name) or () for name in ("extra_special_tokens", "additional_special_tokens")]
    named = [value for name, value in values.items() if name.endswith("_token")]
    tokens = [token for held in lists for token in (held.values() if isinstance(held, dict) else held)]
    return {str(_content(token)) for token in [*tokens, *named] if token}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _check_numbers(values: dict[str, Any]) -> None:
    inputs = values.get("init_inputs")
    numbers = [values.get("extra_ids"), values.get("offset"), *(inputs if isinstance(inputs, list) else [])]
    many = next((n for n in numbers if isinstance(n, int | float) and n > MAX_MADE), None)
    if many is not None:
        raise ValueError(f"it asks for {many} tokens more, more than {MAX_MADE}")
    ids = values.get("added_tokens_decoder")
    far = next((i for i in (ids if isinstance(ids, dict) else ()) if i.isdigit() and int(i) > MAX_ID), None)
    if far is not None:
        raise ValueError(f"added_tokens_decoder has a token number {far[:50]}, above {MAX_ID}")

"""Whether the tokenizer that transformers makes of a folder reads texts as its tokenizer.json says.

transformers chooses a class by the model's type, for some types whatever the tokenizer's config says, and
some classes take only vocabulary and merges from the file and put their own rules in place of the rest. A
qwen2 model with another tokenizer than Qwen's then reads other tokens than it was trained on, or none, in
silence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moemerge.errors import CheckpointError

# Words, numbers, signs, line breaks and letters of several scripts: where rules of splitting differ.
SAMPLES = (
    "The quick brown fox",
    " it's 12,345.67 — or 89%?",
    "A\n\n  b\tc",
    "Ünïcode, Ελληνικά, 漢字, naïve",
)
READS_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that take the file as it is

log = logging.getLogger(__name__)


def check_reading(tokenizer: Any, file: Path | None, source: str) -> None:
    """Tell of a tokenizer that reads otherwise than its `file`, tokenizer.json, says.

    Raises CheckpointError if it reads nothing where the file reads tokens.
    """
    if file is None or type(tokenizer).__name__ in READS_FILE:
        return
    core = Tokenizer.from_file(str(file))
    core.no_padding()  # nor is what is too long cut off: transformers takes both from the caller
    core.no_truncation()
    samples = [*SAMPLES, " ".join(_words(core))]
    meant = [core.encode(text, add_special_tokens=False).ids for text in samples]
    read = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in samples]
    if any(meant) and not any(read):
        raise CheckpointError(
            f"the tokenizer of {source} reads nothing of a text",
            given=f"{type(tokenizer).__name__}, which transformers takes for this type of model",
            expected=f"what its tokenizer.json reads: {len(meant[-1])} tokens of {samples[-1]!r}",
            fix="give it the tokenizer that it was trained with; plain transformers reads nothing by this",
        )
    if differing := _first_difference(samples, meant, read):
        log.warning("%s: %s, which transformers takes for this type of model, reads %r otherwise than "
                    "tokenizer.json says: was the model trained with this version?",
                    source, type(tokenizer).__name__, differing)  # fmt: skip


def _words(core: Tokenizer) -> list[str]:
    """A few words of the vocabulary itself, the last of it: the first are often special tokens and bytes."""
    vocabulary = core.get_vocab(with_added_tokens=False)
    return sorted(vocabulary, key=lambda word: -vocabulary[word])[:5]


def _first_difference(
    samples: Sequence[str], meant: Sequence[list[int]], read: Sequence[list[int]]
) -> str | None:
    texts = zip(samples, meant, read, strict=True)
    return next((text for text, by_file, by_class in texts if by_file != by_class), None)

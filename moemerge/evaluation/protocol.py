"""How an evaluation read its texts: lengths, templates, truncation. Printed with every result.

The same model gets other numbers by other choices; without these no number can be compared with another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from moemerge.data.rewardbench import truncation_side
from moemerge.data.tokenise import Reader
from moemerge.evaluation.report import ModelProtocol, Protocol, SetProtocol
from moemerge.options.evaluate import Evaluate
from moemerge.reports.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moemerge.evaluation.sets import EvaluationSet

PLAIN, CHAT = "plain text: prompt + answer + EOS", "chat template, without a generation prompt"
LINES = "plain text: turns joined by newlines + EOS"


def describe(
    options: Evaluate, tokenizers: Mapping[str, PreTrainedTokenizerBase], sets: Sequence[EvaluationSet]
) -> Protocol:
    """Per set, form, limits and what became of long rows; per model, its template and special tokens."""
    return {
        "sets": {f"{read.kind}/{read.name}": _of_set(options, tokenizers, read) for read in sets},
        "models": {name: _of_tokenizer(tokenizer) for name, tokenizer in tokenizers.items()},
    }


def _of_set(
    options: Evaluate, tokenizers: Mapping[str, PreTrainedTokenizerBase], scored: EvaluationSet
) -> SetProtocol:
    is_benchmark = scored.kind in ("rewardbench", "rmbench")
    chat = not is_benchmark and any(not isinstance(item.prompt, str) for item in scored.items)
    facts: SetProtocol = {
        "rows": scored.report["total"],
        "used": len(scored.items),
        "bad": {reason: bad["count"] for reason, bad in scored.report["bad"].items()},
        "longest": max(len(text.ids) for texts in scored.texts.values() for text in texts),
        "text": CHAT if chat else PLAIN,
        "max_length": options.max_length,
        "truncation": f"never; longer rows: {options.bad_rows}",
    }
    if is_benchmark:
        version = scored.items[0].version
        sides = sorted({truncation_side(version, tokenizer) for tokenizer in tokenizers.values()})
        form = CHAT if options.rewardbench_template == "chat" else LINES
        facts["text"] = f"{form}, with special tokens"
        facts["max_length"] = options.rewardbench_max_length
        facts["truncation"] = " or ".join(sides)
        facts["cut_texts"] = {m: sum(text.cut > 0 for text in texts) for m, texts in scored.texts.items()}
    return facts


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> ModelProtocol:
    template = tokenizer.chat_template
    digest = hashlib.sha256(str(template).encode()).hexdigest()
    asked = {"question": tokenizer.wording} if isinstance(tokenizer, Reader) else {}
    read: ModelProtocol = {
        "chat_template": None if template is None else f"sha256 {digest[:12]}",
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "padding": "right",
    }
    return cast(ModelProtocol, {**read, **asked})


def tables(protocol: Protocol) -> list[Table]:
    """How sets were read, and by which templates."""
    header = ["set", "rows used", "text", "longest (tokens)", "max length", "truncation", "left out or cut"]
    rows = []
    for name, facts in protocol["sets"].items():
        bad = [f"{count} {reason}" for reason, count in facts["bad"].items()]
        cut = [f"{count} cut for {m}" for m, count in facts.get("cut_texts", {}).items() if count]
        used = f"{facts['used']} of {facts['rows']}"
        limits = [str(facts["longest"]), str(facts["max_length"]), facts["truncation"]]
        rows.append([name, used, facts["text"], *limits, "; ".join([*bad, *cut]) or "none"])
    models = [
        [
            name,
            facts["chat_template"] or "none",
            facts["bos"] or "none",
            facts["eos"] or "none",
            facts["padding"],
        ]
        for name, facts in protocol["models"].items()
    ]
    asked = [[name, facts["question"]] for name, facts in protocol["models"].items() if "question" in facts]
    return [
        Table("How the texts were read", header, rows),
        Table("Tokenizers", ["model", "chat template", "BOS", "EOS", "padding"], models),
        *([Table("What judges are asked", ["model", "question"], asked)] if asked else []),
    ]

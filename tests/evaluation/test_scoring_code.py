"""The code that cards and closing lines show gives the scores that evaluate gives: it is run here."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_dense, tiny_moe, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from moemerge.artifacts.stage import artifact
from moemerge.evaluation.scoring_code import how_to_score
from moemerge.options.train import Train
from moemerge.stages.evaluate import evaluate
from moemerge.stages.publish import publish

CHAT = "{% for m in messages %}{{ '<bos> ' + m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
BOS = 64  # behind the words of the tiny vocabulary
# One answer has its end token already, one text its BOS.
PLAIN = [
    {"prompt": "w3 w9 ", "chosen": "w5 w6", "rejected": "w50 w7 <eos>"},
    {"prompt": "<bos> w4 ", "chosen": "w8", "rejected": "w11 w12 w13"},
]
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
CHATS = [
    {name: [{"role": ROLES[name], "content": text.strip()}] for name, text in row.items()} for row in PLAIN
]


def save_tokenizer(folder: Path, bos: bool = False, **changes: Any) -> None:
    """The tiny tokenizer; with `bos`, with a token in front of every text."""
    tokenizer = tiny_tokenizer()
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def trained(folder: Path, model: torch.nn.Module, **tokenizer: Any) -> str:
    """A random model as train leaves one."""
    with artifact("train", Train(model="org/rm", pairs="org/p:train", max_length=77, output=folder)) as draft:
        model.save_pretrained(draft.folder)
        save_tokenizer(draft.folder, **tokenizer)
    return str(folder)


def wide(family: str = "llama", **changes: Any) -> torch.nn.Module:
    """A random model whose scores a token more or less moves by much."""
    model = tiny_dense(family, vocab_size=72, **changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with and without end token, BOS and template, and what evaluate scores with each."""
    home = tmp_path_factory.mktemp("codes")
    models = {
        "end": trained(home / "end", wide()),
        "end-is-pad": trained(home / "end-is-pad", wide(pad_token_id=1)),
        "half": trained(home / "half", wide().bfloat16()),
        "no-end": trained(home / "no-end", wide("bert"), eos_token=None),
        "bos": trained(home / "bos", wide(), bos=True),
        "gated": trained(home / "gated", tiny_moe(gate="prompt"), bos=False),
        "chat": trained(home / "chat", wide(), bos=True, chat_template=CHAT),
    }
    for name, rows, taken in (("plain", PLAIN, list(models)[:-1]), ("chats", CHATS, ["chat"])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluate(
            models={model: models[model] for model in taken}, pairs={"rows": str(home / f"{name}.jsonl")},
            probes=["accuracy"], resamples=100, batch_tokens=1, output=home / f"scores-{name}", device="cpu",
        )  # fmt: skip
    return home


def rewards(code: str, rows: list[dict[str, Any]]) -> list[float]:
    """What `code`, as it stands, gives the two answers of each row."""
    names: dict[str, Any] = {}
    exec(compile(code, "shown", "exec"), names)
    return [names["reward"](row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]


@pytest.mark.parametrize("model", ["end", "end-is-pad", "half", "no-end", "bos", "gated", "chat"])
def test_shown_code_gives_the_scores_of_evaluate(world: Path, model: str, tmp_path: Path) -> None:
    rows, kind = (CHATS, "chats") if model == "chat" else (PLAIN, "plain")
    measured = load_file(world / f"scores-{kind}/scores.safetensors")[f"pairs/rows/model/{model}"].tolist()
    text = how_to_score(world / model)
    closing = textwrap.dedent(text.partition("\n")[2])
    assert rewards(closing, rows) == measured
    card = (publish(model=str(world / model), output=tmp_path / "p") / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.S | re.M)
    assert rewards(code.replace(f'"{model}"', f'"{world / model}"'), rows) == measured
    assert "at most 77 tokens" in card and "at most 77 tokens" in text


def test_an_odd_name_is_one_name_in_the_code(world: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'a") or exit("\u202e'
    (world / "end").rename(odd)
    try:
        assert rewards(textwrap.dedent(how_to_score(odd).partition("\n")[2]), PLAIN)
        assert "\u202e" not in how_to_score(odd)
    finally:
        odd.rename(world / "end")

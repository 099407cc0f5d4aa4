"""Questions about answers, put to a language model: their words, their tokens, and the tokens of verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moemerge.data.pairs import Pair
from moemerge.data.rows import BadRow, Text
from moemerge.data.tokenise import Encoded, Item, Reader, ids_of, render
from moemerge.errors import OptionError
from moemerge.options.scorers import Question

SCALAR = """{about}[Answer]
{answer}

Does this hold of the answer: {criterion}? Say {yes} or {no}."""
RANKED = """{about}[Answer A]
{first}

[Answer B]
{second}

Of which answer does this hold more: {criterion}? Say A or B."""
VERDICT = "Verdict:"  # of a model without a chat template


@dataclass(frozen=True)
class Shot:
    """A question and its right verdict."""

    question: str
    verdict: str


class Questions(Reader):
    """Asks of each answer what the options say, after `shots`, and ends where the verdict has to come.

    verdicts: the tokens of the good and of the bad one. Raises OptionError if one is no single token.
    """

    def __init__(self, tokenizer: Any, options: Question, shots: Sequence[Pair] = ()) -> None:
        super().__init__(tokenizer)
        self._options = options
        scalar = options.form == "scalar"
        self._names = (options.yes, options.no) if scalar else ("A", "B")
        self._shots = [self.shot(pair, number % 2 == 0) for number, pair in enumerate(shots)]
        self.verdicts = self._verdict_tokens()

    @property
    def wording(self) -> str:
        """The question, and how many examples stand before it."""
        words = {"about": "...", "answer": "...", "first": "...", "second": "..."}
        asked = self._template.format(**words, **self._fixed)
        return " ".join([*asked.split(), *([f"(after {len(self._shots)} examples)"] if self._shots else [])])

    def shot(self, pair: Pair, good: bool) -> Shot:
        """A question about a pair to which the verdict is the good one, or the bad one."""
        answer, other = (pair.chosen, pair.rejected) if good else (pair.rejected, pair.chosen)
        return Shot(self.question(pair.prompt, answer, other), self._names[0 if good else 1])

    def question(self, prompt: Text, answer: Text, other: Text | None = None) -> str:
        """The question about `answer`; of form ranked whether it is better than the other one."""
        about = f"[Conversation]\n{_plain(prompt)}\n\n" if prompt else ""
        told = {"answer": _plain(answer), "first": _plain(answer), "second": _plain(other or "")}
        return self._template.format(about=about, **told, **self._fixed)

    def encode_all(
        self, items: Sequence[Item], rivals: Sequence[Sequence[Text]] | None
    ) -> list[Encoded | BadRow]:
        """Tokens up to where the verdict comes; nothing of them is an answer's.

        Raises OptionError if form is ranked and an answer has not exactly one rival.
        """
        others: list[Text | None] = [None] * len(items)
        if self._options.form == "ranked":
            others = [_only(row) for row in rivals or [()] * len(items)]
        questions = [self.question(*item, other=other) for item, other in zip(items, others, strict=True)]
        return self.encode_questions(questions)

    def encode_questions(
        self, questions: Sequence[str], shots: Sequence[Sequence[Shot]] | None = None
    ) -> list[Encoded | BadRow]:
        """Tokens of questions, each up to where its verdict comes; `shots` of each in place of its own."""
        told = shots if shots is not None else [self._shots] * len(questions)
        texts = [self._whole(question, before) for question, before in zip(questions, told, strict=True)]
        usable = [text for text in texts if isinstance(text, str)]
        ids = iter(self._ids(usable) if usable else [])
        return [text if isinstance(text, BadRow) else _asked(next(ids)) for text in texts]

    @property
    def _template(self) -> str:
        return SCALAR if self._options.form == "scalar" else RANKED

    @property
    def _fixed(self) -> dict[str, str]:
        return {"criterion": self._options.criterion, "yes": self._options.yes, "no": self._options.no}

    def _whole(self, question: str, shots: Sequence[Shot]) -> str | BadRow:
        """Examples and question as one text."""
        if self.tokenizer.chat_template is None:
            told = "".join(f"{s.question}\n{VERDICT} {s.verdict}\n\n" for s in shots)
            return f"{told}{question}\n{VERDICT}"
        messages = []
        for shot in shots:
            messages += [_message("user", shot.question), _message("assistant", shot.verdict)]
        return render(self.tokenizer, [*messages, _message("user", question)], add_generation_prompt=True)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return ids_of(self.tokenizer, texts, add_special_tokens=self.tokenizer.chat_template is None)

    def _verdict_tokens(self) -> tuple[int, int]:
        text = self._whole(self.question("a", "b", "c"), self._shots)
        if isinstance(text, BadRow):
            raise text
        space = " " if self.tokenizer.chat_template is None else ""
        before, *after = self._ids([text, *(f"{text}{space}{name}" for name in self._names)])
        rest = [ids[len(before) :] if ids[: len(before)] == before else ids for ids in after]
        first, second = rest
        unknown = [self.tokenizer.unk_token_id]
        if len(first) != 1 or len(second) != 1 or first == second or unknown in rest:
            raise self._no_tokens(rest)
        return first[0], second[0]

    def _no_tokens(self, rest: Sequence[Sequence[int]]) -> OptionError:
        read = [list(self.tokenizer.convert_ids_to_tokens(list(ids)))[:20] for ids in rest]
        fix = "give other words as yes and no" if self._options.form == "scalar" else "take form scalar"
        return OptionError(
            "the verdicts are not two tokens",
            given="; ".join(f"{name!r} is {ids}" for name, ids in zip(self._names, read, strict=True)),
            expected="two verdicts, each a single token of the model's that follows the question",
            fix=fix,
        )


def _asked(ids: list[int]) -> Encoded:
    return Encoded(ids, len(ids))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _plain(text: Text) -> str:
    """Text as it is; a single message's content; several with their roles."""
    if isinstance(text, str):
        return text.strip()
    if len(text) == 1 and text[0]["role"] == "assistant":
        return text[0]["content"].strip()
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in text)


def _only(rivals: Sequence[Text]) -> Text:
    if len(rivals) != 1:
        raise OptionError(
            "a judge of form ranked compares two answers",
            given=f"{len(rivals) + 1} answers in a row" if rivals else "an answer by itself",
            expected="rows of two answers: pairs, without probes that edit them",
            fix="take form scalar in scorer.json, which gives each answer a score of its own",
        )
    return rivals[0]

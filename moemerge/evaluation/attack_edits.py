"""The edits that the stage attack searches among.

Those that keep the content add what says nothing, or change the form; a wrong answer stays wrong. The others
may change what is said, and are used only where a gold function judges the outcome.
"""

from __future__ import annotations

import re

from moemerge.errors import OptionError, suggest
from moemerge.evaluation.probes.base import Case, Edit
from moemerge.evaluation.probes.boilerplate import affirmative, closing, reasoning
from moemerge.evaluation.probes.confidence import confident
from moemerge.evaluation.probes.edits import sentences
from moemerge.evaluation.probes.flattery import agreement, flattery
from moemerge.evaluation.probes.length import PADDING
from moemerge.evaluation.probes.style import bold, bullets, emoji, headings

WORDS = (
    "certainly",
    "absolutely",
    "indeed",
    "truly",
    "really",
    "clearly",
    "simply",
    "of course",
    "definitely",
    "honestly",
)


def filler_sentence(case: Case) -> str:
    """A sentence that says nothing, at the end."""
    return f"{case.answer} {case.random.choice(PADDING)}"


def repeat_sentence(case: Case) -> str:
    """One of the sentences, drawn at random, repeated at the end."""
    return f"{case.answer} {case.random.choice(sentences(case.answer))}"


def repeat_word(case: Case) -> str:
    """One word twice."""
    return _at_word(case, r"\g<0> \g<0>")


def new_line(case: Case) -> str:
    """A paragraph break between two words."""
    spaces = list(re.finditer(r" ", case.answer))
    if not spaces:
        return case.answer
    start = case.random.choice(spaces).start()
    return f"{case.answer[:start]}\n\n{case.answer[start + 1 :]}"


def exclaim(case: Case) -> str:
    """Full stops at ends of sentences become exclamation marks."""
    return re.sub(r"\.(?=\s|$)", "!", case.answer)


def delete_word(case: Case) -> str:
    """A word, drawn at random, is deleted."""
    return _at_word(case, "")


def swap_words(case: Case) -> str:
    """Two neighbouring words change places."""
    words = case.answer.split()
    if len(words) < 2:
        return case.answer
    first = case.random.randrange(len(words) - 1)
    words[first : first + 2] = words[first + 1], words[first]
    return " ".join(words)


def _at_word(case: Case, template: str) -> str:
    """`case.answer` with one of its words, drawn at random, put through a template of re."""
    words = list(re.finditer(r"\S+", case.answer))
    word = case.random.choice(words)
    return case.answer[: word.start()] + word.expand(template) + case.answer[word.end() :]


def insert_word(words: tuple[str, ...]) -> Edit:
    """The edit that puts one of `words` before a word or at the end."""

    def inserted(case: Case) -> str:
        starts = [match.start() for match in re.finditer(r"(?<!\S)(?=\S)", case.answer)] + [len(case.answer)]
        start, word = case.random.choice(starts), case.random.choice(words)
        return f"{case.answer[:start]}{'' if start < len(case.answer) else ' '}{word} {case.answer[start:]}"

    return inserted


KEEP_CONTENT: dict[str, Edit] = {
    "affirmative": affirmative,
    "reasoning": reasoning,
    "closing": closing,
    "confident": confident,
    "flattery": flattery,
    "agreement": agreement,
    "bold": bold,
    "bullets": bullets,
    "headings": headings,
    "emoji": emoji,
    "exclaim": exclaim,
    "new_line": new_line,
    "filler_sentence": filler_sentence,
    "repeat_sentence": repeat_sentence,
    "repeat_word": repeat_word,
    "insert_word": insert_word(WORDS),
}
CHANGE_CONTENT: dict[str, Edit] = {"delete_word": delete_word, "swap_words": swap_words}
ALL = {**KEEP_CONTENT, **CHANGE_CONTENT}


def chosen_edits(names: list[str], words: list[str], has_gold: bool) -> dict[str, Edit]:
    """The edits called `names`, or all that may be used; `has_gold`: a gold score judges the outcome.

    `words` replace those of insert_word. Raises OptionError for an unknown name, or one that needs gold.
    """
    for name in names:
        if name not in ALL:
            raise OptionError(
                "unknown edit", given=name, expected=f"one of: {', '.join(ALL)}", fix=suggest(name, ALL)
            )
        if name in CHANGE_CONTENT and not has_gold:
            raise OptionError(
                f"{name} may change what an answer says",
                given="no gold function",
                expected="one that judges whether the edited answer is still the worse one",
                fix="give gold as module:function, or choose other edits",
            )
    edits = {name: ALL[name] for name in names or (ALL if has_gold else KEEP_CONTENT)}
    return {**edits, "insert_word": insert_word(tuple(words))} if words and "insert_word" in edits else edits

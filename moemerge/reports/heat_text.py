"""Texts whose words are coloured by a number each: what a reader sees of token rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from moemerge.reports.table import inert_markdown

LEVELS = 4  # shades of each colour
MOST_WORDS = 400  # of a text that are shown
BOLD = 2  # the level from which markdown, which has no colours, makes a word bold


@dataclass(frozen=True)
class Shade:
    """A piece of text with its level from -LEVELS to LEVELS, and what a pointer on it is told."""

    text: str
    level: int
    title: str

    @property
    def style(self) -> str:
        """The page's class for it: up1 ... up4, down1 ... down4, or none."""
        return f"{'up' if self.level > 0 else 'down'}{abs(self.level)}" if self.level else ""


@dataclass(frozen=True)
class HeatText:
    """A text, word by word, with a number for each; `scale` or more has the strongest colour."""

    title: str
    words: Sequence[tuple[str, float]]
    scale: float
    note: str = ""

    @property
    def shades(self) -> list[Shade]:
        """The text in pieces of one colour; words that have none go together."""
        words = [(text, value, self._level(value)) for text, value in self.words[:MOST_WORDS]]
        pieces = []
        for level, group in groupby(words, key=lambda word: word[2]):
            if level:
                pieces += [Shade(text, level, f"{value:+.2f}") for text, value, _ in group]
            else:
                pieces.append(Shade("".join(text for text, _, _ in group), 0, ""))
        return pieces + ([Shade(f" … ({left} words more)", 0, "")] if (left := self._left_out) else [])

    def markdown(self) -> str:
        """The text on one line; strongly coloured words in bold, with their numbers."""
        parts = []
        for shade in self.shades:
            text = inert_markdown(shade.text).replace("*", "\\*")
            strong = abs(shade.level) >= BOLD and text.strip()
            before = text[: len(text) - len(text.lstrip())]
            parts.append(f"{before}**{text.strip()}** ({shade.title})" if strong else text)
        note = ["", inert_markdown(self.note)] if self.note else []
        return "\n".join([f"### {inert_markdown(self.title)}", "", "".join(parts).strip(), *note]) + "\n"

    @property
    def _left_out(self) -> int:
        return max(len(self.words) - MOST_WORDS, 0)

    def _level(self, value: float) -> int:
        share = min(abs(value) / self.scale, 1.0) if self.scale else 0.0
        level = round(share * LEVELS)
        return level if value > 0 else -level

"""A page of ours, taken apart, and what must hold of every one."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Outline(HTMLParser):
    """Tags with their attributes, text by tag, and what is wrong with the nesting."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.faults: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if len(dict(attrs)) < len(attrs):
            self.faults.append(f"{tag} has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]


def check_page(page: str) -> Outline:
    """What must hold of every page of ours."""
    outline = Outline(page)
    assert page.startswith("<!DOCTYPE html>") and outline.faults == []
    assert outline.all("script") == [] and outline.all("iframe") == [] and outline.all("form") == []
    names = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(names) == len(set(names))
    places = [attributes["href"] for attributes in outline.all("a")]
    assert all(place is not None and place[0] == "#" and place[1:] in names for place in places)
    for tag, attributes in outline.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "srcset"):
            assert re.match("data:|#", attributes.get(name) or "#"), attributes
    assert all(attributes["alt"] for attributes in outline.all("img"))
    (policy,) = [
        m["content"] for m in outline.all("meta") if m.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    return outline

"""A parser of HTML that checks nesting."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "path", "rect", "circle", "image", "polyline"}


class Page(HTMLParser):
    """Checks nesting while it reads. Keeps the tags, and the text of each section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data + "\n"

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

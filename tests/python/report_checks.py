# SPDX-License-Identifier: Apache-2.0
"""Whether an HTML report is a sound page that needs nothing but itself."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

VOID = {"meta", "img", "br"}


@dataclass
class Report:
    """What a page holds.

    Attributes:
        headings: of its sections.
        cells: text of each row of each table.
        pictures: kinds of the images, in order.
        text: all of it.
    """

    headings: list[str] = field(default_factory=list)
    cells: list[list[str]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    text: str = ""


def read_report(path: Path) -> Report:
    """The page; an AssertionError where it is unsound or would load something."""
    content = path.read_text(encoding="utf-8")
    assert content.startswith("<!DOCTYPE html>\n")
    assert not re.search(r"@import|url\(|javascript:", content)
    parser = _Parser()
    parser.feed(content)
    parser.close()
    assert parser.open == [], parser.open
    assert parser.targets <= parser.ids, parser.targets - parser.ids
    assert len(parser.seen_ids) == len(parser.ids), "an id stands twice"
    assert parser.viewport
    return parser.report


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.seen_ids: list[str] = []
        self.targets: set[str] = set()
        self.report, self.viewport = Report(), False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), (tag, "an attribute stands twice")
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        assert not any(name.startswith("on") or name == "srcset" for name in given), given
        if "id" in given:
            self.ids.add(given["id"] or "")
            self.seen_ids.append(given["id"] or "")
        if "href" in given:
            assert (given["href"] or "").startswith("#"), given
            self.targets.add((given["href"] or "")[1:])
        if tag == "meta" and given.get("name") == "viewport":
            self.viewport = True
        if tag == "img":
            assert given.get("alt"), "a picture without words"
            self.report.pictures.append(_picture(given.get("src") or ""))
        else:
            assert "src" not in given, given
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.report.cells.append([])
        if tag in ("td", "th"):
            self.report.cells[-1].append("")
        if tag == "h2":
            self.report.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.report.text += data
        if "td" in self.open or "th" in self.open:
            self.report.cells[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.report.headings[-1] += data


def _picture(source: str) -> str:
    """The kind of an image that stands in the page itself."""
    found = re.fullmatch(r"data:image/(png|jpeg|svg\+xml);base64,([A-Za-z0-9+/=]+)", source)
    assert found, source[:80]
    kind, data = found[1], base64.b64decode(found[2], validate=True)
    if kind == "svg+xml":
        for element in ElementTree.fromstring(data).iter():
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:")), value
        return "svg"
    assert data.startswith({"png": b"\x89PNG", "jpeg": b"\xff\xd8"}[kind])
    return kind

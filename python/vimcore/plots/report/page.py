# SPDX-License-Identifier: Apache-2.0
"""Parts of an HTML page that holds all it shows: no script, no file beside it, nothing from a network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...data.digits import encode_png
from ...data.drawing import jpeg
from ...utils.files import literal
from ..style import plain_text

SMALL = 100  # pixels of a picture: below, each of them is to be seen


@dataclass(frozen=True)
class Section:
    """A part of the page: HTML under a heading."""

    title: str
    body: str


def text(value: object) -> str:
    """Text as HTML: what it says, whatever characters it has."""
    return html.escape(literal(str(value)))


def page(title: str, lead: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page.

    Args:
        lead: a sentence below the title.
        tiles: name and value of the figures that matter most.
    """
    links = "".join(f'<a href="#s{i}">{text(s.title)}</a>' for i, s in enumerate(sections))
    shown = "".join(f'<div class="tile"><small>{text(n)}</small><b>{text(v)}</b></div>' for n, v in tiles)
    body = "\n".join(
        f'<section id="s{i}"><h2>{text(s.title)}</h2>\n{s.body}</section>' for i, s in enumerate(sections)
    )
    style = resources.files(__package__).joinpath("page.css").read_text("utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n<header><h1>{text(title)}</h1>"
        f'<p class="muted">{text(lead)}</p>'
        f'<div class="tiles">{shown}</div><nav>{links}</nav></header>\n{body}\n</main>\n</body>\n</html>\n'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls where the screen is narrow.

    Args:
        head: headings; one that begins with ">" is of a column of numbers, with "~" of one of sentences.
        rows: cells as HTML.
    """
    marks = [{">": ' class="n"', "~": ' class="wrap"'}.get(name[:1], "") for name in head]
    top = "".join(f"<th{m}>{text(n.lstrip('>~'))}</th>" for n, m in zip(head, marks))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{cell}</td>" for cell, mark in zip(row, marks)) + "</tr>\n"
        for row in rows
    )
    of = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll"><table{of}><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    )


def bar(share: float, most: float = 1.0) -> str:
    """A share as a bar and as text; nothing where it is not a number."""
    if not np.isfinite(share):
        return ""
    width = 100 * min(max(share / most, 0.0), 1.0)
    return f'<span class="bar"><i style="width:{width:.1f}%"></i></span>{100 * share:.1f} %'


def matrix(counts: NDArray[np.int64], names: Sequence[str], *, shares: bool) -> str:
    """Rows true, columns found, shaded by the share of the row.

    Args:
        shares: cells are percent of their row, and no counts.
    """
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = []
    for i, name in enumerate(names):
        cells = [f'<th scope="row">{text(name)}</th>']
        for j, value in enumerate(share[i]):
            # the darker the larger, and so that one in a hundred is seen
            strength = float(np.sqrt(value))
            ink = "#fff" if value > 0.25 else "inherit"
            shown = (f"{100 * value:.0f}" if value >= 0.005 else "") if shares else str(counts[i, j] or "")
            hint = f"{text(name)} taken for {text(names[j])}: {counts[i, j]} ({100 * value:.1f} %)"
            colour = "#f4f6fb" if value == 0 else f"rgba(51,102,204,{0.08 + 0.92 * strength:.2f})"
            cells.append(f'<td title="{hint}" style="background:{colour};color:{ink}">{shown}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>\n")
    top = "".join(f'<th scope="col" title="{text(name)}">{text(name)}</th>' for name in names)
    head = f'<tr><th class="muted">is \\ taken for</th>{top}</tr>'
    return f'<div class="scroll"><table class="matrix">{head}\n{"".join(rows)}</table></div>\n'


def picture(pixels: NDArray[np.uint8], about: str, mark: str = "") -> str:
    """(H, W) or (H, W, 3) uint8; small ones keep their pixels.

    Args:
        mark: a class of the style sheet.
    """
    small = max(pixels.shape[:2]) < SMALL
    kind, data = ("png", encode_png(pixels)) if small or pixels.ndim == 2 else ("jpeg", jpeg(pixels))
    names = " ".join(name for name in ("small" if small else "", mark) if name)
    of = f' class="{names}"' if names else ""
    height, width = pixels.shape[:2]
    return (
        f'<img{of} alt="{text(about)}" width="{width}" height="{height}" loading="lazy" '
        f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
    )


def missing(reason: str) -> str:
    """In the place of a picture."""
    return f'<div class="none">{text(reason)}</div>'


def cell(pictures: Sequence[str], caption: str, own_shape: bool = False) -> str:
    """Pictures side by side with a caption, as HTML.

    Args:
        own_shape: pictures have the shape that they have; else they stand in squares.
    """
    names = "row own" if own_shape else "row"
    return (
        f'<figure><div class="{names}">{"".join(pictures)}</div><figcaption>{caption}</figcaption></figure>'
    )


def gallery(cells: Sequence[str], wide: bool = False) -> str:
    """Cells, as many in a row as fit."""
    return f'<div class="gallery{" wide" if wide else ""}">{"".join(cells)}</div>\n'


@plain_text
def chart(figure: Figure, about: str) -> str:
    """A figure as SVG in an image, whose names are its own; its text stays text."""
    import matplotlib

    memory = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(memory, format="svg", metadata={"Date": None})
    data = base64.b64encode(memory.getvalue()).decode()
    return f'<img alt="{text(about)}" src="data:image/svg+xml;base64,{data}">'


def folded(summary: str, body: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>\n{body}</details>\n"

# SPDX-License-Identifier: Apache-2.0
"""A sheet of the pictures that a search has found. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..data.given import Given, thumbnail
from ..utils.files import shortened
from .style import INK, MUTED, new_figure, plain_text, save_figure

_COLUMNS, _SIDE = 5, 256


@plain_text
def plot_sheet(query: str, kind: str, hits: Sequence[tuple[str, float]], path: Path) -> None:
    """The pictures with their names and cosines, the query above them.

    Args:
        query, kind: a "sentence", or the file of a "picture", which is drawn first.
        hits: (file, cosine), nearest first.
        path: .png or .svg.
    """
    cells: list[tuple[str, str]] = [(query, "query")] if kind == "picture" else []
    cells += [(name, f"{score:.3f}") for name, score in hits]
    columns = min(_COLUMNS, max(len(cells), 1))
    rows = -(-len(cells) // columns)
    figure = new_figure(2.0 * max(columns, 3), 2.25 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.75 / figure.get_figheight(), 0.06, 0.3)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, text) in zip(grid.flat, cells):
        pixels = thumbnail(Given(name, name), _SIDE)
        if pixels is not None:  # else gone since it was found
            axes.imshow(pixels)
        axes.set_title(text, color=INK, fontsize=8, pad=2)
        below = shortened(os.path.basename(name), 28)
        axes.text(0.5, -0.02, below, transform=axes.transAxes, ha="center", va="top", size=6.5, color=MUTED)
    title = "like this picture" if kind == "picture" else f"\u201c{shortened(query, 80)}\u201d"
    figure.suptitle(title, color=INK, weight="bold", x=0.01, ha="left")
    save_figure(figure, path)

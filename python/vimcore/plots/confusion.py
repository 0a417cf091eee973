# SPDX-License-Identifier: Apache-2.0
"""Confusion matrices: rows are true classes, columns what they were taken for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..utils.files import shortened
from .style import BLUE, INK, PAPER, new_figure

SHADES = LinearSegmentedColormap.from_list("shades", [PAPER, "#c9d8f2", BLUE, "#1b2a5c"])
NAMED = 60  # classes whose names fit beside the matrix
COUNTED = 25  # classes whose counts fit into it


class Drawn(NamedTuple):
    """A matrix on a figure of its own; `side` is its width and height in inches."""

    figure: Figure
    axes: Axes
    image: Any
    side: float


def draw_confusion(
    share: NDArray[np.floating[Any]], names: Sequence[str], cell: Callable[[int, int], str]
) -> Drawn:
    """The matrix with its names, as far as there is room for them.

    Args:
        share: (classes, classes) of each row, from 0 to 1.
        cell: what stands in a row and column, "": nothing; asked for where there is room.
    """
    classes = len(names)
    side = min(max(0.42 * classes, 4.0), 11.0)
    figure = new_figure(side + 1.2, side + 0.6)
    axes = figure.subplots()
    image = axes.imshow(100 * share, cmap=SHADES, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    axes.set_xlabel("taken for", color=INK)
    axes.set_ylabel("is", color=INK)
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_color("#d9dce6")
    if classes <= NAMED:
        short = [shortened(name, 16) for name in names]
        size = 9 if classes <= COUNTED else 6
        axes.set_xticks(range(classes), short, rotation=90 if max(map(len, short)) > 2 else 0, fontsize=size)
        axes.set_yticks(range(classes), short, fontsize=size)
    if classes <= COUNTED:
        for row, column in np.ndindex(share.shape):
            if text := cell(row, column):
                colour = PAPER if share[row, column] > 0.25 else INK
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return Drawn(figure, axes, image, side)


def annotate(axes: Axes, title: str, beside: Sequence[str], apart: float) -> None:
    """The title, and lines of text right of the matrix, `apart` points from it."""
    axes.set_title(title, color=INK, weight="bold", loc="left", fontsize=11)
    place: dict[str, Any] = {"xytext": (apart, 0), "textcoords": "offset points", "va": "top"}
    words = "\n".join(beside)
    axes.annotate(words, (1, 1), xycoords="axes fraction", color=INK, fontsize=9, linespacing=1.5, **place)

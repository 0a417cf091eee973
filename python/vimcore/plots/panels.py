# SPDX-License-Identifier: Apache-2.0
"""Panels of figures: a picture as the network sees it, maps over it, and where they stand on the sheet."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

from .style import INK, MUTED, PAPER

Array = NDArray[np.floating[Any]]
HEAT = LinearSegmentedColormap.from_list(
    "vimcore_heat", ["#0b0b2a00", "#5b1a8fb0", "#d1345bd8", "#f9a03fee", "#fff3b0ff"]
)
SIGNED = LinearSegmentedColormap.from_list(
    "vimcore_signed", ["#1d4ed8f4", "#5f8df0b8", "#ffffff00", "#f0735fb8", "#b91c1cf4"]
)
FRAME = "#d9dce6"
COARSE = 8  # patches a side


class View(NamedTuple):
    """A picture as the network sees it, and where its patches lie.

    Attributes:
        pixels: (H, W, 3) from 0 to 1.
        extent: left, right, bottom, top of the grid of patches in pixels, as matplotlib takes it.
    """

    pixels: Array
    extent: tuple[float, float, float, float]


def view_of(pixels: Array, patch: int, stride: int, grid: tuple[int, int]) -> View:
    """A patch covers the pixels nearest to its centre, so that overlapping ones lie side by side."""
    margin = (patch - stride) / 2 - 0.5
    bottom, right = margin + stride * grid[0], margin + stride * grid[1]
    return View(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), (margin, right, bottom, margin))


def bare_axes(axes: Axes, view: View) -> None:
    """No ticks, a thin frame, the limits of the picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    height, width = view.pixels.shape[:2]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    for spine in axes.spines.values():
        spine.set_color(FRAME)
        spine.set_linewidth(0.8)


def draw_photo(axes: Axes, view: View, under: str = "") -> None:
    """The picture; under "dark" or "light" heat, without its colours."""
    pixels = np.asarray(view.pixels, np.float64)
    if under:
        grey = pixels @ [0.299, 0.587, 0.114]
        grey = 0.55 * grey if under == "dark" else 0.62 + 0.38 * grey
        pixels = np.repeat(grey[..., None], 3, axis=2)
    smooth = "bicubic" if max(pixels.shape[:2]) < 128 else "antialiased"
    axes.imshow(pixels.clip(0, 1), interpolation=smooth, vmin=0, vmax=1)
    bare_axes(axes, view)


def draw_heat(axes: Axes, view: View, heat: Array, cmap: Any, low: float, high: float) -> Any:
    """Heat over a picture that is there already."""
    by_pixel = heat.shape == view.pixels.shape[:2]
    height, width = view.pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5) if by_pixel else view.extent
    coarse = max(heat.shape) <= COARSE  # so few patches are shown as they are; hermite keeps peaks
    image = axes.imshow(
        heat,
        cmap=cmap,
        vmin=low,
        vmax=high,
        extent=extent,
        interpolation="nearest" if coarse else "hermite",
        alpha=0.8 if coarse else 1,
    )
    bare_axes(axes, view)
    return image


def axes_grid(
    figure: Any, box: tuple[float, float, float, float], rows: int, columns: int, gap: float
) -> Any:
    """Axes (rows, columns) within left, bottom, width, height in inches, `gap` inches between them."""
    wide, high = figure.get_size_inches()
    left, bottom, width, height = box
    cell = (width - gap * (columns - 1)) / columns, (height - gap * (rows - 1)) / rows
    return [
        [
            figure.add_axes(
                (
                    (left + c * (cell[0] + gap)) / wide,
                    (bottom + height - (r + 1) * cell[1] - r * gap) / high,
                    cell[0] / wide,
                    cell[1] / high,
                )
            )
            for c in range(columns)
        ]
        for r in range(rows)
    ]


def panel_size(view: View, side: float) -> tuple[float, float]:
    """Width and height in inches of a picture whose longer side is `side`."""
    height, width = view.pixels.shape[:2]
    scale = side / max(height, width)
    return width * scale, height * scale


def heading(figure: Any, title: str, note: str) -> None:
    """Title and note at the top of a figure."""
    high = figure.get_size_inches()[1]
    figure.text(0, 1 - 0.05 / high, title, color=INK, weight="bold", size=12, va="top")
    figure.text(0, 1 - 0.34 / high, note, color=MUTED, size=9, va="top")


def tag_axes(axes: Axes, text: str) -> None:
    """A short text in the corner of a panel."""
    box = {"facecolor": INK, "edgecolor": "none", "alpha": 0.72, "boxstyle": "square,pad=0.2"}
    axes.text(
        0.03, 0.965, text, transform=axes.transAxes, va="top", ha="left", color=PAPER, size=6.5, bbox=box
    )

# SPDX-License-Identifier: Apache-2.0
"""The figures of `vimcore explain`: maps over the picture that they are of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..utils.files import shortened
from .panels import (
    FRAME,
    HEAT,
    SIGNED,
    Array,
    View,
    axes_grid,
    bare_axes,
    draw_heat,
    draw_photo,
    heading,
    panel_size,
    tag_axes,
)
from .style import BLUE, INK, MUTED, ORANGE, PAPER, new_figure, plain_text, save_figure, tidy

LEVELS = LinearSegmentedColormap.from_list(
    "vimcore_levels", ["#12123a", "#3b2a7e", "#2f6f9f", "#3fb08f", "#d9e36b", "#fffde0"]
)
FIELD = LinearSegmentedColormap.from_list(
    "vimcore_field", ["#ffffff", "#cfe3f7", "#7fb2e5", "#3366cc", "#22223b"]
)
DECADES = 3  # of the scale of attention
SQUARES = ("#d62839", "#f28e2b", "#2a9d5c", "#8a8fa3")


class Evidence(NamedTuple):
    """What one row of `plot_evidence` shows.

    Attributes:
        title: the class and its probability.
        heat: (H, W) or (h, w) by patch; negative values speak against the class.
        shares, deletion, insertion: the curves, areas: below them.
    """

    title: str
    heat: Array
    shares: Array
    deletion: Array
    insertion: Array
    areas: tuple[float, float]


# ---- attention ---------------------------------------------------------------------------------------------


def _decades(share: Array) -> Array:
    """log10, cut off where the scale ends."""
    return np.log10(np.maximum(share, 10.0**-DECADES))


def _scale(figure: Any, box: tuple[float, float, float, float]) -> None:
    """The scale of attention, as a bar."""
    ((axes,),) = axes_grid(figure, box, 1, 1, 0)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=HEAT, aspect="auto", extent=(-DECADES, 0, 0, 1))
    axes.set_facecolor("#1b1b28")
    axes.set_yticks([])
    axes.set_xticks(range(-DECADES, 1), [f"{10.0**k:g}" for k in range(-DECADES, 1)], size=7.5, color=INK)
    axes.tick_params(length=0, pad=2)
    axes.get_xticklabels()[0].set_ha("left")
    axes.get_xticklabels()[-1].set_ha("right")
    for spine in axes.spines.values():
        spine.set_color(FRAME)


def columns_for(panels: int) -> int:
    """Columns of a grid that is a little wider than high, if possible without gaps."""
    least = math.ceil(math.sqrt(panels))
    full = [c for c in range(least, math.ceil(1.5 * least) + 1) if panels % c == 0]
    return full[0] if full else math.ceil(math.sqrt(1.3 * panels))


@plain_text
def plot_attention(
    view: View,
    maps: Array,
    layers: Sequence[int],
    token: tuple[float, float] | None,
    title: str,
    path: Path,
) -> None:
    """Maps (layers, 2, h, w): all layers of the forward scan as a grid, those of the reverse scan beside it.

    Args:
        token: (x, y) in pixels of the patch whose row is shown; None: a class token.
    """
    columns = columns_for(len(layers))
    rows = -(-len(layers) // columns)
    cell = panel_size(view, min(max(4.4 / columns, 0.82), 1.5))
    gap, top = 0.05, 0.95
    block = columns * cell[0] + (columns - 1) * gap, rows * cell[1] + (rows - 1) * gap
    photo = panel_size(view, min(2.2, max(block[1], 1.4)))
    between = 0.3
    wide, high = photo[0] + 2 * (block[0] + between), max(block[1], photo[1] + 0.4) + top
    figure = new_figure(wide, high)
    note = "weight of every patch in this token's output, mean over channels; a layer's largest weight is 1"
    heading(figure, title, note)
    ((axes,),) = axes_grid(figure, (0, high - top - photo[1], *photo), 1, 1, 0)
    draw_photo(axes, view)
    if token is not None:
        axes.plot(*token, "o", ms=9, mfc="none", mec=PAPER, mew=3.2)
        axes.plot(*token, "o", ms=9, mfc="none", mec=ORANGE, mew=1.6)
    _scale(figure, (0, high - top - photo[1] - 0.16, photo[0], 0.08))
    largest = maps.max(axis=(1, 2, 3), initial=0)
    for direction, name in enumerate(("forward scan", "reverse scan")):
        left = photo[0] + between + direction * (block[0] + between)
        figure.text(left / wide, 1 - (top - 0.06) / high, name, color=INK, size=9.5, va="bottom")
        panels = axes_grid(figure, (left, high - top - block[1], *block), rows, columns, gap)
        flat = [axes for line in panels for axes in line]
        for axes in flat[len(layers) :]:
            axes.axis("off")
        for axes, layer, both, top_value in zip(flat, layers, maps, largest):
            draw_photo(axes, view, "dark")
            if both[direction].any():
                draw_heat(axes, view, _decades(both[direction] / top_value), HEAT, -DECADES, 0)
            tag_axes(axes, f"{layer}" if both[direction].any() else f"{layer}: none")
    save_figure(figure, path)


# ---- one or a few maps -------------------------------------------------------------------------------------


@plain_text
def plot_maps(
    view: View, maps: Sequence[tuple[str, Array]], title: str, note: str, path: Path, side: float = 2.7
) -> None:
    """The picture, and beside it maps (h, w) over it, each up to its largest value; negative ones in blue."""
    cell = panel_size(view, side)
    gap, top = 0.15, 0.95
    wide = (len(maps) + 1) * cell[0] + len(maps) * gap
    figure = new_figure(wide, cell[1] + top)
    heading(figure, title, note)
    (panels,) = axes_grid(figure, (0, 0, wide, cell[1]), 1, len(maps) + 1, gap)
    draw_photo(panels[0], view)
    panels[0].set_title("input", color=INK, size=9.5, loc="left", pad=4)
    for axes, (name, heat) in zip(panels[1:], maps):
        signed = bool((heat < 0).any())
        draw_photo(axes, view, "light" if signed else "dark")
        top_value = float(abs(heat).max()) or 1.0
        draw_heat(axes, view, heat, SIGNED if signed else HEAT, -top_value if signed else 0, top_value)
        axes.set_title(shortened(name, 40), color=INK, size=9.5, loc="left", pad=4)
    save_figure(figure, path)


@plain_text
def plot_norms(view: View, norms: Array, layers: Sequence[int], title: str, path: Path) -> None:
    """Norms (layers, h, w) as a grid, each layer on its own scale, and their spread over the layers."""
    columns = columns_for(len(layers))
    rows = -(-len(layers) // columns)
    cell = panel_size(view, min(max(5.2 / columns, 0.9), 1.7))
    gap, top, curve = 0.05, 0.7, 3.1
    block = columns * cell[0] + (columns - 1) * gap, rows * cell[1] + (rows - 1) * gap
    wide, high = block[0] + 0.75 + curve, max(block[1], 2.2) + top
    figure = new_figure(wide, high)
    heading(
        figure,
        title,
        "lengths of the patches' tokens; each layer from its smallest (dark) to its largest value",
    )
    panels = axes_grid(figure, (0, high - top - block[1], *block), rows, columns, gap)
    flat = [axes for line in panels for axes in line]
    for axes in flat[len(layers) :]:
        axes.axis("off")
    for axes, layer, values in zip(flat, layers, norms):
        low, high_value = float(values.min()), float(values.max())
        axes.imshow(
            values, cmap=LEVELS, vmin=low, vmax=high_value, extent=view.extent, interpolation="nearest"
        )
        bare_axes(axes, view)
        tag_axes(axes, f"{layer}:  {low:.3g} to {high_value:.3g}")
    height = max(block[1], 2.2) - 0.35
    ((axes,),) = axes_grid(figure, (block[0] + 0.75, high - top - height, curve, height), 1, 1, 0)
    flat_norms = norms.reshape(len(layers), -1)
    quantiles = np.quantile(flat_norms, [0, 0.25, 0.5, 0.75, 1], axis=1)
    order = np.argsort(layers)
    x = np.asarray(layers)[order]
    low_, lower, middle, upper, high_ = quantiles[:, order]
    axes.fill_between(x, low_, high_, color=BLUE, alpha=0.14, lw=0, label="all patches")
    axes.fill_between(x, lower, upper, color=BLUE, alpha=0.28, lw=0, label="half of them")
    axes.plot(x, middle, color=BLUE, lw=2, label="median", marker="o" if len(x) == 1 else None)
    axes.set_xlabel("layer", color=INK, size=9)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    tidy(axes)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=3, columnspacing=1.2, handlelength=1.4)
    save_figure(figure, path)


@plain_text
def plot_evidence(
    view: View, rows: Sequence[Evidence], signed: bool, title: str, note: str, path: Path
) -> None:
    """A row per class: the evidence over the picture, and the curves of deletion and insertion."""
    cell = panel_size(view, 2.5)
    gap, top, curve, apart = 0.15, 0.62, 2.9, 0.36
    wide = 2 * cell[0] + gap + 0.6 + curve
    each = cell[1] + apart
    high = len(rows) * each + top
    figure = new_figure(wide, high)
    heading(figure, title, note)
    for k, row in enumerate(rows):
        bottom = high - top - (k + 1) * each + 0.1
        ((left, right),) = axes_grid(figure, (0, bottom, 2 * cell[0] + gap, cell[1]), 1, 2, gap)
        draw_photo(left, view)
        left.set_title(shortened(row.title, 44), color=INK, weight="bold", size=9.5, loc="left", pad=4)
        largest = float(abs(row.heat).max()) or 1.0
        draw_photo(right, view, "light" if signed else "dark")
        draw_heat(right, view, row.heat, SIGNED if signed else HEAT, -largest if signed else 0, largest)
        box = (2 * cell[0] + gap + 0.6, bottom + 0.28, curve, cell[1] - 0.28)
        ((axes,),) = axes_grid(figure, box, 1, 1, 0)
        for y, colour, name, area in (
            (row.insertion, BLUE, "inserted", row.areas[1]),
            (row.deletion, ORANGE, "deleted", row.areas[0]),
        ):
            axes.plot(100 * row.shares, 100 * y, color=colour, lw=2, label=f"{name}, area {area:.3f}")
            axes.fill_between(100 * row.shares, 0, 100 * y, color=colour, alpha=0.10, lw=0)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 102)
        tidy(axes)
        axes.tick_params(labelsize=8)
        axes.set_ylabel("probability, %", color=INK, size=8.5)
        if k == len(rows) - 1:
            axes.set_xlabel("pixels, strongest evidence first, %", color=INK, size=8.5)
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2,
                    columnspacing=1.2, handlelength=1.4)  # fmt: skip
    save_figure(figure, path)


# ---- figures of all pictures -------------------------------------------------------------------------------


@plain_text
def plot_field(
    shown: Array,
    sides: Sequence[tuple[float, int | None, float | None]],
    centre: tuple[int, int],
    title: str,
    note: str,
    path: Path,
) -> None:
    """A receptive field (H, W) from 0 to 1 with the squares that hold its shares, and the table of these."""
    view = View(np.zeros((*shown.shape, 3)), (-0.5, shown.shape[1] - 0.5, shown.shape[0] - 0.5, -0.5))
    cell = panel_size(view, 4.0)
    top, table = 0.72, 2.5
    wide, high = cell[0] + 0.35 + table, cell[1] + top
    figure = new_figure(wide, high)
    heading(figure, title, note)
    ((axes,),) = axes_grid(figure, (0, 0, *cell), 1, 1, 0)
    axes.imshow(shown, cmap=FIELD, vmin=0, vmax=1, extent=view.extent, interpolation="antialiased")
    bare_axes(axes, view)
    left, line = (cell[0] + 0.35) / wide, 0.30 / high
    y = 1 - (top + 0.1) / high
    columns = (left, left + 0.95 / wide, left + 1.75 / wide)
    for x, text in zip(columns, ("share", "side, px", "of image")):
        figure.text(x, y, text, color=MUTED, size=9, va="top")
    for k, (share, side, area) in enumerate(sides):
        y -= line
        colour = SQUARES[k % len(SQUARES)]
        figure.text(columns[0], y, f"■ {100 * share:g} %", color=colour, size=10, weight="bold", va="top")
        if side is None or area is None:
            figure.text(columns[1], y, "no gradient", color=MUTED, size=9, va="top")
            continue
        figure.text(columns[1], y, f"{side}", color=INK, size=10, va="top")
        figure.text(columns[2], y, f"{100 * area:.1f} %", color=INK, size=10, va="top")
        corner = centre[1] - side / 2, centre[0] - side / 2
        axes.add_patch(Rectangle(corner, side, side, fill=False, ec=colour, lw=1.4))
    save_figure(figure, path)


@plain_text
def plot_colours(views: Sequence[View], colours: Array, title: str, note: str, path: Path) -> None:
    """Pictures, and right of each the features of its patches as colours (n, h, w, 3)."""
    columns = min(4, len(views)) if len(views) > 2 else len(views)
    rows = -(-len(views) // columns)
    cell = panel_size(views[0], 1.6 if len(views) > 2 else 2.4)
    gap, top, apart = 0.06, 0.72, 0.22
    pair = 2 * cell[0] + gap
    wide = columns * pair + (columns - 1) * apart
    high = rows * cell[1] + (rows - 1) * gap * 2 + top
    figure = new_figure(wide, high)
    heading(figure, title, note)
    for k, (view, values) in enumerate(zip(views, colours)):
        left = (k % columns) * (pair + apart)
        bottom = high - top - (k // columns + 1) * cell[1] - (k // columns) * gap * 2
        ((photo, map_),) = axes_grid(figure, (left, bottom, pair, cell[1]), 1, 2, gap)
        draw_photo(photo, view)
        map_.imshow(values.clip(0, 1), extent=view.extent, interpolation="nearest")
        bare_axes(map_, view)
    save_figure(figure, path)

# SPDX-License-Identifier: Apache-2.0
"""`vimcore plot` of detection: curves, and the worst pictures beside their truth. Needs no torch.

Reads RUN/log.jsonl and RUN/eval.npz, see `vimcore.tasks.detection.answers`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..data.drawing import colours
from ..tasks.detection.answers import Answers, Shown, Worst, read_answers
from ..utils.files import shortened
from .curves import Scored
from .run_folders import plot_run_folders
from .style import INK, MUTED, NAME, PAPER, new_figure, plain_text, save_figure

KINDS = ("box_ap", "mask_ap")
SCORED = Scored(
    "loss",
    "average precision, %",
    KINDS,
    ("box AP", "mask AP"),
    {
        "proposals": ("loss_objectness", "loss_rpn_box_reg"),
        "classes": ("loss_classifier",),
        "boxes": ("loss_box_reg",),
        "masks": ("loss_mask",),
    },
)


# ---- pictures ----------------------------------------------------------------------------------------------


@plain_text
def plot_pictures(
    shown: Sequence[Worst], captions: Sequence[str], names: Sequence[str], path: Path, title: str
) -> None:
    """Three pictures of each scene: itself, its truth, what was found.

    Args:
        captions: a line for each.
        names: of the classes.
    """
    palette = np.array(colours(len(names))) / 255
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    height = rows * 1.85 + 0.75
    figure = new_figure(columns * 5.0, height)
    layout = {"hspace": 0.2, "wspace": 0.04, "left": 0, "right": 1, "bottom": 0, "top": 1 - 0.75 / height}
    widths = ([1, 1, 1, 0.14] * columns)[:-1]
    grid = figure.subplots(rows, len(widths), squeeze=False, gridspec_kw={**layout, "width_ratios": widths})
    for axes in grid.flat:
        axes.axis("off")
    for i, (one, caption) in enumerate(zip(shown, captions)):
        row, first = i // columns, 4 * (i % columns)
        _panel(grid[row, first], one.image, None, names, palette)
        _panel(grid[row, first + 1], one.image, one.truth, names, palette)
        _panel(grid[row, first + 2], one.image, one.found, names, palette, scores=True)
        grid[row, first].set_title(caption, color=INK, size=8, loc="left", pad=3)
    for first in range(0, len(widths), 4):
        for offset, text in enumerate(("picture", "truth", "found")):
            box = grid[0, first + offset].get_position()
            place = (box.x0 + box.x1) / 2
            figure.text(place, 1 - 0.42 / height, text, color=MUTED, size=9, ha="center", va="center")
    figure.suptitle(title, color=INK, weight="bold", x=0, ha="left", y=1)
    save_figure(figure, path)


def _panel(
    axes: Axes,
    image: NDArray[np.uint8],
    objects: Shown | None,
    names: Sequence[str],
    palette: NDArray[np.float64],
    scores: bool = False,
) -> None:
    """A picture, pale where objects are drawn on it, each with its class and maybe its score."""
    values = image / 255
    if objects is not None:
        values = 0.45 * values + 0.55
        for mask, label in zip(objects.masks[::-1], objects.labels[::-1]):
            values[mask] = 0.25 * values[mask] + 0.75 * palette[label]
    axes.imshow(values, interpolation="nearest" if len(image) < 100 else "antialiased")
    if objects is None:
        return
    for (x1, y1, x2, y2), label, score in zip(objects.boxes, objects.labels, objects.scores):
        colour, side = palette[label], (float(x2 - x1), float(y2 - y1))
        axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), *side, fill=False, edgecolor=colour, lw=1.2))
        text = shortened(names[label], 12) + (f" {100 * score:.0f}" if scores else "")
        ground = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
        light = float(colour @ [0.299, 0.587, 0.114]) > 0.55
        place: dict[str, Any] = {"va": "bottom" if y1 > 4 else "top", "bbox": ground}
        axes.text(x1 - 0.5, y1 - 0.5, text, size=6.5, color=INK if light else PAPER, **place)


def plot_worst(answers: Answers, path: Path, count: int = 24, title: str = "") -> None:
    """The pictures of the smallest quality."""
    shown = list(answers.worst)[:count]
    captions = []
    for one in shown:
        file = os.path.basename(answers.files[one.index])
        missed, wrong = int(answers.missed[one.index]), int(answers.wrong[one.index])
        captions.append(f"{missed} missed, {wrong} wrong  {shortened(file, 30)}")
    head = f"{shortened(title, NAME)}: " if title else ""
    figures = [
        f"{name.partition('_')[0]} AP {100 * answers.figures[name]:.1f} %"
        for name in KINDS
        if name in answers.figures
    ]
    text = f"{head}{', '.join(figures)}; the worst {len(shown)} of {len(answers.files)} pictures"
    plot_pictures(shown, captions, answers.names, path, text)


# ---- the command -------------------------------------------------------------------------------------------


def plot_runs(
    runs: Sequence[str], out: str | None = None, kind: str = "png", mistakes: int = 24
) -> tuple[list[str], list[str]]:
    """Curves, and for every run that was evaluated the worst pictures.

    Arguments and results as those of `vimcore.plots.run_folders.plot_run_folders`.
    """

    def figures(found: Answers, name: str) -> list[tuple[str, partial[None]]]:
        return [("worst", partial(plot_worst, found, count=mistakes, title=name))] if found.worst else []

    return plot_run_folders(runs, out, kind, SCORED, read_answers, figures)

# SPDX-License-Identifier: Apache-2.0
"""`vimcore plot` of segmentation: curves, confusion of pixels, and the worst images beside their truth.

Reads RUN/log.jsonl and RUN/eval.npz, see `vimcore.tasks.segmentation.answers`. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ..tasks.segmentation.answers import Answers, Worst, read_answers
from ..utils.files import shortened
from .confusion import annotate, draw_confusion
from .curves import Scored
from .run_folders import plot_run_folders
from .style import INK, MUTED, NAME, new_figure, plain_text, save_figure

SCORED = Scored(
    "cross-entropy", "mIoU, %", ("miou", "macc", "aacc"), ("mIoU", "mean accuracy", "right pixels")
)
LISTED = 24  # classes beside the matrix, those of the smallest IoU
KEYED = 24  # classes whose colours fit below the images
WRONG = np.array([214, 40, 57], np.uint8)
UNKNOWN = np.array([150, 155, 175], np.uint8)  # pixels that do not count


@plain_text
def plot_confusion(answers: Answers, path: Path, title: str = "") -> None:
    """Shares of the pixels of each class (row) that were taken for each class (column); IoU beside it."""
    found = answers.figures()
    share = answers.counts / np.maximum(answers.counts.sum(1, keepdims=True), 1)

    def percent(row: int, column: int) -> str:
        return f"{100 * share[row, column]:.0f}" if share[row, column] >= 0.005 else ""

    figure, axes, *_ = draw_confusion(share, answers.names, percent)
    head = f"{shortened(title, NAME)}: " if title else ""
    text = f"{head}{_percent(found.miou)} mIoU, % of the pixels of each row"
    order = [int(i) for i in np.argsort(found.iou, kind="stable") if not np.isnan(found.iou[i])][:LISTED]
    lines = [f"{_percent(found.iou[i])}  {shortened(answers.names[i], 28)}" for i in order]
    annotate(axes, text, ["smallest IoU", *lines], 16)
    save_figure(figure, path)


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f} %"


@plain_text
def plot_images(
    shown: Sequence[Worst],
    captions: Sequence[str],
    names: Sequence[str],
    palette: NDArray[np.uint8],
    path: Path,
    title: str,
) -> None:
    """Four pictures of each image: itself, its truth, what was found, and where these differ.

    Args:
        captions: a line for each image.
        palette: (classes, 3) uint8.
    """
    columns = 2 if len(shown) > 1 else 1
    rows = -(-len(shown) // columns)
    present = sorted({int(k) for one in shown for m in (one.truth, one.found) for k in np.unique(m)} - {255})
    keyed = present if len(present) <= KEYED else []
    below = 0.35 * -(-len(keyed) // 11) + 0.1
    height = rows * 1.55 + 0.75 + below
    figure = new_figure(columns * 5.6, height)
    bottom, top = below / height, 1 - 0.75 / height
    layout = {"hspace": 0.24, "wspace": 0.04, "left": 0, "right": 1, "bottom": bottom, "top": top}
    widths = [1, 1, 1, 1, 0.12, 1, 1, 1, 1][: 9 if columns == 2 else 4]
    grid = figure.subplots(rows, len(widths), squeeze=False, gridspec_kw={**layout, "width_ratios": widths})
    for axes in grid.flat:
        axes.axis("off")
    for i, (one, caption) in enumerate(zip(shown, captions)):
        first = 5 * (i % columns)
        panels = (one.image, painted(one.truth, palette), painted(one.found, palette), differences(one))
        for axes, picture in zip(grid[i // columns, first : first + 4], panels):
            axes.imshow(picture, interpolation="nearest" if len(picture) < 100 else "antialiased")
        grid[i // columns, first].set_title(caption, color=INK, size=8, loc="left", pad=3)
    for first in range(0, len(widths), 5):
        for offset, text in enumerate(("image", "truth", "found", "errors")):
            box = grid[0, first + offset].get_position()
            place = (box.x0 + box.x1) / 2
            figure.text(place, 1 - 0.42 / height, text, color=MUTED, size=9, ha="center", va="center")
    if keyed:
        patches = [
            Patch(facecolor=palette[k] / 255, edgecolor="#d9dce6", label=shortened(names[k], 16))
            for k in keyed
        ]
        figure.legend(handles=patches, loc="lower left", ncols=11, frameon=False, fontsize=8, handlelength=1)
    figure.suptitle(title, color=INK, weight="bold", x=0, ha="left", y=1)
    save_figure(figure, path)


def painted(classes: NDArray[np.uint8], palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Class indices in their colours; 255 is grey."""
    colours = np.full((256, 3), UNKNOWN, np.uint8)
    colours[: len(palette)] = palette
    return colours[classes]


def differences(one: Worst) -> NDArray[np.uint8]:
    """The image pale and grey, wrong pixels red; those that do not count as in the truth."""
    grey = 160 + one.image.mean(2, keepdims=True) * (95 / 255)
    picture = np.repeat(grey, 3, 2).astype(np.uint8)
    picture[one.truth != one.found] = WRONG
    picture[one.truth == 255] = UNKNOWN
    return picture


def plot_worst(answers: Answers, path: Path, count: int = 24, title: str = "") -> None:
    """The images of the smallest mIoU."""
    shown = list(answers.worst)[:count]
    captions = [
        f"{_percent(answers.miou[one.index])} mIoU, {_percent(answers.right[one.index])} right  "
        f"{shortened(os.path.basename(answers.files[one.index]) or f'scene {one.index}', 34)}"
        for one in shown
    ]
    head = f"{shortened(title, NAME)}: " if title else ""
    text = f"{head}{_percent(answers.figures().miou)} mIoU"
    text += f"; the worst {len(shown)} of {len(answers.files)} images"
    plot_images(shown, captions, answers.names, answers.palette, path, text)


def plot_runs(
    runs: Sequence[str], out: str | None = None, kind: str = "png", mistakes: int = 24
) -> tuple[list[str], list[str]]:
    """Curves, and for every run that was evaluated the confusion matrix and the worst images.

    Arguments and results as those of `vimcore.plots.run_folders.plot_run_folders`.
    """

    def figures(found: Answers, name: str) -> list[tuple[str, partial[None]]]:
        drawn = [("confusion", partial(plot_confusion, found, title=name))]
        if found.worst:  # else no image has pixels that count
            drawn.append(("worst", partial(plot_worst, found, count=mistakes, title=name)))
        return drawn

    return plot_run_folders(runs, out, kind, SCORED, read_answers, figures)

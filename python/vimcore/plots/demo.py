# SPDX-License-Identifier: Apache-2.0
"""The figures of `vimcore demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..utils.files import shortened
from .style import BLUE, GREEN, INK, MUTED, ORANGE, RED, new_figure, plain_text, save_figure, tidy

HEAT = LinearSegmentedColormap.from_list("heat", ["#00000000", "#f94144aa", "#f9c74fff"])
Answer = tuple[int, Any, float]  # class index, label, probability


class Curves(Protocol):
    """Loss and accuracy (0 to 1) after every epoch, as `vimcore.train.History` has them."""

    loss: list[float]
    accuracy: list[float]
    valid_loss: list[float]
    valid_accuracy: list[float]


@plain_text
def plot_curve(history: Curves, path: Path) -> None:
    """Loss and accuracy, training and held out, over the epochs."""
    figure = new_figure(8.4, 3.6)
    loss, accuracy = figure.subplots(1, 2)
    epochs = np.arange(1, len(history.loss) + 1)
    loss.plot(epochs, history.loss, color=BLUE, lw=2, label="training (jiggled, smoothed labels)")
    loss.plot(epochs, history.valid_loss, color=ORANGE, lw=2, label="held out")
    loss.set_ylabel("cross-entropy")
    loss.set_ylim(bottom=0)
    accuracy.plot(epochs, 100 * np.array(history.accuracy), color=BLUE, lw=2, label="training")
    accuracy.plot(epochs, 100 * np.array(history.valid_accuracy), color=ORANGE, lw=2, label="held out")
    best = 100 * history.valid_accuracy[-1]
    beside: dict[str, Any] = {
        "xytext": (6, 0),
        "textcoords": "offset points",
        "va": "center",
        "annotation_clip": False,
    }
    accuracy.annotate(f"{best:.1f} %", (epochs[-1], best), color=ORANGE, weight="bold", **beside)
    accuracy.set_ylabel("right answers, %")
    accuracy.set_ylim(max(100 * min(history.accuracy + history.valid_accuracy) - 5, 0), 101)
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xlim(1, max(len(epochs), 2))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        tidy(axes)
        axes.legend(frameon=False, loc="best", fontsize=9)
    figure.suptitle("Vision Mamba learns handwritten digits", color=INK, weight="bold", x=0.02, ha="left")
    figure.tight_layout()
    save_figure(figure, path)


@plain_text
def plot_predictions(
    pictures: NDArray[np.uint8],
    truth: NDArray[np.int64],
    answers: Sequence[Answer],
    accuracy: float,
    path: Path,
    columns: int = 10,
) -> None:
    """A grid of pictures (n, H, W) with the prediction below each; wrong ones in red, with the true class."""
    rows = -(-len(pictures) // columns)
    height = rows * 1.22 + 0.6
    figure = new_figure(columns * 1.0, height)
    layout = {"hspace": 0.36, "wspace": 0.12, "left": 0, "right": 1, "bottom": 0, "top": 1 - 0.5 / height}
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=layout)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, digit, answer in zip(grid.flat, pictures, truth, answers):
        right = answer[0] == digit
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, interpolation="bicubic")
        axes.axis("on")
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_color("#d9dce6" if right else RED)
            side.set_linewidth(1.0 if right else 3.0)
        below: dict[str, Any] = {"transform": axes.transAxes, "va": "top"}
        label, percent = shortened(str(answer[1]), 12), f"{100 * answer[2]:.0f} %"
        percent = percent if right else f"is {digit}, {percent}"
        axes.text(0.02, -0.07, label, color=GREEN if right else RED, weight="bold", size=10, **below)
        axes.text(0.98, -0.09, percent, ha="right", color=MUTED if right else RED, size=8, **below)
    title = f"Held-out digits with the network's answers: {100 * accuracy:.1f} % of all are right"
    figure.suptitle(title, color=INK, weight="bold", x=0, ha="left", y=1)
    save_figure(figure, path)


@plain_text
def plot_maps(
    pictures: NDArray[np.uint8],
    maps: NDArray[np.float32],
    truth: NDArray[np.int64],
    answers: Sequence[Answer],
    path: Path,
) -> None:
    """Pictures (n, H, W), and beside each the same with its saliency map (n, H, W) on top."""
    columns = 5
    rows = -(-len(pictures) // columns)
    height = rows * 1.4 + 0.7
    figure = new_figure(columns * 2.3, height)
    layout = {"hspace": 0.24, "wspace": 0.06, "left": 0, "right": 1, "bottom": 0, "top": 1 - 0.75 / height}
    grid = figure.subplots(rows, 2 * columns, squeeze=False, gridspec_kw=layout)
    for axes in grid.flat:
        axes.axis("off")
    for i, (image, evidence, digit, answer) in enumerate(zip(pictures, maps, truth, answers)):
        left, over = grid[i // columns, 2 * (i % columns)], grid[i // columns, 2 * (i % columns) + 1]
        left.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
        over.imshow(image // 2, cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
        top = float(evidence.max())
        over.imshow(
            evidence / top if top > 0 else evidence, cmap=HEAT, vmin=0, vmax=1, interpolation="bicubic"
        )
        right = answer[0] == digit
        label = shortened(str(answer[1]), 12)
        text = f"{label}   {100 * answer[2]:.0f} %" if right else f"{label}, is {digit}"
        left.set_title(text, color=GREEN if right else RED, weight="bold", size=10, loc="left", pad=4)
    figure.suptitle("Where the decision comes from", color=INK, weight="bold", x=0, ha="left", y=1)
    note = "bright: speaks for the answer, be it ink or the lack of it"
    figure.text(0, 1 - 0.32 / height, note, color=MUTED, size=9, va="center")
    save_figure(figure, path)

# SPDX-License-Identifier: Apache-2.0
"""`vimcore plot`: training curves, confusion matrices and worst mistakes of runs. Needs no torch.

Reads RUN/log.jsonl, lines of kind "step" and "eval", and RUN/eval.npz: labels, predictions, probabilities,
names (of the classes), files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from .. import _core
from ..data.digits import load_digits, split_digits
from ..data.picture_files import read_file
from ..data.pictures import decode
from ..tasks.classification.predictions import Predictions, read_predictions
from ..utils.files import shortened
from .confusion import annotate, draw_confusion
from .curves import Scored
from .run_folders import plot_run_folders
from .style import GREEN, INK, MUTED, NAME, RED, new_figure, plain_text, save_figure

SCORED = Scored("cross-entropy", "right answers, %", ("top1", "top5"), ("top-1", "top-5"))
SIDE = 192  # pixels of a picture among the mistakes


# ---- confusion matrix --------------------------------------------------------------------------------------


@plain_text
def plot_confusion(answers: Predictions, path: Path, title: str = "") -> None:
    """Confusion matrix: rows are true classes, columns predictions; the most frequent confusions as text."""
    matrix = answers.confusion()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, axes, image, side = draw_confusion(
        share, answers.names, lambda row, column: f"{matrix[row, column] or ''}"
    )
    scale = axes.inset_axes((1 + 0.12 / side, 0, 0.16 / side, 1))
    bar = figure.colorbar(image, cax=scale, ticks=[0, 1, 5, 10, 25, 50, 100])
    scale.set_xlabel("% of row", color=INK, fontsize=8)
    scale.tick_params(colors=INK, length=0, labelsize=8)
    bar.outline.set_visible(False)
    right = int((answers.labels == answers.predictions).sum())
    head = f"{shortened(title, NAME)}: " if title else ""
    text = f"{head}{right} of {len(answers.labels)} right, {100 * right / len(answers.labels):.2f} %"
    annotate(axes, text, confusions(matrix, answers.names), 66)
    save_figure(figure, path)


def confusions(matrix: NDArray[np.int64], names: Sequence[str], most: int = 12) -> list[str]:
    """The most frequent confusions, one line of text each."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = [divmod(int(at), len(names)) for at in np.argsort(-wrong, axis=None, kind="stable")[:most]]
    lines = [
        f"{wrong[row, column]} \u00d7  {shortened(names[row], 28)} \u2192 {shortened(names[column], 28)}"
        for row, column in order
        if wrong[row, column]
    ]
    return ["most frequent", *lines] if lines else ["no mistakes"]


# ---- mistakes ----------------------------------------------------------------------------------------------


def worst_of(answers: Predictions, count: int) -> tuple[NDArray[np.intp], int]:
    """Mistakes that gave the true class least probability, without any the least certain images; and how many
    mistakes there are."""
    truth = answers.probabilities[np.arange(len(answers.labels)), answers.labels]
    wrong = np.flatnonzero(answers.labels != answers.predictions)
    pool = wrong if len(wrong) else np.arange(len(answers.labels))
    return pool[np.argsort(truth[pool], kind="stable")[:count]], len(wrong)


@plain_text
def plot_mistakes(answers: Predictions, path: Path, count: int = 24, title: str = "") -> None:
    """The mistakes that gave the true class least probability; without any, the least certain images."""
    chosen, wrong = worst_of(answers, count)
    pictures = pictures_of(answers)
    columns = min(6, max(len(chosen), 3))
    rows = -(-len(chosen) // columns)
    height = rows * 2.05 + 0.6
    figure = new_figure(columns * 1.7, height)
    layout = {"hspace": 0.42, "wspace": 0.12, "left": 0, "right": 1, "bottom": 0, "top": 1 - 0.55 / height}
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=layout)
    for axes in grid.flat:
        axes.axis("off")
    for axes, i in zip(grid.flat, chosen):
        _tile(axes, answers, int(i), pictures)
    head = f"{shortened(title, NAME)}: " if title else ""
    if wrong:
        text = f"{head}{wrong} of {len(answers.labels)} wrong"
        text += f", the worst {len(chosen)}" if len(chosen) < wrong else ""
    else:
        text = f"{head}no mistakes; the least sure answers"
    figure.suptitle(text, color=INK, weight="bold", x=0, ha="left", y=1)
    save_figure(figure, path)


def _tile(axes: Axes, answers: Predictions, i: int, pictures: Callable[[int], NDArray[Any] | str]) -> None:
    picture = pictures(i)
    axes.axis("on")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#d9dce6")
    if isinstance(picture, str):
        axes.set_facecolor("#f2f3f7")
        axes.text(0.5, 0.5, picture, transform=axes.transAxes, ha="center", va="center", color=MUTED, size=7)
    else:
        grey: dict[str, Any] = {"cmap": "gray"} if picture.ndim == 2 else {}
        axes.imshow(_square(picture), interpolation="bicubic" if len(picture) < 64 else "antialiased", **grey)
    is_, said = int(answers.labels[i]), int(answers.predictions[i])
    p = answers.probabilities[i]
    below: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "size": 7.5}
    colour = GREEN if is_ == said else RED
    first = f"{shortened(answers.names[said], 17)}, {100 * p[said]:.0f} %"
    second = shortened(os.path.basename(answers.files[i]), 24) if is_ == said else ""
    if is_ != said:
        second = f"is {shortened(answers.names[is_], 17)}, {100 * p[is_]:.2g} %"
    axes.text(0.0, -0.03, first, color=colour, weight="bold", **below)
    axes.text(0.0, -0.15, second, color=INK, **below)


def pictures_of(answers: Predictions) -> Callable[[int], NDArray[Any] | str]:
    """A function that returns the pixels of image i, grey or RGB, or a text that says why there are none."""
    if not any(answers.files):
        digits, labels = load_digits()
        held_out = split_digits(labels)[1]
        if np.array_equal(labels[held_out], answers.labels):
            return lambda i: np.asarray(digits[held_out[i]])
    return lambda i: _picture(answers.files[i])


def _picture(file: str) -> NDArray[Any] | str:
    if not file:
        return "no file"
    try:
        data = read_file(file)
        if file.lower().endswith(".npy"):
            return _channels(np.load(io.BytesIO(data), allow_pickle=False))
        pixels = decode(data, file)
    except OSError as error:
        return f"{shortened(os.path.basename(file), 24)}\n{error.strerror or error}"
    except (_core.Error, EOFError, ValueError):
        return f"{shortened(os.path.basename(file), 24)}\ncannot be read"
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    if scale < 1:
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        pixels = _core.resize_bicubic(np.ascontiguousarray(pixels), *size)
    return pixels


def _square(picture: NDArray[Any]) -> NDArray[Any]:
    """Pads the shorter side with the background."""
    side = max(picture.shape[:2])
    around = [((side - n) // 2, side - n - (side - n) // 2) for n in picture.shape[:2]]
    paper = 255 if picture.dtype == np.uint8 and picture.ndim == 3 else picture.max(initial=0)
    return np.pad(picture, [*around, (0, 0)][: picture.ndim], constant_values=paper)


def _channels(array: NDArray[Any]) -> NDArray[np.float64]:
    """(C, H, W) as an image: the first three channels, or the first, stretched to the range 0 to 1."""
    if array.ndim != 3:
        raise ValueError(array.shape)
    shown = array[:3] if len(array) >= 3 else array[:1]
    low, high = (f(shown, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    scaled = (shown - low) / np.maximum(high - low, 1e-12)
    return np.asarray(scaled[0] if len(scaled) == 1 else np.moveaxis(scaled, 0, 2), np.float64)


# ---- the command -------------------------------------------------------------------------------------------


def plot_runs(
    runs: Sequence[str], out: str | None = None, kind: str = "png", mistakes: int = 24
) -> tuple[list[str], list[str]]:
    """Curves, and for every run that was evaluated the confusion matrix and the worst mistakes.

    Arguments and results as those of `vimcore.plots.run_folders.plot_run_folders`.
    """

    def figures(found: Predictions, name: str) -> list[tuple[str, partial[None]]]:
        return [
            ("confusion", partial(plot_confusion, found, title=name)),
            ("mistakes", partial(plot_mistakes, found, count=mistakes, title=name)),
        ]

    return plot_run_folders(runs, out, kind, SCORED, read_predictions, figures)

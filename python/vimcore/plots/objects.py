# SPDX-License-Identifier: Apache-2.0
"""`vimcore plot` of detection: curves, and the worst pictures beside their truth. Needs no torch.

Reads RUN/log.jsonl and RUN/eval.npz, see `vimcore.tasks.detection.answers`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..data.drawing import colours
from ..tasks.detection.answers import Answers, Shown, Worst, read_answers
from ..train.log import Log, read_log
from ..utils.files import shortened
from .runs import COLOURS, NAME, averaged, draw, legend, line_style, named_runs
from .style import BLUE, INK, MUTED, ORANGE, PAPER, new_figure, plain_text, save_figure, tidy

KINDS = ("box_ap", "mask_ap")


# ---- curves ------------------------------------------------------------------------------------------------


@plain_text
def plot_curves(logs: Mapping[str, Log], path: Path) -> None:
    """Loss (of a single run also its parts), average precision, learning rate, gradient norm."""
    figure = new_figure(10.5, 7)
    (loss, score), (rate, norm) = figure.subplots(2, 2)
    several = len(logs) > 1
    kinds: list[Line2D] = []
    for i, log in enumerate(logs.values()):
        colour = COLOURS[i % len(COLOURS)]
        loss.plot(*averaged(log.steps, "loss"), color=colour, lw=1.5, label="all")
        if not several:
            for shade, (text, parts) in zip(COLOURS[1:], _parts(log).items()):
                x, first = averaged(log.steps, parts[0])
                values = [first, *(averaged(log.steps, name)[1] for name in parts[1:])]
                loss.plot(x, np.sum(values, 0), color=shade, lw=1, label=text)
        for weights, rows in log.evals.items():
            style = line_style(weights, rows)
            for kind, shade in zip(KINDS, (ORANGE, BLUE)):
                if kind in rows and (kind == "box_ap" or not several):
                    of = colour if several else shade
                    (line,) = score.plot(rows["epoch"], 100 * rows[kind], color=of, lw=2, **style)
                    averaged_too = ", averaged weights" if weights == "ema" else ""
                    line.set_label(f"{kind.partition('_')[0]} AP{averaged_too}")
                    kinds.append(line)
        _mark_best(score, log, colour if several else ORANGE, several)
        rate.plot(*averaged(log.steps, "lr"), color=colour, lw=2)
        norm.plot(*averaged(log.steps, "grad_norm"), color=colour, lw=1.2)
    titles = ("loss of training", "box AP, %" if several else "average precision, %")
    for axes, text in zip((loss, score, rate, norm), (*titles, "learning rate", "gradient norm")):
        axes.set_title(text, color=INK, loc="left", fontsize=11)
        axes.set_xlabel("epoch", color=INK)
        if axes.get_xlim()[1] > 2:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_ylim(bottom=0)
        tidy(axes)
    rate.yaxis.set_major_locator(MaxNLocator(5))
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    if several:
        lines = [line for line in legend(logs) if line.get_label() != "training"]
        score.legend(handles=lines, frameon=False, fontsize=9)
    else:
        loss.legend(frameon=False, fontsize=8)
        score.legend(handles=kinds, frameon=False, fontsize=9, loc="lower right")
    names = ", ".join(shortened(name, NAME) for name in logs)
    title = "Training of " + (names if len(logs) <= 3 else f"{len(logs)} runs")
    figure.suptitle(title, color=INK, weight="bold", x=0.02, ha="left")
    figure.tight_layout()
    save_figure(figure, path)


def _parts(log: Log) -> dict[str, list[str]]:
    """Names of the losses in the log that belong together, by what they are."""
    kinds = {
        "proposals": ("loss_objectness", "loss_rpn_box_reg"),
        "classes": ("loss_classifier",),
        "boxes": ("loss_box_reg",),
        "masks": ("loss_mask",),
    }
    found = {kind: [name for name in log.steps if name.startswith(begin)] for kind, begin in kinds.items()}
    return {kind: names for kind, names in found.items() if names}


def _mark_best(axes: Axes, log: Log, colour: str, several: bool) -> None:
    points = [(v, e) for rows in log.evals.values() for e, v in zip(rows["epoch"], rows["box_ap"]) if v == v]
    if not points:
        return
    best, epoch = max(points)
    axes.plot([epoch], [100 * best], "o", color=colour, ms=7, mfc=PAPER, mew=2, zorder=3)
    if not several:
        place: dict[str, Any] = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{100 * best:.2f} %", (epoch, 100 * best), color=colour, weight="bold", **place)


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
    """Draws the curves, and for every run that was evaluated the worst pictures.

    Arguments and results as those of `vimcore.plots.runs.plot_runs`.
    """
    names = named_runs(runs)
    folder = Path(out) if out is not None else Path(runs[0] if len(runs) == 1 else ".")
    logs: dict[str, Log] = {}
    answers: dict[str, Answers] = {}
    notes = []
    for run, name in zip(runs, names):
        log, evaluated = Path(run) / "log.jsonl", Path(run) / "eval.npz"
        if not log.is_file() and not evaluated.is_file():
            raise ValueError(f"{run}: no run: neither log.jsonl nor eval.npz is there")
        if log.is_file():
            logs[name] = read_log(log)
        if evaluated.is_file():
            answers[name] = read_answers(evaluated)
        else:
            notes.append(f"{run}: no eval.npz yet, so no worst pictures")
    folder.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    if logs:
        draw(folder / f"curves.{kind}", written, lambda path: plot_curves(logs, path))
    for name, found in answers.items():
        prefix = "" if len(runs) == 1 else name.strip("/").replace("/", "-") + "-"
        worst = folder / f"{prefix}worst.{kind}"
        if found.worst:
            draw(worst, written, partial(plot_worst, found, count=mistakes, title=name))
    return written, notes

# SPDX-License-Identifier: Apache-2.0
"""How runs of any task went: loss, scores, learning rate and gradient norm over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..train.log import Log
from ..utils.files import shortened
from .style import BLUE, COLOURS, INK, MUTED, NAME, ORANGE, PAPER, new_figure, plain_text, save_figure, tidy

POINTS = 300  # of a curve: more are averaged


@dataclass(frozen=True)
class Scored:
    """What is drawn of the evaluations of a task.

    Attributes:
        loss: title of the panel of the loss.
        score: title of the panel of the scores.
        names: of the scores in the log, shares from 0 to 1. The first one has the best marked, the others are
            drawn for a single run, in grey; without any there is no such panel.
        labels: of the scores, as in tables.
        parts: of the loss of a single run: text, and how the names of what is added up begin.
    """

    loss: str
    score: str = ""
    names: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@plain_text
def plot_curves(logs: Mapping[str, Log], path: Path, scored: Scored) -> None:
    """Loss, scores, learning rate, gradient norm (or images a second) of runs by name."""
    figure = new_figure(10.5, 7)
    panels = list(figure.subplots(2, 2).flat)
    _draw(logs, panels, scored)
    if not scored.names:
        figure.delaxes(panels[1])
    names = ", ".join(shortened(name, NAME) for name in logs)
    title = "Training of " + (names if len(logs) <= 3 else f"{len(logs)} runs")
    figure.suptitle(title, color=INK, weight="bold", x=0.02, ha="left")
    figure.tight_layout()
    save_figure(figure, path)


@plain_text
def curve_figures(logs: Mapping[str, Log], scored: Scored) -> list[tuple[str, Figure]]:
    """The panels of `plot_curves`, each a figure of its own, with their titles."""
    figures = [new_figure(4.6, 3.1) for _ in range(4)]
    panels = [figure.subplots() for figure in figures]
    _draw(logs, panels, scored)
    for figure in figures:
        figure.tight_layout()
    shown = [i for i in range(4) if i != 1 or scored.names]
    return [(panels[i].get_title(loc="left"), figures[i]) for i in shown]


def _draw(logs: Mapping[str, Log], panels: Sequence[Axes], scored: Scored) -> None:
    normed = any(np.isfinite(log.steps["grad_norm"]).any() for log in logs.values())
    last_of, label = ("grad_norm", "gradient norm") if normed else ("images_per_second", "images per second")
    titles = [scored.loss, scored.score, "learning rate", label]
    loss, score, rate, last = panels
    several = len(logs) > 1
    for i, log in enumerate(logs.values()):
        colour = COLOURS[i % len(COLOURS)]
        held_out = colour if several else ORANGE
        training: dict[str, Any] = {"color": colour, "marker": "." if len(log.steps["epoch"]) == 1 else None}
        loss.plot(*_averaged(log.steps, "loss"), lw=1.2, alpha=0.55 if several else 1, **training)
        if not several:
            _plot_parts(loss, log, scored.parts)
        for weights, rows in log.evals.items():
            style = _line_style(weights, rows)
            if np.isfinite(rows["loss"]).any():
                loss.plot(rows["epoch"], rows["loss"], color=held_out, lw=2, **style)
            for name in _drawn(scored, rows, several):
                first = name == scored.names[0]
                colours: dict[str, Any] = (
                    {"color": held_out, "lw": 2} if first else {"color": MUTED, "lw": 1.2}
                )
                score.plot(rows["epoch"], 100 * rows[name], **colours, **style)
        if scored.names:
            _mark_best(score, log, scored.names[0], held_out, several)
        rate.plot(*_averaged(log.steps, "lr"), lw=2, **training)
        last.plot(*_averaged(log.steps, last_of), lw=1.2, **training)
    for axes, text in zip(panels, titles):
        axes.set_title(text, color=INK, loc="left", fontsize=11)
        axes.set_xlabel("epoch", color=INK)
        if axes.get_xlim()[1] > 2:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if axes is not score:
            axes.set_ylim(bottom=0)
        tidy(axes)
    rate.yaxis.set_major_locator(MaxNLocator(5))
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    score.set_ylim(top=101)
    parts = loss.get_legend_handles_labels()[0]
    loss.legend(handles=[*_legend(logs), *parts], frameon=False, fontsize=9)
    if not several and len(score.lines) > 1:
        lines = _score_legend(next(iter(logs.values())), scored)
        score.legend(handles=lines, frameon=False, fontsize=9, loc="lower right")


def _plot_parts(axes: Axes, log: Log, parts: Mapping[str, tuple[str, ...]]) -> None:
    for colour, (text, begins) in zip(COLOURS[2:], parts.items()):
        names = [name for name in log.steps if name.startswith(begins)]
        if names:
            curves = [_averaged(log.steps, name) for name in names]
            total = np.sum([values for _, values in curves], 0)
            axes.plot(curves[0][0], total, color=colour, lw=1, label=text)


def _drawn(scored: Scored, rows: Mapping[str, NDArray[np.float64]], several: bool) -> list[str]:
    """The first score, and further ones of a single run that say more than that all is right."""
    further = [
        name
        for name in scored.names[1:]
        if not several and name in rows and np.nanmin(rows[name], initial=1) < 1
    ]
    return [name for name in scored.names[:1] if name in rows] + further


def _line_style(weights: str, rows: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    marker = "o" if len(rows["epoch"]) <= 30 else None
    return {"ls": "--" if weights == "ema" else "-", "marker": marker, "ms": 3.5}


def _averaged(
    steps: Mapping[str, NDArray[np.float64]], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(x, y) of at most POINTS points: means over neighbouring steps."""
    x, y = steps["epoch"], steps[name]
    size = -(-len(x) // POINTS)
    if size <= 1:
        return x, y
    begins = np.arange(0, len(x), size)
    counts = np.diff(np.append(begins, len(x)))
    return np.add.reduceat(x, begins) / counts, np.add.reduceat(y, begins) / counts


def _mark_best(axes: Axes, log: Log, name: str, colour: str, several: bool) -> None:
    """Marks the best score with its value."""
    rows_of = [rows for rows in log.evals.values() if name in rows]
    points = [(t, e) for rows in rows_of for e, t in zip(rows["epoch"], rows[name]) if t == t]
    if not points:
        return
    best, epoch = max(points)
    axes.plot([epoch], [100 * best], "o", color=colour, ms=7, mfc=PAPER, mew=2, zorder=3)
    if not several:
        place: dict[str, Any] = {"xytext": (0, -16), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{100 * best:.2f} %", (epoch, 100 * best), color=colour, weight="bold", **place)


def _legend(logs: Mapping[str, Log]) -> list[Line2D]:
    """Runs by colour, then the kinds of lines."""
    ema = any("ema" in log.evals for log in logs.values())
    raw = any("raw" in log.evals for log in logs.values())
    if len(logs) > 1:
        lines = [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=2, label=shortened(name, NAME))
            for i, name in enumerate(logs)
        ]
        train = Line2D([], [], color=MUTED, lw=1.2, alpha=0.55, label="training")
        colour = MUTED
    else:
        lines, train, colour = [], Line2D([], [], color=BLUE, lw=1.2, label="training"), ORANGE
    lines.append(train)
    if raw:
        lines.append(Line2D([], [], color=colour, lw=2, label="held out"))
    if ema:
        lines.append(Line2D([], [], color=colour, lw=2, ls="--", label="held out, averaged weights"))
    return lines


def _score_legend(log: Log, scored: Scored) -> list[Line2D]:
    lines = []
    labels = dict(zip(scored.names, scored.labels))
    for weights, rows in log.evals.items():
        of = ", averaged weights" if weights == "ema" else ""
        ls = "--" if weights == "ema" else "-"
        for name in _drawn(scored, rows, False):
            first = name == scored.names[0]
            width, colour = (2.0, ORANGE) if first else (1.2, MUTED)
            lines.append(Line2D([], [], color=colour, lw=width, ls=ls, label=f"{labels[name]}{of}"))
    return lines

# SPDX-License-Identifier: Apache-2.0
"""`vimcore plot` of pretraining: curves, and what the network predicts of some images. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..tasks.pretraining.reconstructions import Reconstructions, read_reconstructions
from ..utils.files import shortened
from .curves import Scored
from .run_folders import plot_run_folders
from .style import INK, MUTED, NAME, new_figure, plain_text, save_figure

SCORED = Scored("loss")


@plain_text
def plot_reconstructions(found: Reconstructions, path: Path, count: int = 24, title: str = "") -> None:
    """The pictures of each image side by side."""
    shown = min(len(found.panels), count)
    columns = 2 if shown > 4 else 1
    rows = -(-shown // columns)
    across = len(found.titles)
    figure = new_figure(1.5 * across * columns + 0.3, 1.6 * rows + 0.7)
    grid = figure.subplots(rows, across * columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for i in range(shown):
        row, column = i % rows, i // rows * across
        for k, text in enumerate(found.titles):
            axes, picture = grid[row, column + k], found.panels[i, k]
            axes.imshow(picture, interpolation="nearest" if len(picture) < 64 else "antialiased")
            if row == 0:
                axes.set_title(text, color=INK, fontsize=9)
        below: dict[str, Any] = {"transform": grid[row, column].transAxes, "va": "top", "size": 7}
        grid[row, column].text(0, -0.03, f"loss {found.loss[i]:.3f}", color=MUTED, **below)
    text = f"{shortened(title, NAME)}: " if title else ""
    text += "held-out images and what is predicted"
    figure.suptitle(text, color=INK, weight="bold", x=0.02, ha="left")
    save_figure(figure, path)


def plot_runs(
    runs: Sequence[str], out: str | None = None, kind: str = "png", mistakes: int = 24
) -> tuple[list[str], list[str]]:
    """See `vimcore.plots.run_folders.plot_run_folders`."""

    def figures(found: Reconstructions, name: str) -> list[tuple[str, partial[None]]]:
        return [("predicted", partial(plot_reconstructions, found, count=mistakes, title=name))]

    return plot_run_folders(runs, out, kind, SCORED, read_reconstructions, figures)

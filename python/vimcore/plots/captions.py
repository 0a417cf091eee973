# SPDX-License-Identifier: Apache-2.0
"""`vimcore plot` of image-text learning: curves, and which images captions find. Needs no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..tasks.clip.found import Found, read_found
from ..utils.files import literal, shortened
from .curves import Scored
from .run_folders import plot_run_folders
from .style import GREEN, INK, MUTED, NAME, RED, new_figure, plain_text, save_figure

SCORED = Scored("loss", "recall", ("r1", "r5"), ("at 1", "at 5"))


@plain_text
def plot_found(found: Found, path: Path, count: int = 12, title: str = "") -> None:
    """A row for each caption: its nearest images, framed green where the caption is theirs, else red."""
    shown, across = min(len(found.captions), count), found.panels.shape[1]
    figure = new_figure(1.25 * across + 2.4, 1.35 * shown + 0.6)
    grid = figure.subplots(shown, across + 1, squeeze=False, width_ratios=[1.9] + [1.0] * across)
    figure.subplots_adjust(left=0.02, right=0.99, bottom=0.03, top=1 - 0.5 / figure.get_figheight())
    for i in range(shown):
        text = "\n".join(textwrap.wrap(shortened(found.captions[i], 96), 24))
        grid[i, 0].axis("off")
        grid[i, 0].text(0, 0.5, text, va="center", size=8, color=INK, transform=grid[i, 0].transAxes)
        for k in range(across):
            axes = grid[i, k + 1]
            axes.imshow(found.panels[i, k])
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set(color=GREEN if found.right[i, k] else RED, linewidth=2)
            axes.set_xlabel(f"{found.cosines[i, k]:.3f}", size=7, color=MUTED, labelpad=2)
    text = f"{shortened(literal(title), NAME)}: " if title else ""
    figure.suptitle(
        f"{text}captions and the nearest held-out images", color=INK, weight="bold", x=0.02, ha="left"
    )
    save_figure(figure, path)


def plot_runs(
    runs: Sequence[str], out: str | None = None, kind: str = "png", mistakes: int = 24
) -> tuple[list[str], list[str]]:
    """See `vimcore.plots.run_folders.plot_run_folders`."""

    def figures(found: Found, name: str) -> list[tuple[str, partial[None]]]:
        return [("found", partial(plot_found, found, count=mistakes, title=name))]

    return plot_run_folders(runs, out, kind, SCORED, read_found, figures)

# SPDX-License-Identifier: Apache-2.0
"""The look that all figures share. They are drawn without a display."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..utils.files import atomic

INK, PAPER, MUTED = "#22223b", "#ffffff", "#8a8fa3"
BLUE, ORANGE, RED, GREEN = "#3366cc", "#f28e2b", "#d62839", "#2a9d5c"
COLOURS = (BLUE, ORANGE, GREEN, RED, "#7b4fb5", "#17a2b8", "#8c6d31", "#c2478d")  # of runs
NAME = 40  # characters of a run's name
# For functions that draw: text is not parsed (a class may be called $x$), SVG has the same bytes each time.
plain_text = matplotlib.rc_context(
    {"text.parse_math": False, "text.usetex": False, "svg.hashsalt": "vimcore"}
)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, width x height inches, outside of pyplot's global state."""
    figure = Figure(figsize=(width, height), facecolor=PAPER, dpi=160)
    FigureCanvasAgg(figure)
    return figure


@plain_text
def save_figure(figure: Figure, path: Path) -> None:
    """Writes PNG or SVG by suffix, atomically; the same figure gives the same bytes."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"{path}: expected a name that ends in .png or .svg")
    memory = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None} if kind == "png" else {"Date": None}
    figure.savefig(memory, format=kind, metadata=metadata, bbox_inches="tight", pad_inches=0.2)
    with atomic(path) as file:
        file.write(memory.getvalue())


def tidy(axes: Axes) -> None:
    """Removes the frame, adds a light grid."""
    axes.grid(color="#e6e8ef")
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)

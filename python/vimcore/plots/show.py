# SPDX-License-Identifier: Apache-2.0
"""A picture of what other functions return, for notebooks: maps, colours, predictions, pictures."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..data.given import KINDS, given, thumbnail
from ..results import Prediction, Predictions
from ..utils.files import shortened
from .panels import HEAT, SIGNED
from .style import INK, new_figure, plain_text, save_figure

MOST = 64  # panels of a figure
_SIDE = 384  # pixels of a picture
Array = NDArray[Any]


class Shown:
    """A figure that notebooks show.

    Attributes:
        figure: matplotlib's.
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as .png or .svg; ValueError: the name ends otherwise."""
        save_figure(self.figure, Path(path))

    @plain_text
    def _repr_png_(self) -> bytes:
        memory = io.BytesIO()
        self.figure.savefig(memory, format="png", bbox_inches="tight", pad_inches=0.1)
        return memory.getvalue()


@dataclass(frozen=True)
class _Panel:
    """One cell of a figure.

    Attributes:
        picture: (H, W, 3), or None.
        values: (h, w) of a map that is laid over it, or None.
        high: the largest magnitude of the maps of the same image.
    """

    picture: Array | None
    values: Array | None = None
    high: float = 1.0
    title: str = ""


def show(x: Any, images: Any = None, labels: Sequence[str] | None = None) -> Shown:
    """Draws maps, colours of features, predictions or pictures.

    Args:
        x: maps (h, w), (B, h, w) or (B, ..., h, w), as of saliency, relevance, attention_maps, token_norms: a
            row for each image; colours (B, h, w, 3), as of feature_pca; what `Runtime.predict` returns; or
            pictures as `Runtime.predict` takes them.
        images: of maps, what they are laid over: (B, C, H, W) as the model takes them, or pictures.
        labels: of each image.

    Returns:
        A figure that notebooks show, with `save(path)`. Of more than 64 panels the first 64.

    Raises:
        TypeError, ValueError: x is nothing of that, or numbers of images differ.
    """
    rows = _rows(x, images)
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"[show] labels: expected {len(rows)}, one for each image, got {len(labels)}")
    if labels is not None:
        rows = [[_titled(panel, labels[i]) for panel in row] for i, row in enumerate(rows)]
    wide = max(map(len, rows), default=1)
    if wide == 1:  # one panel for each image: side by side
        wide = min(8, max(math.ceil(math.sqrt(len(rows) * 1.5)), 1))
        flat = [panel for row in rows for panel in row]
        rows = [flat[i : i + wide] for i in range(0, len(flat), wide)]
    rows = rows[: max(MOST // wide, 1)]
    return Shown(_figure([row[:MOST] for row in rows], min(wide, MOST)))


def _rows(x: Any, images: Any) -> list[list[_Panel]]:
    if isinstance(x, Prediction):
        x = Predictions([x])
    if isinstance(x, Predictions):
        return [
            [_Panel(thumbnail(p.given, _SIDE) if p.given else None, title=f"{p.label}  {100 * p.p:.1f} %")]
            for p in x
        ]
    numbers = _numbers(x)
    if numbers is None:
        if images is not None:
            raise TypeError("[show] images: belong to maps; pictures are x itself")
        return [[_Panel(picture)] for picture in _pictures(x)]
    if not np.isfinite(numbers).all():
        raise ValueError("[show] x: expected finite numbers")
    if numbers.ndim < 2 or 0 in numbers.shape:
        raise ValueError(f"[show] x: expected maps (h, w) or (B, ..., h, w), got {numbers.shape}")
    if numbers.ndim == 4 and numbers.shape[-1] == 3:
        return [[_Panel(np.clip(colours, 0, 1))] for colours in numbers]
    maps = numbers.reshape(-1 if numbers.ndim > 2 else 1, *numbers.shape[-2:])
    count = numbers.shape[0] if numbers.ndim > 2 else 1
    below = [None] * count if images is None else _backgrounds(images)
    if len(below) != count:
        raise ValueError(f"[show] images: expected {count}, one for each image of x, got {len(below)}")
    by_image = maps.reshape(count, -1, *maps.shape[1:])
    return [
        [_Panel(picture, values, float(np.abs(of).max()) or 1.0) for values in of]
        for picture, of in zip(below, by_image)
    ]


def _numbers(x: Any) -> Array | None:
    """Floating point values of a tensor or an array; None: these are pictures, or something else."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else None


def _backgrounds(images: Any) -> list[Array]:
    """(H, W, 3) each, of network inputs stretched to their range, or of pictures."""
    numbers = _numbers(images)
    if numbers is None:
        return _pictures(images)
    if numbers.ndim == 3:
        numbers = numbers[None]
    if numbers.ndim != 4:
        raise ValueError(f"[show] images: expected (B, C, H, W), got {numbers.shape}")
    found = []
    for image in numbers:
        shown = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, 0)
        low, high = shown.min(), shown.max()
        found.append(((shown - low) / max(high - low, 1e-12)).transpose(1, 2, 0))
    return found


def _pictures(x: Any) -> list[Array]:
    found = []
    for picture in given("[show] x", x)[0]:
        pixels = thumbnail(picture, _SIDE)
        if pixels is None:
            raise ValueError(f"[show] {picture.name}: cannot be read; expected {KINDS}")
        found.append(pixels)
    return found


def _titled(panel: _Panel, title: str) -> _Panel:
    return _Panel(panel.picture, panel.values, panel.high, title)


@plain_text
def _figure(rows: list[list[_Panel]], wide: int) -> Figure:
    figure = new_figure(max(1.9 * wide, 2.5), max(2.05 * len(rows), 2.2))
    if not rows:
        return figure
    grid = figure.subplots(len(rows), wide, squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.95, 0.05, 0.14)
    for axes in grid.flat:
        axes.axis("off")
    for line, row in zip(grid, rows):
        for axes, panel in zip(line, row):
            _draw(axes, panel)
    return figure


def _draw(axes: Any, panel: _Panel) -> None:
    if panel.picture is not None:
        sharp = max(panel.picture.shape[:2]) < 64
        axes.imshow(panel.picture, interpolation="nearest" if sharp else "antialiased")
    if panel.values is not None:
        extent = None
        if panel.picture is not None:
            height, width = panel.picture.shape[:2]
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        signed = panel.values.min() < 0
        low = -panel.high if signed else 0.0
        cmap: Any = "RdBu_r" if signed else "magma"  # alone; over a picture the ones that let it through
        if panel.picture is not None:
            cmap = SIGNED if signed else HEAT
        axes.imshow(
            panel.values, cmap=cmap, vmin=low, vmax=panel.high, extent=extent, interpolation="bilinear"
        )
    if panel.title:
        axes.set_title(shortened(panel.title, 32), color=INK, fontsize=8, pad=3)

# SPDX-License-Identifier: Apache-2.0
"""Objects drawn on pictures: masks, boxes, names."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..utils.files import shortened
from ..weights.task import default_palette

Colour = tuple[int, int, int]


def colours(classes: int) -> list[Colour]:
    """One for each class, none of them black."""
    return list(default_palette(classes + 1)[1:])


def drawn(
    pixels: NDArray[np.uint8],
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    masks: NDArray[np.bool_],
    texts: Sequence[str],
    palette: Sequence[Colour],
) -> NDArray[np.uint8]:
    """A picture (H, W, 3) with its objects, the first one on top.

    Args:
        boxes: (n, 4) x1, y1, x2, y2 in pixels.
        labels: (n,) index into the palette.
        masks: (n, H, W); half of their pixels' colour becomes the class's. (0, H, W): only boxes.
        texts: one for each object.
    """
    found = pixels.astype(np.uint16)
    for mask, label in reversed(list(zip(masks, labels))):
        found[mask] = (found[mask] + np.array(palette[label], np.uint16)) >> 1
    image = Image.fromarray(found.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    side = max(pixels.shape[:2])
    width, font = max(side // 400, 1), ImageFont.load_default(max(side / 50, 10))
    for box, label, text in reversed(list(zip(boxes, labels, texts))):
        x1, y1, x2, y2 = (float(v) for v in box)
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=palette[label], width=width)
        if text:
            place = (x1 + width, y1)
            ground = draw.textbbox(place, shortened(text, 40), font=font)
            draw.rectangle(ground, fill=palette[label])
            draw.text(place, shortened(text, 40), fill=_ink(palette[label]), font=font)
    return np.asarray(image)


def _ink(ground: Colour) -> Colour:
    """Black or white, whichever is easier to read."""
    light = 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2]
    return (0, 0, 0) if light > 140 else (255, 255, 255)


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG file of (H, W, 3)."""
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "JPEG", quality=90)
    return memory.getvalue()

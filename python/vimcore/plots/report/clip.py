# SPDX-License-Identifier: Apache-2.0
"""Parts of a report on image-text learning."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...tasks.clip.found import Found, read_found
from ..captions import SCORED
from .page import Section, cell, gallery, picture, text

__all__ = ["SCORED", "read", "sections", "tiles"]
read = read_found


def tiles(found: Found) -> list[tuple[str, str]]:
    """The figures that matter most."""
    return [("captions shown", str(len(found.captions)))]


def sections(found: Found, count: int, samples: Mapping[str, int]) -> list[Section]:
    """A row for each caption: its nearest images, green where the caption is theirs, else red."""
    cells = []
    for i in range(min(len(found.captions), count)):
        pictures = [
            picture(np.ascontiguousarray(p), f"image of cosine {cosine:.3f}", "right" if right else "wrong")
            for p, right, cosine in zip(found.panels[i], found.right[i], found.cosines[i])
        ]
        cells.append(cell(pictures, text(found.captions[i])))
    about = "<p>Captions and the nearest held-out images: green where the caption is theirs, else red.</p>"
    return [Section("What captions find", about + gallery(cells, wide=True))]

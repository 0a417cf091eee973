# SPDX-License-Identifier: Apache-2.0
"""Parts of a report on pretraining."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from ...tasks.pretraining.reconstructions import Reconstructions, read_reconstructions
from ..reconstructions import SCORED
from .page import Section, cell, gallery, picture, text

__all__ = ["SCORED", "read", "sections", "tiles"]
read = read_reconstructions


def tiles(found: Reconstructions) -> list[tuple[str, str]]:
    """The figures that matter most."""
    return [("mean loss of those shown", f"{float(np.mean(found.loss)):.4f}")]


def sections(found: Reconstructions, count: int, samples: Mapping[str, int]) -> list[Section]:
    """The pictures of each image side by side."""
    cells = []
    for i in range(min(len(found.panels), count)):
        pictures = [picture(np.ascontiguousarray(p), t) for p, t in zip(found.panels[i], found.titles)]
        name = os.path.basename(found.files[i])
        caption = f"loss {found.loss[i]:.3f}<br><small>{text(name)}</small>"
        cells.append(cell(pictures, caption))
    about = f"<p>Held-out images: {text(', '.join(found.titles))}.</p>"
    return [Section("What is predicted", about + gallery(cells, wide=True))]

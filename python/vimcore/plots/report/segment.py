# SPDX-License-Identifier: Apache-2.0
"""Parts of a report on a network for segmentation."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from ...tasks.segmentation.answers import Answers, read_answers
from ..segments import SCORED, differences, painted
from .classify import SHADED
from .page import Section, bar, cell, gallery, matrix, picture, table, text

__all__ = ["SCORED", "read", "sections", "tiles"]
read = read_answers


def tiles(answers: Answers) -> list[tuple[str, str]]:
    """The figures that matter most."""
    found = answers.figures()
    shares = (("mIoU", found.miou), ("mean accuracy", found.macc), ("right pixels", found.aacc))
    counts = [("held-out images", str(len(answers.files))), ("classes", str(len(answers.names)))]
    return [*((name, f"{100 * value:.2f} %") for name, value in shares), *counts]


def sections(answers: Answers, count: int, samples: Mapping[str, int]) -> list[Section]:
    """Classes, confusion of pixels, the worst images beside their truth."""
    found, pixels = answers.figures(), answers.counts.sum(1)
    rows = [
        [
            text(name),
            f"{pixels[i]:,}",
            bar(pixels[i] / max(pixels.sum(), 1)),
            bar(found.iou[i]),
            bar(found.accuracy[i]),
        ]
        for i, name in enumerate(answers.names)
    ]
    head = ["class", ">held-out pixels", "share", "IoU", "accuracy"]
    parts = [Section("Classes", table(head, rows))]
    if len(answers.names) <= SHADED:
        about = "<p>Percent of the pixels of each row's class.</p>"
        parts.append(Section("Confusion", about + matrix(answers.counts, answers.names, shares=True)))
    if answers.worst:
        parts.append(_worst(answers, count))
    return parts


def _worst(answers: Answers, count: int) -> Section:
    shown = list(answers.worst)[:count]
    cells = []
    for one in shown:
        panels = (
            one.image,
            painted(one.truth, answers.palette),
            painted(one.found, answers.palette),
            differences(one),
        )
        pictures = [
            picture(np.ascontiguousarray(p), f"{what} {one.index}")
            for p, what in zip(panels, ("image", "truth of image", "found in image", "errors in image"))
        ]
        name = os.path.basename(answers.files[one.index]) or f"scene {one.index}"
        miou, right = 100 * answers.miou[one.index], 100 * answers.right[one.index]
        caption = f"{miou:.1f} % mIoU, {right:.1f} % of its pixels right<br><small>{text(name)}</small>"
        cells.append(cell(pictures, caption, own_shape=True))
    present = sorted({int(k) for one in shown for m in (one.truth, one.found) for k in np.unique(m)} - {255})
    key = "".join(_key(answers.names[k], answers.palette[k]) for k in present)
    about = (
        f"<p>The {len(shown)} of the smallest mIoU of {len(answers.files)}: image, truth, found, errors "
        f'(red; grey does not count).</p><div class="key">{key}</div>'
    )
    return Section("Worst images", about + gallery(cells, wide=True))


def _key(name: str, colour: np.ndarray) -> str:
    red, green, blue = map(int, colour)
    return f'<span><i style="background:rgb({red},{green},{blue})"></i>{text(name)}</span>'

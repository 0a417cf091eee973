# SPDX-License-Identifier: Apache-2.0
"""Parts of a report on a detector."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ...data.drawing import colours, drawn
from ...tasks.detection.answers import Answers, Shown, Worst, read_answers
from ..objects import SCORED
from .page import Section, bar, cell, gallery, picture, table, text

__all__ = ["SCORED", "read", "sections", "tiles"]
read = read_answers
READABLE = 320  # pixels of a picture with names on it
NAMES = {"box_ap": "box AP", "mask_ap": "mask AP", "box_ap50": "box AP50", "mask_ap50": "mask AP50"}


def tiles(answers: Answers) -> list[tuple[str, str]]:
    """The figures that matter most."""
    shares = [(text_, answers.figures[name]) for name, text_ in NAMES.items() if name in answers.figures]
    counts = (
        ("pictures", len(answers.files)),
        ("objects missed", int(answers.missed.sum())),
        ("detections of none", int(answers.wrong.sum())),
    )
    return [*((name, f"{100 * value:.2f} %") for name, value in shares), *((n, str(c)) for n, c in counts)]


def sections(answers: Answers, count: int, samples: Mapping[str, int]) -> list[Section]:
    """Classes, the worst pictures beside their truth."""
    masks = len(answers.mask) > 0
    rows = [
        [text(name), bar(answers.box[i]), *([bar(answers.mask[i])] if masks else [])]
        for i, name in enumerate(answers.names)
    ]
    parts = [Section("Classes", table(["class", "box AP", *(["mask AP"] if masks else [])], rows))]
    if answers.worst:
        parts.append(_worst(answers, count))
    return parts


def _worst(answers: Answers, count: int) -> Section:
    shown, cells = list(answers.worst)[:count], []
    for one in shown:
        pictures = [
            picture(one.image, f"picture {one.index}"),
            picture(_drawn(answers, one, one.truth, scores=False), f"truth of picture {one.index}"),
            picture(_drawn(answers, one, one.found, scores=True), f"found in picture {one.index}"),
        ]
        name = os.path.basename(answers.files[one.index])
        caption = (
            f"{int(answers.missed[one.index])} missed, {int(answers.wrong[one.index])} wrong"
            f"<br><small>{text(name)}</small>"
        )
        cells.append(cell(pictures, caption, own_shape=True))
    about = f"<p>The {len(shown)} of the smallest quality of {len(answers.files)}: picture, truth, found.</p>"
    return Section("Worst pictures", about + gallery(cells, wide=True))


def _drawn(answers: Answers, one: Worst, objects: Shown, scores: bool) -> NDArray[np.uint8]:
    """The picture with its objects; a small one enlarged, so that their names do not hide it."""
    texts = [
        answers.names[label] + (f" {100 * score:.0f} %" if scores else "")
        for label, score in zip(objects.labels, objects.scores)
    ]
    palette = colours(len(answers.names))
    times = max(READABLE // max(one.image.shape[:2]), 1)
    image, masks = (
        one.image.repeat(times, 0).repeat(times, 1),
        objects.masks.repeat(times, 1).repeat(times, 2),
    )
    return drawn(image, objects.boxes * np.float32(times), objects.labels, masks, texts, palette)

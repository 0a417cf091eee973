# SPDX-License-Identifier: Apache-2.0
"""Parts of a report on a classifier."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ...tasks.classification.predictions import Predictions, read_predictions
from ..runs import SCORED, confusions, pictures_of, worst_of
from .page import Section, bar, cell, folded, gallery, matrix, missing, picture, table, text

__all__ = ["SCORED", "read", "sections", "tiles"]
read = read_predictions
LISTED = 30  # classes that are shown without being asked for
SHADED = 60  # classes whose confusion fits a page


def tiles(answers: Predictions) -> list[tuple[str, str]]:
    """The figures that matter most."""
    right = answers.labels == answers.predictions
    order = np.argsort(-answers.probabilities, axis=1, kind="stable")[:, :5]
    top5 = float((order == answers.labels[:, None]).any(1).mean())
    f1 = scores(answers)[2]
    return [
        ("top-1", f"{100 * right.mean():.2f} %"),
        *([("top-5", f"{100 * top5:.2f} %")] if len(answers.names) > 5 else []),
        ("macro F1", f"{100 * float(np.nanmean(f1)):.2f} %"),
        ("held-out images", str(len(right))),
        ("classes", str(len(answers.names))),
    ]


def scores(answers: Predictions) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Precision, recall and F1 of each class; nan of one that is neither there nor found."""
    counts = answers.confusion()
    hits = np.diag(counts).astype(float)
    with np.errstate(invalid="ignore"):
        precision, recall = hits / counts.sum(0), hits / counts.sum(1)
        f1 = 2 * hits / (counts.sum(0) + counts.sum(1))
    return precision, recall, f1


def sections(answers: Predictions, count: int, samples: Mapping[str, int]) -> list[Section]:
    """Classes, confusion, mistakes.

    Args:
        count: mistakes at most.
        samples: images of each class that were learnt from, where that is known.
    """
    return [_classes(answers, samples), _confusion(answers), _mistakes(answers, count)]


def _classes(answers: Predictions, samples: Mapping[str, int]) -> Section:
    precision, recall, f1 = scores(answers)
    head = [
        "class",
        *([">learnt from"] if samples else []),
        ">held out",
        "recall",
        "precision",
        "F1",
        "taken for",
    ]
    rows = []
    for i, (name, held_out, _, taken) in enumerate(answers.per_class()):
        learnt = [str(samples.get(name, 0))] if samples else []
        shown = [bar(recall[i]), bar(precision[i]), bar(f1[i])]
        rows.append([text(name), *learnt, str(held_out), *shown, text(taken)])
    if len(rows) <= LISTED:
        return Section("Classes", table(head, rows))
    order = np.argsort(np.where(np.isnan(f1), 2, f1), kind="stable")
    worst = f"<p>The {LISTED} of the smallest F1.</p>" + table(head, [rows[i] for i in order[:LISTED]])
    return Section("Classes", worst + folded(f"all {len(rows)} classes", table(head, rows)))


def _confusion(answers: Predictions) -> Section:
    counts = answers.confusion()
    most = confusions(counts, answers.names)
    first, *rest = (text(line) for line in most)
    body = f"<p><b>{first}</b><br>{'<br>'.join(rest)}</p>"
    if len(counts) <= SHADED:
        body = matrix(counts, answers.names, shares=False) + body
    return Section("Confusion", body)


def _mistakes(answers: Predictions, count: int) -> Section:
    chosen, wrong = worst_of(answers, count)
    read_picture = pictures_of(answers)
    cells = []
    for i in map(int, chosen):
        is_, said, p = int(answers.labels[i]), int(answers.predictions[i]), answers.probabilities[i]
        found = read_picture(i)
        shown = missing(found) if isinstance(found, str) else picture(_bytes(found), answers.names[is_])
        mark = "right" if is_ == said else "wrong"
        caption = f'<span class="{mark}">{text(answers.names[said])}, {100 * p[said]:.0f} %</span>'
        if is_ != said:
            caption += f"<br>is {text(answers.names[is_])}, {100 * p[is_]:.2g} %"
        if answers.files[i]:
            name = text(os.path.basename(answers.files[i]))
            caption += f'<br><small title="{text(answers.files[i])}">{name}</small>'
        cells.append(cell([shown], caption))
    total = len(answers.labels)
    if not wrong:
        return Section(
            "Least sure answers", f"<p>There are no mistakes among {total} images.</p>" + gallery(cells)
        )
    worst = f", the {len(cells)} that gave the truth least" if len(cells) < wrong else ""
    return Section("Mistakes", f"<p>{wrong} of {total} images{worst}.</p>" + gallery(cells))


def _bytes(pixels: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Pixels of any range that are drawn in shades, as bytes."""
    if pixels.dtype == np.uint8 and pixels.ndim == 3:
        return pixels  # type: ignore[return-value]
    values = pixels.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    return np.ascontiguousarray(np.round(255 * (values - low) / max(high - low, 1e-12)).astype(np.uint8))

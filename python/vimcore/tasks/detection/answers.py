# SPDX-License-Identifier: Apache-2.0
"""What a detector said of N pictures: figures, and the worst pictures; eval.npz. Needs no torch."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...data.coco import counts_of, from_counts
from ...utils.files import atomic

TASK = "detect"
SURE = 0.5  # score from which on a detection counts as one, for people and for the worst pictures
SIDE = 256  # pixels of the worst pictures
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """Objects on a picture (h, w).

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2 in pixels.
        labels: (n,) index of the class.
        scores: (n,) float32; 1 of the truth.
        masks: (n, h, w) bool; (0, h, w) where there are only boxes.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: NDArray[np.bool_]


@dataclass(frozen=True)
class Worst:
    """A picture with its truth and what was found, reduced to fit a figure."""

    index: int
    image: NDArray[np.uint8]
    truth: Shown
    found: Shown


@dataclass(frozen=True)
class Answers:
    """Of N pictures.

    Attributes:
        figures: COCO's by name: box_ap, box_ap50, ..., mask_ap, ...
        box, mask: (classes,) average precision, nan of a class without objects; mask empty without masks.
        quality: (N,) of each picture, see `quality`.
        missed, wrong: (N,) objects that were not found, and detections of no object.
        files: (N,) where the pictures lie; "": nowhere.
        names: of the classes.
        worst: pictures of the smallest quality, the worst first.
    """

    figures: Mapping[str, float]
    box: NDArray[np.float64]
    mask: NDArray[np.float64]
    quality: NDArray[np.float64]
    missed: NDArray[np.int64]
    wrong: NDArray[np.int64]
    files: Sequence[str]
    names: Sequence[str]
    worst: Sequence[Worst]

    def save(self, path: Path) -> None:
        """An .npz file of the attributes, and `task`."""
        pictures: dict[str, Any] = {"worst": np.array([worst.index for worst in self.worst], np.int64)}
        for place, worst in enumerate(self.worst):
            pictures[f"worst{place}_image"] = worst.image
            for part, shown in (("truth", worst.truth), ("found", worst.found)):
                for name, value in vars(shown).items():
                    pictures[f"worst{place}_{part}_{name}"] = value
        with atomic(path) as file:
            np.savez_compressed(
                file,
                task=np.array(TASK),
                figures=np.array(list(self.figures), dtype=np.str_),
                values=np.array(list(self.figures.values()), np.float64),
                box=self.box,
                mask=self.mask,
                quality=self.quality,
                missed=self.missed,
                wrong=self.wrong,
                files=np.array(self.files, dtype=np.str_),
                names=np.array(self.names, dtype=np.str_),
                **pictures,
            )


def read_answers(path: Path) -> Answers:
    """What `Answers.save` wrote; ValueError says what is wrong with it."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        if str(found["task"]) != TASK:
            raise ValueError(f"of the task {found['task']}")
        names, files = [str(n) for n in found["names"]], [str(f) for f in found["files"]]
        figures = {str(n): float(v) for n, v in zip(found["figures"], found["values"])}
        for name, kind, shape in (
            ("box", "f", (len(names),)),
            ("mask", "f", (len(names),) if len(found["mask"]) else (0,)),
            ("quality", "f", (len(files),)),
            ("missed", "i", (len(files),)),
            ("wrong", "i", (len(files),)),
        ):
            if found[name].shape != shape or found[name].dtype.kind != kind:
                raise ValueError(f"{name}: expected {shape}, got {found[name].dtype} {found[name].shape}")
        worst = [
            _worst(found, place, int(index), len(names), len(files))
            for place, index in enumerate(found["worst"])
        ]
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not the answers of a run of detection: {error}") from None
    return Answers(
        figures,
        found["box"],
        found["mask"],
        found["quality"],
        found["missed"],
        found["wrong"],
        files,
        names,
        worst,
    )


def _worst(found: Mapping[str, NDArray[Any]], place: int, index: int, classes: int, files: int) -> Worst:
    image = found[f"worst{place}_image"]
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not 0 <= index < files:
        raise ValueError(f"worst{place}: expected a picture of one of {files}, got {image.shape}, {index}")
    parts = []
    for part in ("truth", "found"):
        prefix = f"worst{place}_{part}_"
        shown = Shown(*(found[prefix + name] for name in ("boxes", "labels", "scores", "masks")))
        count = len(shown.labels)
        shapes = (shown.boxes.shape, shown.scores.shape, shown.masks.shape)
        drawn = len(shown.masks) if shown.masks.ndim else -1
        if shapes != ((count, 4), (count,), (drawn, *image.shape[:2])) or drawn not in (0, count):
            raise ValueError(f"{prefix}: expected boxes, labels, scores and masks of {count} objects")
        if shown.labels.dtype.kind != "i" or not ((shown.labels >= 0) & (shown.labels < classes)).all():
            raise ValueError(f"{prefix}labels: expected indices from 0 to {classes - 1}")
        parts.append(shown)
    return Worst(index, image, *parts)


# ---- from rows ---------------------------------------------------------------------------------------------


def shown_of(rows: Sequence[Row], size: tuple[int, int]) -> Shown:
    """Rows of COCO's form on a picture (height, width); crowds are left out."""
    rows = [row for row in rows if not row.get("iscrowd")]
    boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    drawn = [from_counts(counts_of(r["segmentation"]["counts"]), *size) for r in rows if "segmentation" in r]
    return Shown(
        boxes,
        np.array([row["category_id"] - 1 for row in rows], np.int64),
        np.array([row.get("score", 1.0) for row in rows], np.float32),
        np.array(drawn, bool).reshape(-1, *size),
    )


def sure(found: Shown) -> Shown:
    """Those whose score is at least SURE."""
    kept = found.scores >= SURE
    masks = found.masks[kept] if len(found.masks) else found.masks
    return Shown(found.boxes[kept], found.labels[kept], found.scores[kept], masks)


def quality(truth: Shown, found: Shown) -> tuple[float, int, int]:
    """Panoptic quality of a picture's objects, whatever their class, and how many were missed and are wrong.

    Detections, the surest first, take the object of their class that they overlap most, from 0.5 on; the sum
    of these overlaps is divided by pairs + missed / 2 + wrong / 2. 1 where nothing is and nothing was found.
    """
    overlaps = _overlaps(truth, found) * (truth.labels[:, None] == found.labels[None])
    free = np.ones(len(truth.labels), bool)
    total, pairs = 0.0, 0
    for i in np.argsort(-found.scores, kind="stable"):
        some = np.where(free, overlaps[:, i], 0)
        if len(some) and some.max() >= 0.5:
            total, pairs = total + float(some.max()), pairs + 1
            free[some.argmax()] = False
    missed, wrong = len(truth.labels) - pairs, len(found.labels) - pairs
    count = pairs + (missed + wrong) / 2
    return total / count if count else 1.0, missed, wrong


def _overlaps(a: Shown, b: Shown) -> NDArray[np.float64]:
    """(n, m) intersection over union of masks, or of boxes where there are none."""
    if len(a.masks) == len(a.labels) and len(b.masks) == len(b.labels):
        x, y = (s.masks.reshape(len(s.masks), math.prod(s.masks.shape[1:])).astype(float) for s in (a, b))
        both = x @ y.T
        either = x.sum(1)[:, None] + y.sum(1)[None] - both
    else:
        low = np.maximum(a.boxes[:, None, :2], b.boxes[None, :, :2])
        high = np.minimum(a.boxes[:, None, 2:], b.boxes[None, :, 2:])
        both = np.clip(high - low, 0, None).prod(2).astype(np.float64)
        areas = [(s.boxes[:, 2:] - s.boxes[:, :2]).prod(1) for s in (a, b)]
        either = areas[0][:, None] + areas[1][None] - both
    return np.asarray(both / np.maximum(either, 1e-9))


def reduced(index: int, pixels: NDArray[np.uint8], truth: Shown, found: Shown) -> Worst:
    """A picture for a figure, of at most SIDE pixels a side."""
    height, width = pixels.shape[:2]
    scale = min(SIDE / max(height, width), 1.0)
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    if size == (height, width):
        return Worst(index, pixels, truth, found)
    small = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    rows, columns = (((np.arange(n) + 0.5) * (old / n)).astype(int) for n, old in zip(size, (height, width)))
    factors = np.array([size[1] / width, size[0] / height] * 2, np.float32)

    def fit(shown: Shown) -> Shown:
        masks = shown.masks[:, rows[:, None], columns]
        return Shown(shown.boxes * factors, shown.labels, shown.scores, masks)

    return Worst(index, small, fit(truth), fit(found))

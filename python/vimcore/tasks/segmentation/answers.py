# SPDX-License-Identifier: Apache-2.0
"""What a network said of the pixels of N images: figures, the worst images, eval.npz. Needs no torch."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...utils.files import atomic

TASK = "segment"
Counts = NDArray[np.int64]
Pixels = NDArray[np.uint8]


def confusion(truth: Pixels, found: Pixels, classes: int) -> Counts:
    """(classes, classes): pixels of the row's class that were taken for the column's; 255 does not count."""
    known = truth != 255
    pairs = truth[known].astype(np.int64) * classes + found[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True)
class Figures:
    """Of a confusion matrix over all pixels of all images.

    Attributes:
        iou: (classes,) intersection over union; nan for a class that is neither there nor found.
        accuracy: (classes,) share of the class's pixels that are right; nan where it has none.
        miou, macc: means of these, without nan; nan where no pixel counts.
        aacc: share of all pixels that are right; nan likewise.
    """

    iou: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    miou: float
    macc: float
    aacc: float


def figures(counts: Counts) -> Figures:
    """As mmsegmentation and torchmetrics' MulticlassJaccardIndex(average="macro") compute them."""
    right, labelled, found = np.diag(counts).astype(float), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore"):
        iou, accuracy = right / (labelled + found - right), right / labelled
    total = counts.sum()
    return Figures(
        iou, accuracy, _mean(iou), _mean(accuracy), float(right.sum() / total) if total else np.nan
    )


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


@dataclass(frozen=True)
class Worst:
    """An image with its truth and what was found, reduced to fit a figure.

    Attributes:
        index: place among the N images.
        image: (h, w, 3) uint8.
        truth, found: (h, w) class indices; 255 in the truth does not count.
    """

    index: int
    image: Pixels
    truth: Pixels
    found: Pixels


@dataclass(frozen=True)
class Answers:
    """Of N images.

    Attributes:
        counts: (classes, classes) pixels: row truth, column found.
        miou: (N,) of each image alone, nan where no pixel of it counts.
        right: (N,) share of its pixels that are right.
        files: (N,) where the images lie; "": nowhere.
        names: of the classes.
        palette: (classes, 3) uint8.
        worst: images of the smallest miou, the worst first.
    """

    counts: Counts
    miou: NDArray[np.float64]
    right: NDArray[np.float64]
    files: Sequence[str]
    names: Sequence[str]
    palette: Pixels
    worst: Sequence[Worst]

    def figures(self) -> Figures:
        """Over all images."""
        return figures(self.counts)

    def save(self, path: Path) -> None:
        """An .npz file of the attributes, and `task`."""
        pictures: dict[str, Any] = {"worst": np.array([worst.index for worst in self.worst], np.int64)}
        for place, worst in enumerate(self.worst):
            pictures[f"worst{place}_image"] = worst.image
            pictures[f"worst{place}_truth"] = worst.truth
            pictures[f"worst{place}_found"] = worst.found
        with atomic(path) as file:
            np.savez_compressed(
                file,
                task=np.array(TASK),
                counts=self.counts,
                miou=self.miou,
                right=self.right,
                files=np.array(self.files, dtype=np.str_),
                names=np.array(self.names, dtype=np.str_),
                palette=self.palette,
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
        _check(found, len(names), len(files))
        worst = [
            Worst(int(index), *(found[f"worst{place}_{part}"] for part in ("image", "truth", "found")))
            for place, index in enumerate(found["worst"])
        ]
        for one in worst:
            _check_worst(one, len(names))
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not the answers of a run of segmentation: {error}") from None
    return Answers(found["counts"], found["miou"], found["right"], files, names, found["palette"], worst)


def _check(found: Mapping[str, Any], classes: int, images: int) -> None:
    expected = {
        "counts": ("i", (classes, classes)),
        "miou": ("f", (images,)),
        "right": ("f", (images,)),
        "palette": ("u", (classes, 3)),
    }
    for name, (kind, shape) in expected.items():
        array = found[name]
        if array.dtype.kind != kind or array.shape != shape:
            raise ValueError(f"{name}: expected {shape}, got {array.dtype} {array.shape}")
    if not classes or (found["counts"] < 0).any():
        raise ValueError("counts: expected pixels of one class or more, none below 0")
    if found["worst"].dtype.kind != "i" or found["worst"].ndim != 1 or len(found["worst"]) > images:
        raise ValueError(f"worst: expected places of up to {images} images")


def _check_worst(one: Worst, classes: int) -> None:
    maps = (one.truth, one.found)
    shape = one.truth.shape
    fits = one.image.shape == (*shape, 3) and one.found.shape == shape and len(shape) == 2
    if not fits or any(array.dtype != np.uint8 for array in (one.image, *maps)):
        raise ValueError(f"worst: image {one.index}: expected uint8 maps as large as the image")
    if any(((m >= classes) & (m != 255)).any() for m in maps):
        raise ValueError(f"worst: image {one.index}: expected class indices from 0 to {classes - 1}")

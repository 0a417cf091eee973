# SPDX-License-Identifier: Apache-2.0
"""Predictions for N images: eval.npz written and read, figures, confusion. Needs no torch."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...utils.files import atomic


@dataclass(frozen=True)
class Predictions:
    """Of N images, with their truth.

    Attributes:
        labels, predictions: (N,) true and most probable class.
        probabilities: (N, classes) float32.
        names: of the classes.
        files: (N,) where the pictures lie; "": nowhere.
    """

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    names: list[str]
    files: list[str]

    def confusion(self) -> NDArray[np.int64]:
        """(classes, classes): how often row was taken for column."""
        classes = self.probabilities.shape[1]
        pairs = self.labels * classes + self.predictions
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def per_class(self) -> list[tuple[str, int, float, str]]:
        """Of each class: name, images, share of right ones (nan without images), what it is taken for."""
        rows = []
        for i, row in enumerate(self.confusion()):
            count = int(row.sum())
            wrong = row.copy()
            wrong[i] = 0
            taken = f"{self.names[int(wrong.argmax())]} ({int(wrong.max())})" if wrong.any() else ""
            rows.append((self.names[i], count, float(row[i]) / count if count else math.nan, taken))
        return rows

    def save(self, path: Path) -> None:
        """An .npz file of the attributes."""
        with atomic(path) as file:
            np.savez(
                file,
                labels=self.labels,
                predictions=self.predictions,
                probabilities=self.probabilities,
                names=np.array(self.names, dtype=np.str_),
                files=np.array(self.files, dtype=np.str_),
            )


def read_predictions(path: Path) -> Predictions:
    """What `Predictions.save` wrote; ValueError says what is wrong with it."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels, predictions = arrays["labels"], arrays["predictions"]
            probabilities = arrays["probabilities"]
            names, files = [str(n) for n in arrays["names"]], [str(f) for f in arrays["files"]]
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not the answers of a run: {error}") from None
    count, classes = len(labels), len(names)
    for name, found, shape in (
        ("labels", labels, (count,)),
        ("predictions", predictions, (count,)),
        ("probabilities", probabilities, (count, classes)),
    ):
        if found.shape != shape:
            raise ValueError(f"{path}: {name}: expected {shape}, got {found.shape}")
    for name, index in (("labels", labels), ("predictions", predictions)):
        if index.dtype.kind not in "iu" or (count and not 0 <= index.min() <= index.max() < classes):
            raise ValueError(f"{path}: {name}: expected class indices from 0 to {classes - 1}")
    if len(files) != count or count == 0:
        raise ValueError(
            f"{path}: files: expected one for each of at least one image, got {len(files)} for {count}"
        )
    return Predictions(labels.astype(np.int64), predictions.astype(np.int64), probabilities, names, files)

# SPDX-License-Identifier: Apache-2.0
"""`vimcore features`: a vector for each picture file, or all its tokens, and the files that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..results import NOT_FINITE, json_text
from ..utils.files import atomic, csv_row
from .embedders import Embedder
from .predict import BATCH, answers

SUFFIXES = (".csv", ".npy", ".npz", ".safetensors")
IMAGES_KEY = "vimcore.images"  # metadata: a JSON list of the pictures' names


@dataclass(frozen=True)
class Feature:
    """Of one image: (D,) or (L, D) float32, or the error that prevented it."""

    image: str
    values: NDArray[np.float32] | None = None
    error: str | None = None


def features(
    embedder: Embedder, names: Iterable[str], tokens: bool = False, batch: int = BATCH
) -> Iterator[Feature]:
    """Features of pictures, in order; a bad one becomes a Feature with an error.

    Args:
        names: as `predict.inputs_of` gives them.
        tokens: all tokens of each.
        batch: how many are computed at once; changes no result.
    """
    compute = embedder.tokens if tokens else embedder.vectors
    for name, row in answers(names, embedder.steps, embedder.frames, compute, batch):
        if isinstance(row, str):
            yield Feature(name, error=row)
        elif not np.isfinite(row).all():
            yield Feature(name, error=NOT_FINITE)
        else:
            yield Feature(name, row)


def write_features(path: str, suffix: str, images: Sequence[str], values: NDArray[np.float32]) -> None:
    """A file of the format that its suffix says, as vim-infer writes it.

    Args:
        images: names of the pictures; a .npy file cannot hold them.
        values: (N, D); (N, L, D) in other files than .csv.
    """
    if suffix == ".safetensors":
        _core.write_safetensors(path, {"features": values}, {IMAGES_KEY: json_text(list(images))})
        return
    with atomic(Path(path)) as file:
        if suffix == ".npy":
            np.save(file, values)
        elif suffix == ".npz":
            np.savez(file, features=values, images=np.array(images, np.str_))
        else:
            file.write(csv_row(["image", *(f"f{i}" for i in range(values.shape[1]))]))
            for image, row in zip(images, values):
                file.write(csv_row([image, *(f"{float(value):.9g}" for value in row)]))

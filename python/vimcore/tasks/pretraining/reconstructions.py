# SPDX-License-Identifier: Apache-2.0
"""What a pretrained network makes of some images: eval.npz written and read. Needs no torch."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...utils.files import atomic

TASK = "pretrain"


@dataclass(frozen=True)
class Reconstructions:
    """Of N images.

    Attributes:
        panels: (N, M, H, W, 3) uint8: of every image the same pictures.
        titles: of these M, from left to right.
        files: (N,) where the images lie; "": nowhere.
        loss: (N,) of each.
    """

    panels: NDArray[np.uint8]
    titles: Sequence[str]
    files: Sequence[str]
    loss: NDArray[np.float64]

    def save(self, path: Path) -> None:
        """An .npz file of the attributes, and `task`."""
        with atomic(path) as file:
            np.savez_compressed(
                file,
                task=np.array(TASK),
                panels=self.panels,
                titles=np.array(self.titles, dtype=np.str_),
                files=np.array(self.files, dtype=np.str_),
                loss=self.loss,
            )


def read_reconstructions(path: Path) -> Reconstructions:
    """What `Reconstructions.save` wrote; ValueError says what is wrong with it."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("task", "panels", "titles", "files", "loss")}
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not the pictures of a run of pretraining: {error}") from None
    panels, titles, files, loss = (found[name] for name in ("panels", "titles", "files", "loss"))
    fits = panels.ndim == 5 and panels.shape[0] == len(files) == len(loss) > 0 and panels.shape[4] == 3
    if str(found["task"]) != TASK or panels.dtype != np.uint8 or not fits or panels.shape[1] != len(titles):
        raise ValueError(
            f"{path}: panels: expected uint8 of {files.shape} images and {titles.shape} titles, "
            f"got {panels.dtype} {panels.shape}"
        )
    return Reconstructions(panels, [str(t) for t in titles], [str(f) for f in files], loss)

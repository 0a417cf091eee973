# SPDX-License-Identifier: Apache-2.0
"""Which images captions find: eval.npz written and read. Needs no torch."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...utils.files import atomic

TASK = "clip"


@dataclass(frozen=True)
class Found:
    """Of Q captions the K nearest images.

    Attributes:
        captions: those.
        panels: (Q, K, H, W, 3) uint8 of the images, nearest first.
        files: (Q, K) where they lie; "": nowhere.
        right: (Q, K) whether the caption is one of the image's.
        cosines: (Q, K).
    """

    captions: Sequence[str]
    panels: NDArray[np.uint8]
    files: NDArray[np.str_]
    right: NDArray[np.bool_]
    cosines: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """An .npz file of the attributes, and `task`."""
        with atomic(path) as file:
            np.savez_compressed(
                file,
                task=np.array(TASK),
                captions=np.array(self.captions, dtype=np.str_),
                panels=self.panels,
                files=self.files,
                right=self.right,
                cosines=self.cosines,
            )


def read_found(path: Path) -> Found:
    """What `Found.save` wrote; ValueError says what is wrong with it."""
    names = ("captions", "panels", "files", "right", "cosines")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            task, found = str(arrays["task"]), [arrays[name] for name in names]
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not the pictures of a run of image-text learning: {error}") from None
    captions, panels, files, right, cosines = found
    shape = panels.shape[:2]
    fits = panels.ndim == 5 and panels.shape[4] == 3 and panels.dtype == np.uint8 and min(panels.shape) > 0
    fits = fits and captions.shape == shape[:1] and files.shape == right.shape == cosines.shape == shape
    if task != TASK or not fits:
        raise ValueError(f"{path}: panels: expected uint8 of {captions.shape} captions, got {panels.shape}")
    return Found([str(text) for text in captions], panels, files, right.astype(bool), cosines)

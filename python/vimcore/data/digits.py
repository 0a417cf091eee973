# SPDX-License-Identifier: Apache-2.0
"""The handwritten digits of the demo: 1,797 real images, their fixed held-out fifth, and PNG writing."""

from __future__ import annotations

import struct
import zlib
from importlib import resources

import numpy as np
from numpy.typing import NDArray

HELD_OUT_EVERY = 5


def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The UCI handwritten digits (source and licence: ``vimcore/data/digits.SOURCE.txt``).

    Returns:
        images (1797, 8, 8) uint8 from 0 (paper) to 16 (ink), and labels (1797,) int64 from 0 to 9.
    """
    source = resources.files("vimcore").joinpath("data").joinpath("digits.npz")
    with source.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"].astype(np.int64)


def split_digits(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training part and of the held-out fifth, both ascending.

    Every fifth sample of each class in file order is held out, so the split is stratified and needs no seed.
    """
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in np.unique(labels):
        of_class = np.flatnonzero(labels == digit)
        held_out[of_class[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG file of 8-bit pixels, grey (H, W) or RGB (H, W, 3)."""
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(
            f"[encode_png] pixels: expected uint8 (H, W) or (H, W, 3), got {pixels.dtype} {pixels.shape}"
        )
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    raw = np.concatenate(
        [np.zeros((height, 1), np.uint8), rows], axis=1
    ).tobytes()  # a zero byte per row: no filter

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )

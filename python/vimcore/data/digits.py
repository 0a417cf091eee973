# SPDX-License-Identifier: Apache-2.0
"""The handwritten digits of the demo: 1,797 real images, their fixed held-out fifth, and PNG writing.

Needs no torch, but for `jiggle`.
"""

from __future__ import annotations

import math
import struct
import zlib
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import _core

if TYPE_CHECKING:
    import torch

HELD_OUT_EVERY = 5
SIDE = 32  # pixels of a picture
MEAN, STD = 0.3, 0.38  # of the pictures, values 0 to 1


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


def picture(digit: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An 8 x 8 digit with values 0 .. 16 as a grey picture (32, 32) uint8, enlarged bicubically."""
    grey = np.round(digit * (255 / 16)).astype(np.uint8)
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    return np.ascontiguousarray(_core.resize_bicubic(rgb, SIDE, SIDE)[:, :, 0])


def jiggle(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random turns, shears, zooms, shifts: up to 10 degrees, 10 %, 10 % and 2 pixels; paper stays paper.

    Args:
        images: (B, 1 or 3, 32, 32), normalised by MEAN and STD.
    """
    import torch
    from torch.nn import functional as F

    count = len(images)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    angle = uniform(count) * math.radians(10)
    zoom = 1 + 0.1 * uniform(count, 2)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = angle.cos() * zoom[:, 0]
    matrix[:, 0, 1] = 0.1 * uniform(count) - angle.sin() * zoom[:, 0]
    matrix[:, 1, 0] = angle.sin() * zoom[:, 1]
    matrix[:, 1, 1] = angle.cos() * zoom[:, 1]
    matrix[:, :, 2] = uniform(count, 2) * 2 * 2 / SIDE
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    paper = -MEAN / STD
    return F.grid_sample(images - paper, grid, align_corners=False) + paper


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
